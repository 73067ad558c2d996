"""layer_norm_fn and rms_norm_fn with residual against the references."""

import pytest
import torch
from compare import DTYPES, judge
from mamba_ssm.native import ops
from mamba_ssm.ops.triton import layer_norm as current
from mamba_ssm.ops.triton import layernorm as before_2
from mamba_ssm.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)


def problem(
    device="cpu",
    dtype=torch.float32,
    shape=(2, 5, 96),
    bias=True,
    residual=True,
    residual_dtype=None,
    weight_dtype=None,
    strided=False,
):
    """Inputs of a norm as keyword arguments; x and residual are multiples of 1/8.

    Their sum is then exact in every dtype: backward reads the stored sum, and the references know no rounding of it.
    """
    weight_dtype = weight_dtype or torch.promote_types(dtype, torch.float32)

    def randn(*sizes, dtype=dtype):
        return torch.randn(sizes, device=device).to(dtype)

    def rows(dtype):
        width = 2 * shape[-1] if strided else shape[-1]
        return ((randn(*shape[:-1], width) * 8).round() / 8).to(dtype)[..., : shape[-1]]

    return {
        "x": rows(dtype),
        "weight": randn(shape[-1], dtype=weight_dtype),
        "bias": randn(shape[-1], dtype=weight_dtype) if bias else None,
        "residual": rows(residual_dtype or dtype) if residual else None,
    }


ROWS = {
    "base": {},
    "one row": {"shape": (96,)},
    "one feature fewer than a vector": {"shape": (3, 15)},
    "wide rows": {"shape": (4, 4100)},
    "many rows": {"shape": (700, 24)},
    "no bias": {"bias": False},
    "no residual": {"residual": False},
    "float32 residual": {"residual_dtype": torch.float32},
    "strided rows": {"strided": True},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")] + [
    ("base", "f16"),
    ("base", "f64"),
]
CASES = [case for case in CASES if case != ("float32 residual", "f32")]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_outputs_and_gradients(device, row, dtype, rms):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    function, reference = (rms_norm_fn, rms_norm_ref) if rms else (layer_norm_fn, layer_norm_ref)
    judge(
        "layer_norm",
        dtype,
        lambda **t: function(**t, prenorm=True),
        lambda **t: reference(**t, prenorm=True),
        problem(device, DTYPES[dtype], **ROWS[row]),
    )


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck(route, residual, rms):
    tensors = problem(dtype=torch.float64, shape=(3, 5), residual=residual, bias=not rms)
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        given = tensors | dict(zip(names, values, strict=True))
        if route == "eager":
            return layer_norm_fn(**given, prenorm=True, is_rms_norm=rms)
        y, h, *_ = ops.layer_norm_forward(*given.values(), 1e-6, rms, False)
        return (y, h) if residual else y

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_reference_by_hand():
    x, weight = torch.tensor([[3.0, -3.0]]), torch.tensor([2.0, 1.0])
    expected = torch.tensor([[2.0, -1.0]])
    torch.testing.assert_close(layer_norm_ref(x + 5, weight, None, eps=0.0), expected)
    torch.testing.assert_close(rms_norm_ref(x, weight, None, eps=0.0), expected)


@pytest.mark.parametrize(
    "dtype, residual_dtype, in_fp32, expected",
    [
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
        (torch.float32, None, True, torch.float32),
    ],
)
def test_dtype_of_the_carried_residual(device, dtype, residual_dtype, in_fp32, expected):
    tensors = problem(
        device, dtype, residual=residual_dtype is not None, residual_dtype=residual_dtype
    )
    y, h = layer_norm_fn(**tensors, prenorm=True, residual_in_fp32=in_fp32)
    assert (y.dtype, h.dtype) == (dtype, expected)


def test_an_unchanged_residual_is_the_input_itself(device):
    tensors = problem(device, residual=False)
    _, h = layer_norm_fn(**tensors, prenorm=True)
    assert h is tensors["x"]


def test_gradient_through_the_carried_residual_alone(device):
    tensors = problem(device)
    tensors["x"].requires_grad_()
    _, h = layer_norm_fn(**tensors, prenorm=True)
    (gradient,) = torch.autograd.grad(h.sum(), tensors["x"])
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_empty(device):
    tensors = problem(device, shape=(0, 8))
    tensors["weight"].requires_grad_()
    y, h = layer_norm_fn(**tensors, prenorm=True)
    assert y.shape == h.shape == (0, 8)
    y.sum().backward()
    assert tensors["weight"].grad.abs().sum() == 0


@pytest.mark.parametrize(
    "name, value",
    [
        ("x1", torch.zeros(2, 5, 96)),
        ("weight1", torch.zeros(96)),
        ("bias1", torch.zeros(96)),
        ("dropout_p", 0.1),
        ("rowscale", torch.ones(10)),
        ("return_dropout_mask", True),
    ],
)
def test_what_is_not_there_is_refused_by_name(name, value):
    for function in (layer_norm_fn, rms_norm_fn):
        with pytest.raises(NotImplementedError, match=name):
            function(**problem(), **{name: value})


def test_norm_then_linear(device):
    tensors = problem(device)
    linear = torch.randn(7, 96, device=device), torch.randn(7, device=device)
    out, h = layer_norm_linear_fn(
        tensors["x"], tensors["weight"], tensors["bias"], *linear, tensors["residual"], prenorm=True
    )
    y, expected_h = layer_norm_fn(**tensors, prenorm=True)
    torch.testing.assert_close(out, torch.nn.functional.linear(y, *linear))
    assert torch.equal(h, expected_h)


def test_old_path_keeps_its_argument_order(device):
    x, weight, bias, residual = problem(device).values()
    expected = current.rms_norm_fn(
        x, weight, bias, residual=residual, eps=1e-3, prenorm=True, residual_in_fp32=True
    )
    for old in (
        before_2.rms_norm_fn(x, weight, bias, residual, True, True, 1e-3),
        before_2.layer_norm_fn(x, weight, bias, residual, 1e-3, True, True, True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(old, expected, strict=True))
    assert before_2.RMSNorm is RMSNorm


def test_module(device):
    norm = RMSNorm(96, device=device)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    tensors = problem(device)
    y, h = norm(tensors["x"], tensors["residual"], prenorm=True)
    expected = rms_norm_ref(
        tensors["x"], norm.weight, None, tensors["residual"], eps=1e-5, prenorm=True
    )
    torch.testing.assert_close((y, h), expected)


def test_compiles_to_one_graph(device):
    leaves = {name: t.detach().requires_grad_() for name, t in problem(device).items()}
    function = torch.compile(layer_norm_fn, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (layer_norm_fn, function):
        y, h = candidate(**leaves, prenorm=True)
        gradients = torch.autograd.grad(y.square().sum() + h.sum(), list(leaves.values()))
        results.append((y, h, *gradients))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)
