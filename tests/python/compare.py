"""The two metrics by which every result is judged, as in tests/support/compare.h.

truth: the PyTorch reference in float64 on inputs already rounded to the dtype; yardstick: the same in float32.
Slack is twice that of compare.h, because torch sums in pairs, which is finer than the loop that compare.h takes.
"""

import contextlib
import math
import re
from pathlib import Path

import torch

DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
}
FORWARD_SLACK, GRADIENT_SLACK = 4.0, 6.0
HARDWARE_EXP2_SLACK = 2.0  # factor on CUDA, for the reason that compare.h gives

_TABLE = Path(__file__).resolve().parents[1] / "support" / "bounds.inc"
_BOUNDS = {
    (op, dtype): float(bound)
    for op, dtype, bound in re.findall(
        r"^BOUND\((\w+), (\w+), (\S+)\)", _TABLE.read_text(), re.MULTILINE
    )
}


def assert_close(op, dtype, name, out, truth, yardstick, slack):
    """op and dtype ("f32", ...) choose the bound; truth and yardstick are the references' results."""
    assert out.shape == truth.shape, (
        f"{op} {name}: shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    )
    if truth.numel() == 0:
        return
    if out.is_complex():
        out, truth, yardstick = (
            torch.view_as_real(t.resolve_conj()) for t in (out, truth, yardstick)
        )
    yardstick = yardstick.to(out.dtype).double()
    epsilon = torch.finfo(out.dtype).eps
    if out.is_cuda:
        slack *= HARDWARE_EXP2_SLACK
    out, truth = out.detach().cpu().double(), truth.double()
    largest = truth.abs().max().item()
    ulp = epsilon * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
    error = (out - truth).square().sum().item()
    size = truth.square().sum().item()
    nmse = error / size if size > 0 else (0.0 if error == 0 else math.inf)
    used_nmse = nmse / _BOUNDS[op, dtype]
    worst = (out - truth).abs().max().item()
    allowed = slack * max((yardstick - truth).abs().max().item(), ulp / 2) + ulp
    used_worst = worst / allowed if allowed > 0 else (0.0 if worst == 0 else math.inf)
    report = f"{op} {dtype} {name}: {used_nmse:.0%} of the NMSE bound, {used_worst:.0%} of the largest error"
    print(report)
    assert used_nmse <= 1.0 and used_worst <= 1.0, report


def _is_number(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def evaluate(function, tensors, cotangents=None):
    """function(**tensors) -> tuple. Returns ({"out0": ...}, {"d<name>": ...}, the cotangents used).

    Cotangents are drawn on the CPU, so that every device is judged by the same: a gradient of a few numbers, each a
    sum over batch and time (dA, dD), is as exact as its draw lets cancel.
    """
    leaves = {
        name: t.detach().requires_grad_() if t is not None and _is_number(t) else t
        for name, t in tensors.items()
    }
    outputs = function(**leaves)
    if cotangents is None:
        cotangents = [torch.randn(o.shape, dtype=o.dtype).to(o.device) for o in outputs]
    wanted = [name for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(
        outputs, [leaves[name] for name in wanted], cotangents, allow_unused=True
    )
    gradients = [
        torch.zeros_like(leaves[n]) if g is None else g
        for n, g in zip(wanted, gradients, strict=True)
    ]
    return (
        {f"out{i}": o.detach() for i, o in enumerate(outputs)},
        {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)},
        cotangents,
    )


def convert(tensors, dtype):
    """Copies on the CPU, floating ones in another dtype, complex ones in its kin."""

    def one(tensor):
        if tensor is None:
            return None
        wanted = dtype.to_complex() if tensor.is_complex() else dtype
        return tensor.detach().to("cpu", wanted if _is_number(tensor) else None, copy=True)

    if isinstance(tensors, dict):
        return {name: one(tensor) for name, tensor in tensors.items()}
    return [one(tensor) for tensor in tensors]


@contextlib.contextmanager
def one_thread():
    """Torch's threads cost the references' many small operations more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def judge(operation, dtype, function, reference, tensors, plain=None, tensor_cores=False):
    """Outputs and gradients of function(**tensors) against those of reference(**tensors).

    plain: the yardstick's formula where the reference sums in another order than a loop would.
    tensor_cores: everything, float32 results too, is made of numbers rounded to the dtype.
    """
    outputs, gradients, cotangents = evaluate(function, tensors)
    suffix = "_tensor_cores" if tensor_cores else ""
    with one_thread():
        truths, yardsticks = (
            evaluate(formula, convert(tensors, wide), convert(cotangents, wide))
            for formula, wide in ((reference, torch.float64), (plain or reference, torch.float32))
        )
    for results, truth, yardstick, direction, slack in (
        (outputs, truths[0], yardsticks[0], "forward", FORWARD_SLACK),
        (gradients, truths[1], yardsticks[1], "backward", GRADIENT_SLACK),
    ):
        for name, result in results.items():
            if tensor_cores:
                result = result.to(DTYPES[dtype])
            op = f"{operation}_{direction}{suffix}"
            assert_close(op, dtype, name, result, truth[name], yardstick[name], slack)
