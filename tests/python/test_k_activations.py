"""swiglu and softplus against the formulas, in every dtype, into slices, and with bad arguments."""

import pytest
import torch
from bad_calls import SHAPES, assert_refused, spoil, thousand_examples
from compare import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops.triton.k_activations import SwiGLU, _swiglu_bwd, _swiglu_fwd, swiglu
from mamba_ssm.ops.triton.softplus import softplus


def formula(xy):
    x, y = xy.chunk(2, dim=-1)
    return x / (1 + torch.exp(-x)) * y


def tolerance(dtype):
    epsilon = torch.finfo(dtype).eps
    return {"rtol": 4 * epsilon, "atol": 4 * epsilon}


def sample(device, dtype="f32", shape=(3, 5, 32)):
    return torch.randn(shape, device=device).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 32), (2,), (7, 2), (4, 1026), (0, 8), (3, 0)])
def test_swiglu(device, dtype, shape):
    """Rounded once from float32, forward and backward."""
    xy = sample(device, dtype, shape).requires_grad_()
    out = swiglu(xy)
    dout = torch.randn_like(out)
    (dxy,) = torch.autograd.grad(out, xy, dout)
    exact = xy.detach().double().requires_grad_()
    expected = formula(exact)
    (expected_dxy,) = torch.autograd.grad(expected, exact, dout.double())
    assert out.dtype == dxy.dtype == xy.dtype
    torch.testing.assert_close(out.double(), expected, **tolerance(xy.dtype))
    torch.testing.assert_close(dxy.double(), expected_dxy, **tolerance(xy.dtype))


def test_swiglu_by_hand():
    """silu(0) = 0 with slope 1/2; silu of a large x is x."""
    xy = torch.tensor([0.0, 100.0, 3.0, 2.0])
    assert torch.equal(_swiglu_fwd(xy), torch.tensor([0.0, 200.0]))
    dxy = _swiglu_bwd(xy, torch.tensor([1.0, 10.0]))
    assert torch.equal(dxy, torch.tensor([1.5, 20.0, 0.0, 1000.0]))


def test_swiglu_gradcheck():
    xy = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, xy)


def test_swiglu_keeps_only_its_input(device):
    xy = sample(device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        SwiGLU.apply(xy)
    assert len(kept) == 1 and kept[0].data_ptr() == xy.data_ptr()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_swiglu_into_slices(device, dtype):
    """out and dxy may be strided parts of larger tensors; what lies around them stays."""
    xy, dout = sample(device, dtype), sample(device, dtype, (3, 5, 16))
    space = torch.full((3, 5, 100), 7.0, device=device, dtype=DTYPES[dtype])
    out, dxy = space[..., 1:33:2], space[..., 34:98:2]
    given = _swiglu_bwd(xy, dout, dxy=dxy, recompute_output=True, out=out)
    assert given[0] is dxy and given[1] is out
    assert torch.equal(dxy, _swiglu_bwd(xy, dout)) and torch.equal(out, _swiglu_fwd(xy))
    assert _swiglu_fwd(xy, out=out) is out
    assert (space[..., 0:33:2] == 7).all() and (space[..., 35::2] == 7).all()


def test_swiglu_of_a_strided_input(device):
    xy = sample(device, shape=(32, 6)).t()
    torch.testing.assert_close(swiglu(xy), swiglu(xy.contiguous()))


def test_swiglu_of_extreme_values(device):
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], device=device)
    xy = torch.cat([x, torch.ones_like(x)])
    assert torch.equal(swiglu(xy), x.clamp(min=0))
    assert _swiglu_bwd(xy, torch.ones_like(x)).isfinite().all()


def test_swiglu_compiles_to_one_graph(device):
    results = []
    for function in (swiglu, torch.compile(swiglu, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        xy = sample(device).requires_grad_()
        out = function(xy)
        results.append((out, *torch.autograd.grad(out.square().sum(), xy)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus(device, dtype):
    dt = torch.tensor([-50.0, -1.0, 0.0, 3.0, 20.0, 21.0, 1e4], device=device).to(DTYPES[dtype])
    expected = torch.where(dt > 20, dt.double(), torch.log1p(torch.exp(dt.double().clamp(max=20))))
    torch.testing.assert_close(softplus(dt).double(), expected, **tolerance(dt.dtype))


@st.composite
def bad_calls(draw):
    """Arguments of `_swiglu_bwd` with everything that it fills."""
    rows, width = draw(st.integers(2, 4)), draw(st.integers(2, 6))
    arguments = {
        "xy": torch.randn(rows, 2 * width),
        "dout": torch.randn(rows, width),
        "dxy": torch.randn(rows, 2 * width),
        "out": torch.randn(rows, width),
    }
    fault = draw(st.sampled_from([*SHAPES, "dtype"]))
    names = ["xy"] if fault == "dtype" else [*arguments]  # what is written may have any dtype
    name = draw(st.sampled_from(names))
    return arguments | {
        name: spoil(draw, arguments[name], fault, dtypes=(torch.int64, torch.complex64))
    }


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    names = ["swiglu: (xy|dout|dxy|out) must"]
    assert_refused(_swiglu_bwd, **arguments, recompute_output=True, names=names, errors=ValueError)
