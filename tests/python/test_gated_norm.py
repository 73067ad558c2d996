"""layernorm_gated's functions against the reference in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from bad_calls import ERRORS, NO_FLOATS, assert_refused, spoil, thousand_examples
from compare import DTYPES, judge
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.native import ops
from mamba_ssm.ops.triton.layernorm_gated import (
    LayerNorm,
    RMSNorm,
    _layer_norm_bwd,
    _layer_norm_fwd,
    layernorm_fn,
    rms_norm_ref,
    rmsnorm_fn,
)


def layer_norm_ref(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """`layernorm_fn` from torch's own norm."""
    gate = 1 if z is None else F.silu(z)
    x = x if norm_before_gate else x * gate
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = F.layer_norm(groups, groups.shape[-1:], eps=eps).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * gate if norm_before_gate else y


FUNCTIONS = {"layer": (layernorm_fn, layer_norm_ref), "rms": (rmsnorm_fn, rms_norm_ref)}
NORMS = pytest.mark.parametrize("norm", FUNCTIONS)
ORDERS = pytest.mark.parametrize(
    "norm_before_gate", [True, False], ids=["norm first", "gate first"]
)


def problem(
    device="cpu",
    dtype=torch.float32,
    shape=(2, 5, 96),
    bias=True,
    gate=True,
    weight_dtype=None,
    z_dtype=None,
    strided=False,
):
    weight_dtype = weight_dtype or torch.promote_types(dtype, torch.float32)

    def rows(dtype):
        width = 2 * shape[-1] if strided else shape[-1]
        return torch.randn(*shape[:-1], width, device=device).to(dtype)[..., : shape[-1]]

    def columns():
        return torch.randn(shape[-1], device=device).to(weight_dtype)

    return {
        "x": rows(dtype),
        "weight": columns(),
        "bias": columns() if bias else None,
        "z": rows(z_dtype or dtype) if gate else None,
    }


def leaves_of(tensors):
    return {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None}


ROWS = {  # name: (options of the problem, group_size)
    "base": ({}, None),
    "groups": ({}, 32),
    "one row": ({"shape": (96,)}, 48),
    "groups of an odd width": ({"shape": (3, 45)}, 15),
    "wide rows": ({"shape": (4, 4100)}, None),
    "many groups": ({"shape": (700, 24)}, 3),
    "no bias": ({"bias": False}, 32),
    "no gate": ({"gate": False}, 32),
    "weights in the same dtype": ({"weight_dtype": torch.bfloat16}, 32),
    "gate in float32": ({"z_dtype": torch.float32}, 32),
    "strided rows": ({"strided": True}, 32),
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")]
CASES += [("groups", "f16"), ("groups", "f64")]
CASES.remove(("weights in the same dtype", "f32"))
CASES.remove(("gate in float32", "f32"))


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@NORMS
@ORDERS
def test_outputs_and_gradients(device, row, dtype, norm, norm_before_gate):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    function, reference = FUNCTIONS[norm]
    options, group_size = ROWS[row]
    given = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    judge(
        "gated_norm",
        dtype,
        lambda **t: (function(**t, **given),),
        lambda **t: (reference(**t, **given),),
        problem(device, DTYPES[dtype], **options),
    )


@pytest.mark.parametrize("width", [2048, 4096])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@NORMS
@ORDERS
def test_upstreams_row(device, width, group_size, bias, gate, norm, norm_before_gate):
    """Twice the error of plain torch in float16, and 8e-3."""
    function, reference = FUNCTIONS[norm]
    tensors = problem(device, torch.float16, (2, 30, width), bias, gate)
    given = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    cotangent = torch.randn_like(tensors["x"])

    def run(function, dtype=None):
        leaves = leaves_of({k: t if t is None else t.to(dtype) for k, t in tensors.items()})
        out = function(**{"bias": None, "z": None} | leaves, **given)
        return out, *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))

    def plain(**t):
        return reference(**t, **({"upcast": False} if norm == "rms" else {}))

    results = (run(function), run(plain, torch.float16), run(reference, torch.float32))
    for got, half, truth in zip(*results, strict=True):
        error, allowed = ((t.float() - truth).abs().max().item() for t in (got, half))
        assert error <= 2 * allowed + 8e-3


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize("gate", [True, False])
@NORMS
@ORDERS
def test_gradcheck(route, gate, norm, norm_before_gate):
    tensors = problem(dtype=torch.float64, shape=(3, 6), gate=gate, bias=norm == "layer")
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        given = tensors | dict(zip(names, values, strict=True))
        if route == "eager":
            return FUNCTIONS[norm][0](**given, group_size=3, norm_before_gate=norm_before_gate)
        options = (1e-6, 3, norm_before_gate, norm == "rms")
        y, *_ = ops.gated_norm_forward(*given.values(), *options)
        return y

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_reference_by_hand():
    x, weight = torch.tensor([[3.0, -3.0, 5.0, 5.0]]), torch.tensor([2.0, 1.0, 1.0, 1.0])
    z = torch.tensor([[0.0, 3.0, 3.0, 3.0]]).log()  # silu(ln 3) = 3/4 ln 3, silu(-inf) = NaN
    z[0, 0] = 0.0
    gate = 0.75 * z[0, 1]
    expected = torch.tensor([[2.0, -1.0, 1.0, 1.0]])
    given = {"eps": 0.0, "group_size": 2}
    torch.testing.assert_close(rms_norm_ref(x, weight, None, **given), expected)
    gated = expected * gate
    gated[0, 0] = 0.0
    torch.testing.assert_close(rms_norm_ref(x, weight, None, z, **given), gated)
    first = torch.tensor([[0.0, -(2.0**0.5), 1.0, 1.0]])
    torch.testing.assert_close(
        rms_norm_ref(x, weight, None, z, **given, norm_before_gate=False), first
    )


def test_reference_keeps_dtypes_without_upcast():
    x = torch.full((1, 2), 300.0, dtype=torch.float16)  # whose square overflows
    weight = torch.ones(2, dtype=torch.float16)
    torch.testing.assert_close(rms_norm_ref(x, weight, None), torch.ones_like(x))
    assert not rms_norm_ref(x, weight, None, upcast=False).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_results(device, dtype):
    tensors = leaves_of(
        problem(device, dtype, z_dtype=torch.float32, weight_dtype=torch.bfloat16)
        | {"bias": torch.randn(96, device=device)}
    )
    out = layernorm_fn(**tensors)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(t.grad.dtype == t.dtype and t.grad.shape == t.shape for t in tensors.values())


@NORMS
def test_empty(device, norm):
    tensors = leaves_of(problem(device, shape=(0, 8)))
    out = FUNCTIONS[norm][0](**tensors, group_size=4)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert not tensors["weight"].grad.any() and tensors["x"].grad.shape == (0, 8)


def test_expanded_and_sliced_inputs(device):
    tensors = problem(device)
    for name, tensor in tensors.items():
        wide = torch.cat([tensor, tensor], dim=-1)
        views = [tensor[..., :1].expand(tensor.shape), wide[..., 1 : 1 + tensor.shape[-1]]]
        if tensor.dim() > 1:
            views += [tensor[:1].expand(tensor.shape), tensor.transpose(0, 1).contiguous().mT.mT]
        for view in views:
            if view.shape != tensor.shape:
                view = view.transpose(0, 1)
            results = []
            for value in (view, view.contiguous()):
                leaves = leaves_of(tensors | {name: value})
                out = layernorm_fn(**leaves, group_size=32)
                results.append((out, *torch.autograd.grad(out.sum(), list(leaves.values()))))
            for got, wanted in zip(*results, strict=True):
                torch.testing.assert_close(got, wanted, msg=name)


@pytest.mark.parametrize("width", [16384, 40000])
def test_rows_of_64_kilobytes_and_more(device, width):
    tensors = problem(device, shape=(3, width))
    torch.testing.assert_close(rmsnorm_fn(**tensors), rms_norm_ref(**tensors), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    with context():
        assert not rmsnorm_fn(**leaves_of(problem(device))).requires_grad


def test_autocast_takes_dtypes_as_given(device):
    tensors = problem(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = rmsnorm_fn(**tensors)
    assert torch.equal(out, rmsnorm_fn(**tensors))


def test_checkpointing(device):
    leaves = leaves_of(problem(device))
    out = torch.utils.checkpoint.checkpoint(
        lambda x: rmsnorm_fn(**leaves | {"x": x}), leaves["x"], use_reentrant=False
    )
    plain = rmsnorm_fn(**leaves)
    for got, wanted in zip(
        torch.autograd.grad(out.sum(), list(leaves.values())),
        torch.autograd.grad(plain.sum(), list(leaves.values())),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@NORMS
@ORDERS
def test_compiles_to_one_graph(device, norm, norm_before_gate):
    leaves = leaves_of(problem(device))
    function = FUNCTIONS[norm][0]
    results = []
    for candidate in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = candidate(**leaves, group_size=32, norm_before_gate=norm_before_gate)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    "module, reference", [(LayerNorm, layer_norm_ref), (RMSNorm, rms_norm_ref)]
)
@ORDERS
def test_modules(device, module, reference, norm_before_gate):
    norm = module(96, 1e-3, 32, norm_before_gate, device=device, dtype=torch.float32)
    names = ["weight", "bias"] if module is LayerNorm else ["weight"]
    assert list(norm.state_dict()) == names and (norm.bias is None) == (module is RMSNorm)
    assert norm.weight.eq(1).all() and (norm.bias is None or not norm.bias.any())
    assert (norm.eps, norm.group_size, norm.norm_before_gate) == (1e-3, 32, norm_before_gate)
    x, _, _, z = problem(device).values()
    for gate in (z, None):
        expected = reference(x, norm.weight, norm.bias, gate, 1e-3, 32, norm_before_gate)
        torch.testing.assert_close(norm(x, gate), expected, rtol=1e-4, atol=1e-5)


def test_modules_defaults():
    for module in (LayerNorm, RMSNorm):
        norm = module(8)
        assert (norm.eps, norm.group_size, norm.norm_before_gate) == (1e-5, None, True)
    assert not isinstance(norm, LayerNorm)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@NORMS
@ORDERS
def test_private_forward_and_backward_are_the_functions(device, gate, bias, norm, norm_before_gate):
    tensors = problem(device, shape=(6, 32), gate=gate, bias=bias)
    leaves = leaves_of(tensors)
    function, options = FUNCTIONS[norm][0], {"group_size": 8, "norm_before_gate": norm_before_gate}
    expected = function(**tensors | leaves, **options)
    options["is_rms_norm"] = norm == "rms"
    z = tensors.pop("z")
    out, mean, rstd = _layer_norm_fwd(**tensors, eps=1e-6, z=z, **options)
    assert torch.equal(out, expected) and (mean is None) == (norm == "rms")
    groups = tensors["x"].unflatten(-1, (4, 8))
    if norm == "layer" and (norm_before_gate or not gate):  # group by group
        torch.testing.assert_close(mean.view(4, 6), groups.mean(-1).t())
    assert rstd.shape == (24,) and rstd.dtype == torch.float32

    cotangent = torch.randn_like(out)
    wanted = dict(
        zip(leaves, torch.autograd.grad(expected, list(leaves.values()), cotangent), strict=True)
    )
    arguments = (cotangent, *tensors.values(), 1e-6, mean, rstd)
    dx, dweight, dbias, dz = _layer_norm_bwd(*arguments, z=z, **options)
    *_, again = _layer_norm_bwd(*arguments, z=z, **options, recompute_output=True)
    got = {"x": dx, "weight": dweight, "bias": dbias, "z": dz}
    for name, gradient in got.items():
        assert (gradient is None) == (name not in wanted)
        assert gradient is None or torch.equal(gradient, wanted[name]), name
    torch.testing.assert_close(again, out)


def test_private_functions_fill_what_is_given(device):
    x, weight, _, z = problem(device, shape=(6, 32)).values()
    wide = torch.zeros(3, 6, 64, device=device)
    out, dz, again = wide[..., ::2]
    got, _, rstd = _layer_norm_fwd(x, weight, None, 1e-6, z, out=out, is_rms_norm=True)
    arguments = (torch.randn_like(x), x, weight, None, 1e-6, None, rstd, z)
    *_, filled, repeated = _layer_norm_bwd(
        *arguments, is_rms_norm=True, recompute_output=True, dz=dz, out=again
    )
    assert got is out and filled is dz and repeated is again
    assert torch.equal(out, rmsnorm_fn(x, weight, None, z))
    assert torch.equal(dz, _layer_norm_bwd(*arguments, is_rms_norm=True)[-1])
    torch.testing.assert_close(again, out)
    assert not wide[..., 1::2].any()
    for name in ("dz", "out"):
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            _layer_norm_bwd(*arguments, is_rms_norm=True, **{name: wide[0]})


@pytest.mark.gpu
@NORMS
@ORDERS
def test_devices_agree(norm, norm_before_gate):
    tensors = problem(shape=(300, 512))
    results = []
    for device in ("cpu", "cuda"):
        leaves = leaves_of({k: t.to(device) for k, t in tensors.items()})
        out = FUNCTIONS[norm][0](**leaves, group_size=128, norm_before_gate=norm_before_gate)
        gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        results.append([t.cpu() for t in (out, *gradients)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_cuda_gradients_are_the_same_in_every_run():
    leaves = leaves_of(problem("cuda", torch.bfloat16, (5000, 1024)))
    runs = [
        torch.autograd.grad(rmsnorm_fn(**leaves, group_size=256).sum(), list(leaves.values()))
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("group_size", [0, -4, 5, 64])
def test_private_functions_refuse_other_groups(group_size):
    x, weight, _, z = problem(shape=(6, 32)).values()
    rstd = torch.ones(6)
    with pytest.raises(RuntimeError, match="group_size must divide the 32 features of x"):
        _layer_norm_fwd(x, weight, None, 1e-6, z, group_size=group_size, is_rms_norm=True)
    with pytest.raises(RuntimeError, match="group_size must divide the 32 features of x"):
        _layer_norm_bwd(x, x, weight, None, 1e-6, None, rstd, z, group_size, is_rms_norm=True)


# ---- generated bad calls ----

NAMES = ("x", "weight", "bias", "z", "group_size")


@st.composite
def bad_calls(draw):
    groups, width = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    arguments = problem(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        shape=(draw(st.integers(2, 4)), groups * width),
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
    )
    arguments |= {
        "group_size": width,
        "norm_before_gate": draw(st.booleans()),
        "is_rms_norm": draw(st.booleans()),
    }
    fault = draw(
        st.sampled_from(["longer", "shorter", "deeper", "flat", "dtype", "meta", "absent", "width"])
    )
    if fault == "width":
        features = groups * width
        unfit = st.integers(-3, 3 * features).filter(lambda w: w <= 0 or features % w)
        return arguments | {"group_size": draw(unfit)}
    if fault == "absent":
        return arguments | {draw(st.sampled_from(["x", "weight"])): None}
    name = draw(st.sampled_from([n for n in NAMES[:4] if arguments[n] is not None]))
    if name == "x" and fault in ("longer", "shorter") and arguments["z"] is None:
        fault = "dtype"  # other rows are as good
    tensor = spoil(draw, arguments[name], fault, dtypes=(*NO_FLOATS, torch.float64))
    return arguments | {name: tensor}


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    names = (*NAMES, "NoneType", "tensors")
    assert_refused(layernorm_fn, **arguments, names=names, errors=(*ERRORS, AttributeError))
