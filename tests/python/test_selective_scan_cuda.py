"""The raw module selective_scan_cuda: results, the chunk states, and how its callers use it."""

import pytest
import selective_scan_cuda
import torch
from mamba_ssm.native import selective_scan as native
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Upstream's own, for outputs; fwd rounds out before it gates it.
TOLERANCES = dict(zip(DTYPES, [(6e-4, 2e-3), (3e-3, 5e-3), (3e-2, 5e-2)], strict=True))


def problem(
    device="cpu", dtype=torch.float32, length=100, absent=(), static=(), a_dtype=torch.float32
):
    """The eight tensors by name, in the order of the arguments."""
    pairs = 2 if a_dtype.is_complex else 1

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype)

    def projection(name):
        return randn(6, 4, dtype=a_dtype) if name in static else randn(2, 2, 4, pairs * length)

    A = -torch.rand(6, 4, device=device) - 0.1

    tensors = {
        "u": randn(2, 6, length),
        "delta": 0.5 * randn(2, 6, length),
        "A": torch.complex(A, 3 * torch.randn_like(A)) if a_dtype.is_complex else A,
        "B": projection("B"),
        "C": projection("C"),
        "D": randn(6, dtype=torch.float32),
        "z": randn(2, 6, length),
        "delta_bias": randn(6, dtype=torch.float32) - 1.0,
    }
    return {name: None if name in absent else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", [(), ("z",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("static", [(), ("B",), ("B", "C")], ids=str)
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.complex64], ids=str)
def test_fwd_and_bwd_are_the_function(device, a_dtype, dtype, absent, static):
    tensors = problem(device, dtype, absent=absent, static=static, a_dtype=a_dtype)
    out, x, *out_z = selective_scan_cuda.fwd(*tensors.values(), True)
    assert x.shape == (2, 6, 1, 8) and x.dtype == a_dtype
    plain = selective_scan_ref(**(tensors | {"z": None}), delta_softplus=True)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(out, plain, rtol=rtol, atol=atol)

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if t is not None}
    expected = selective_scan_fn(**leaves, delta_softplus=True)
    torch.testing.assert_close(out_z[0] if out_z else out, expected.detach(), rtol=rtol, atol=atol)
    dout = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, list(leaves.values()), dout)
    gradients = dict.fromkeys(tensors) | dict(zip(leaves, gradients, strict=True))
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", *(("z",) if out_z else ()))
    got = selective_scan_cuda.bwd(*tensors.values(), dout, x, out, None, True, False)
    assert len(got) == len(order)
    for name, gradient in zip(order, got, strict=True):
        assert (gradient is None) == (tensors[name] is None)
        if gradient is not None:
            assert gradient.dtype == tensors[name].dtype
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, 4096, 5000])
@pytest.mark.parametrize("a_dtype", [torch.float32, torch.complex64], ids=str)
def test_x_holds_decay_and_state_at_the_ends_of_chunks(a_dtype, length):
    tensors = problem(length=length, a_dtype=a_dtype)
    width = {n: tensors[n].shape[-1] // length for n in ("u", "delta", "B", "C", "z")}
    _, x, _ = selective_scan_cuda.fwd(*tensors.values(), True)
    ends = [min(end, length) for end in range(2048, length + 2048, 2048)]
    assert x.shape == (2, 6, len(ends), 8)
    step = torch.nn.functional.softplus(tensors["delta"] + tensors["delta_bias"][:, None])
    for chunk, end in enumerate(ends):
        part = {n: t[..., : end * width[n]] if n in width else t for n, t in tensors.items()}
        _, state = selective_scan_fn(**part, delta_softplus=True, return_last_state=True)
        torch.testing.assert_close(x[:, :, chunk, 1::2], state, rtol=1e-4, atol=1e-4)
        decay = torch.exp(step[..., :end].sum(-1, keepdim=True) * tensors["A"])
        torch.testing.assert_close(x[:, :, chunk, 0::2], decay, rtol=1e-3, atol=1e-30)


def test_bwd_fills_dz_and_recomputes_out_z(device):
    tensors = problem(device)
    out, x, out_z = selective_scan_cuda.fwd(*tensors.values(), True)
    dxz = torch.full((2, 12, 100), 7.0, device=device)
    arguments = (*tensors.values(), torch.randn_like(out), x, out)
    *_, dz, again = selective_scan_cuda.bwd(*arguments, dxz[:, 6:], True, True)
    assert dz.data_ptr() == dxz[:, 6:].data_ptr()
    assert torch.equal(again, out_z)
    assert torch.equal(dz, selective_scan_cuda.bwd(*arguments, None, True, False)[-1])
    assert (dxz[:, :6] == 7.0).all()


def test_bwd_needs_no_second_scan_with_the_x_of_fwd(monkeypatch):
    """Also when autograd has kept it; another x gives the same bits."""
    tensors = problem(length=3000, absent=("z",))
    scans = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            out, x = selective_scan_cuda.fwd(*inputs, True)
            ctx.save_for_backward(*inputs, x)
            return out

        @staticmethod
        def backward(ctx, dout):
            *inputs, x = ctx.saved_tensors
            forward = native.selective_scan_forward
            monkeypatch.setattr(
                native, "selective_scan_forward", lambda *a: scans.append(a) or forward(*a)
            )
            kept, again = (
                selective_scan_cuda.bwd(*inputs, dout, which, None, None, True, False)
                for which in (x, x.clone())
            )
            assert len(scans) == 1
            for a, b in zip(kept, again, strict=True):
                assert a is b is None or torch.equal(a, b)
            return *kept[:6], None, kept[6]

    leaf = tensors["u"].requires_grad_()
    Function.apply(*tensors.values()).sum().backward()
    assert scans and leaf.grad.abs().sum() > 0


def test_as_vmamba_calls_it(device):
    """u folds four directions into the channels, delta and A are grouped, no gate; x None up to 2048 steps."""
    tensors = problem(device, absent=("z",))
    u, delta, A, B, C, D, _, bias = tensors.values()
    out, x = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, bias, True)
    dout = torch.randn_like(out)
    arguments = (u, delta, A, B, C, D, None, bias, dout)
    with_x = selective_scan_cuda.bwd(*arguments, x, None, None, True, False)
    without = selective_scan_cuda.bwd(*arguments, None, None, None, True, False)
    assert len(with_x) == 7
    for a, b in zip(with_x, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["length", "batch"])
def test_empty(device, size):
    tensors = problem(device, length=0 if size == "length" else 5)
    if size == "batch":
        tensors |= {name: tensors[name][:0] for name in ("u", "delta", "B", "C", "z")}
    out, x, out_z = selective_scan_cuda.fwd(*tensors.values(), False)
    assert out.numel() == out_z.numel() == x.numel() == 0
    grads = selective_scan_cuda.bwd(*tensors.values(), out, x, out, None, False, True)
    assert [g.shape for g in grads[:2]] == [tensors["u"].shape] * 2 and not grads[2].any()


def test_argument_counts():
    tensors = list(problem().values())
    with pytest.raises(TypeError):
        selective_scan_cuda.fwd(*tensors)
    with pytest.raises(TypeError):
        selective_scan_cuda.bwd(*tensors, tensors[0], None, None, None, True)


def test_what_does_not_fit_is_refused_by_name():
    tensors = problem(length=2049)
    out, x, _ = selective_scan_cuda.fwd(*tensors.values(), True)
    arguments = (*tensors.values(), out)
    with pytest.raises(RuntimeError, match="x must be what fwd returned"):
        selective_scan_cuda.bwd(*arguments, None, out, None, True, False)
    with pytest.raises(RuntimeError, match="out must be what fwd returned"):
        selective_scan_cuda.bwd(*arguments, x, None, None, True, False)
    ungated = (*(tensors | {"z": None}).values(), out)
    with pytest.raises(RuntimeError, match="recompute_out_z must come with z"):
        selective_scan_cuda.bwd(*ungated, x, None, None, True, True)
    three = tensors | {"B": tensors["B"][:, 0]}
    with pytest.raises(RuntimeError, match=r"\bB must"):
        selective_scan_cuda.fwd(*three.values(), True)
