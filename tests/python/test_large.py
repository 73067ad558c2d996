"""More than 2^31 elements in a tensor: the first and the last channels of dense tensors, two of them beyond 2^31.

Truth is the same operation on those channels alone, on the CPU in float64, which other tests hold against the formulas.
"""

import pytest
import torch
from compare import FORWARD_SLACK, GRADIENT_SLACK, assert_close
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

pytestmark = [pytest.mark.gpu, pytest.mark.large]

LENGTH = 2**19
CHANNELS = 2**31 // LENGTH + 2
TOGETHER = 16  # a gradient of one number per channel needs company to be judged by


def randn(*sizes, dtype=torch.bfloat16):
    return torch.randn(*sizes, device="cuda", dtype=dtype)


def part_of(tensor, first, dim):
    return tensor if dim is None else tensor.narrow(dim, first, TOGETHER)


def part(function, tensors, dims, cotangent, axis, first, dtype):
    """[out, gradients] of TOGETHER channels from `first`, alone, on the CPU."""
    leaves = {
        name: part_of(tensor, first, dims[name]).detach().cpu().to(dtype).requires_grad_()
        for name, tensor in tensors.items()
    }
    out = function(**leaves)
    wanted = [leaves[name] for name, dim in dims.items() if dim is not None]
    weight = part_of(cotangent, first, axis).cpu().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, weight)]


def results(function, tensors, dims, cotangent, axis):
    """Yields (name, first channel, result, truth, yardstick). Batch 1: gradients are per channel.

    dims: each tensor's dimension of channels, None where it has none; axis: that of the output.
    """
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    assert out.numel() > 2**31
    names = [name for name, dim in dims.items() if dim is not None]
    gradients = torch.autograd.grad(out, [leaves[name] for name in names], cotangent)
    for first in (0, out.shape[axis] - TOGETHER):
        truth, yardstick = (
            part(function, tensors, dims, cotangent, axis, first, dtype)
            for dtype in (torch.float64, torch.float32)
        )
        got = [part_of(out, first, axis)]
        got += [part_of(g, first, dims[n]) for n, g in zip(names, gradients, strict=True)]
        for name, *parts in zip(["out", *names], got, truth, yardstick, strict=True):
            yield name, first, *parts


def check(op, function, tensors, dims, cotangent):
    for name, first, *parts in results(function, tensors, dims, cotangent, axis=1):
        direction, slack = ("forward", FORWARD_SLACK)
        if name != "out":
            direction, slack = ("backward", GRADIENT_SLACK)
        assert_close(f"{op}_{direction}", "bf16", f"{name} from {first}", *parts, slack)


def test_selective_scan():
    tensors = {
        "u": randn(1, CHANNELS, LENGTH),
        "delta": randn(1, CHANNELS, LENGTH) - 2,
        "A": -torch.rand(CHANNELS, 4, device="cuda") - 0.5,
        "B": randn(1, 4, LENGTH),
        "C": randn(1, 4, LENGTH),
        "D": randn(CHANNELS, dtype=torch.float32),
        "z": randn(1, CHANNELS, LENGTH),
    }
    dims = {"u": 1, "delta": 1, "A": 0, "B": None, "C": None, "D": 0, "z": 1}

    def function(**arguments):
        return selective_scan_fn(**arguments, delta_softplus=True)

    check("selective_scan", function, tensors, dims, randn(1, CHANNELS, LENGTH))


@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_causal_conv1d(layout):
    def activations():
        if layout == "channel_first":
            return randn(1, CHANNELS, LENGTH)
        return randn(1, LENGTH, CHANNELS).transpose(1, 2)

    tensors = {
        "x": activations(),
        "weight": randn(CHANNELS, 4, dtype=torch.float32),
        "bias": randn(CHANNELS, dtype=torch.float32),
    }

    def function(**arguments):
        return causal_conv1d_fn(**arguments, activation="silu")

    check("causal_conv1d", function, tensors, {"x": 1, "weight": 0, "bias": 0}, activations())


def test_ssd():
    """Heads of four channels, judged by the squared deviation, as tensor cores round what they multiply."""
    heads, headdim = 2**31 // LENGTH // 4 + TOGETHER, 4

    def activations():
        return randn(1, LENGTH, heads, headdim)

    tensors = {
        "x": activations(),
        "dt": randn(1, LENGTH, heads) - 2,
        "A": -torch.rand(heads, device="cuda") - 0.5,
        "B": randn(1, LENGTH, 1, 4),
        "C": randn(1, LENGTH, 1, 4),
        "D": randn(heads, dtype=torch.float32),
    }
    dims = {"x": 2, "dt": 2, "A": 0, "B": None, "C": None, "D": 0}

    def function(**arguments):
        return mamba_chunk_scan_combined(**arguments, chunk_size=256, dt_softplus=True)

    for name, first, got, truth, _ in results(function, tensors, dims, activations(), axis=2):
        error = (got.cpu().double() - truth).square().sum() / truth.square().sum()
        assert error < 1e-4, f"{name} from {first}: {error}"
