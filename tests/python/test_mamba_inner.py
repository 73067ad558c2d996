"""mamba_inner_fn and its bidirectional forms: the formula, real gradients, memory, and how callers reach them."""

import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.ops import mamba_inner
from mamba_ssm.ops import selective_scan_interface as interface
from mamba_ssm.ops.causal_conv1d import causal_conv1d_ref
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from torch.utils._python_dispatch import TorchDispatchMode

TENSORS = (
    *("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight"),
    *("out_proj_weight", "out_proj_bias", "A", "A_b", "B", "C", "D", "delta_bias", "B_proj_bias"),
    *("C_proj_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight"),
)
NO_BIAS = {"conv1d_bias": None, "out_proj_bias": None}  # their parameters have no default
BASE = ("conv1d_bias", "out_proj_bias", "D", "delta_bias")


def problem(
    device="cpu",
    dtype=torch.float32,
    batch=2,
    dim=12,
    length=21,
    d_state=4,
    rank=3,
    width=4,
    out=8,
    optional=BASE,
    given=(),
    static=(),
    xz=None,
    complex_a=False,
):
    """Arguments by name. optional: those present; given: B, C not projected; static: those without time."""

    def randn(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(shape, device=device)).to(dtype)

    state = torch.promote_types(dtype, torch.float32)
    a_dtype = torch.promote_types(state, torch.complex64) if complex_a else state
    pairs = 2 if complex_a else 1
    projected = pairs * d_state * (2 - len(given))

    def a_matrix():
        A = -torch.rand(dim, d_state, device=device) - 0.2
        return (A + torch.randn_like(A) * 1j if complex_a else A).to(a_dtype)

    every = {
        "xz": randn(batch, 2 * dim, length) if xz is None else xz(randn, batch, 2 * dim, length),
        "conv1d_weight": randn(dim, 1, width, scale=0.5),
        "conv1d_bias": randn(dim),
        "x_proj_weight": randn(rank + projected, dim, scale=dim**-0.5),
        "delta_proj_weight": randn(dim, rank, scale=rank**-0.5),
        "out_proj_weight": randn(out, dim, scale=dim**-0.5),
        "out_proj_bias": randn(out),
        "A": a_matrix(),
        "A_b": a_matrix(),
        "D": randn(dim, dtype=state),
        "delta_bias": randn(dim, dtype=state) - 1.0,
        "B_proj_bias": randn(pairs * d_state),
        "C_proj_bias": randn(pairs * d_state),
        "b_rms_weight": randn(d_state) + 1.0,
        "c_rms_weight": randn(d_state) + 1.0,
        "dt_rms_weight": randn(dim, scale=0.3) + 1.0,
    }
    for name in given:
        varying = (batch, 2 if len(given) == 2 else 1, d_state, pairs * length)
        fixed = torch.randn(dim, d_state, device=device, dtype=a_dtype)
        every[name] = fixed if name in static else randn(*varying)
    kept = {*TENSORS[:8], *given, *optional} - {*BASE} | {*optional}
    return {name: every[name] for name in TENSORS if name in kept}


# Each row changes one thing of the base.
ROWS = {
    "base": {},
    "length 1": {"length": 1},
    "several checkpoints": {"length": 300},
    "batch 1": {"batch": 1},
    "width 2": {"width": 2},
    "bare": {"optional": ()},
    "given B": {"given": ("B",)},
    "given C": {"given": ("C",)},
    "given B and C": {"given": ("B", "C")},
    "static B": {"given": ("B",), "static": ("B",)},
    "static B and C": {"given": ("B", "C"), "static": ("B", "C")},
    "projection biases": {"optional": (*BASE, "B_proj_bias", "C_proj_bias")},
    "RMS weights": {"optional": (*BASE, "b_rms_weight", "c_rms_weight", "dt_rms_weight")},
    "RMS of a given B": {"given": ("B",), "optional": (*BASE, "b_rms_weight")},
    "channels before batch": {"xz": lambda randn, b, d, n: randn(d, b, n).transpose(0, 1)},
    "channels last": {"xz": lambda randn, b, d, n: randn(b, n, d).transpose(1, 2)},
    "complex A": {"complex_a": True},
    "complex A, given B": {"complex_a": True, "given": ("B",)},
    "complex A, static C": {"complex_a": True, "given": ("C",), "static": ("C",)},
    "complex A, projection biases and RMS weights": {
        "complex_a": True,
        "optional": (*BASE, *TENSORS[13:]),
    },
    "complex A, both directions": {"complex_a": True, "optional": (*BASE, "A_b")},
    "both directions": {"optional": (*BASE, "A_b")},
    "both directions, static C": {
        "optional": (*BASE, "A_b"),
        "given": ("C",),
        "static": ("C",),
    },
}


def formula(**tensors):
    """The definition, written as rows of time: the only reference that knows the RMS weights."""
    t = dict.fromkeys(TENSORS) | tensors

    def norm(x, weight):
        if weight is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    x, z = t["xz"].chunk(2, dim=1)
    u = causal_conv1d_ref(x, t["conv1d_weight"][:, 0], t["conv1d_bias"], activation="silu")
    columns = u.transpose(1, 2) @ t["x_proj_weight"].T
    rank, pairs = t["delta_proj_weight"].shape[1], 2 if t["A"].is_complex() else 1
    width = pairs * t["A"].shape[1]
    delta = norm(columns[..., :rank] @ t["delta_proj_weight"].T, t["dt_rms_weight"])

    def projection(name, columns):
        rows, bias = t[name], t[f"{name}_proj_bias"]
        if rows is None:
            columns = columns if bias is None else columns + bias
            rows = columns.unflatten(-1, (-1, pairs)).transpose(1, 2).flatten(2)  # (B, N, pairs L)
        weight = t[f"{name.lower()}_rms_weight"]
        return rows if weight is None else norm(rows.mT, weight).mT

    def flip(tensor, pairs=1):
        if tensor.dim() == 2:
            return tensor
        return tensor.unflatten(-1, (-1, pairs)).flip(-2).flatten(-2)

    delta = delta.transpose(1, 2)
    B = projection("B", columns[..., rank : rank + width])
    C = projection("C", columns[..., -width:])
    y = scan(t, t["A"], u, delta, B, C, z)
    if t["A_b"] is not None:
        reversed_steps = (flip(u), flip(delta), flip(B, pairs), flip(C, pairs), flip(z))
        y = y + scan(t, t["A_b"], *reversed_steps).flip(-1)
    if t["out_proj_weight"] is None:
        return y
    return F.linear(y.transpose(1, 2), t["out_proj_weight"], t["out_proj_bias"])


def scan(t, A, u, delta, B, C, z):
    return selective_scan_ref(u, delta, A, B, C, t["D"], z, t["delta_bias"], True)


def inner(checkpoint_lvl=1, **tensors):
    arguments = NO_BIAS | tensors
    if "A_b" in tensors:  # takes no level
        return interface.bimamba_inner_fn(**arguments)
    return interface.mamba_inner_fn(**arguments, checkpoint_lvl=checkpoint_lvl)


def results(function, tensors, cotangent=None):
    """The output, then gradients by the tensors' names."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves)
    cotangent = torch.randn_like(out) if cotangent is None else cotangent.to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True)), cotangent


def in_float64(tensors):
    """On the CPU, for a reference."""
    double = {True: torch.complex128, False: torch.float64}
    return {name: t.cpu().to(double[t.is_complex()]) for name, t in tensors.items()}


def assert_near(got, expected, bound):
    """The largest error of each, over its largest value."""
    for name, value in expected.items():
        error = (got[name].cpu() - value).abs().max().item()  # in the wider of the two dtypes
        allowed = bound * value.abs().max().item()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("level", [0, 1])
def test_output_and_gradients_are_the_formulas(level, row):
    tensors = problem(dtype=torch.float64, **ROWS[row])
    got, cotangent = results(lambda **t: inner(level, **t), tensors)
    expected, _ = results(formula, tensors, cotangent)
    assert_near(got, expected, 1e-10)


@pytest.mark.parametrize("row", ROWS)
def test_references_are_the_formula(row):
    tensors = problem(dtype=torch.float64, **ROWS[row])
    if any(name.endswith("rms_weight") for name in tensors):
        pytest.skip("upstream's references take no RMS weights")
    reference = interface.bimamba_inner_ref if "A_b" in tensors else interface.mamba_inner_ref
    torch.testing.assert_close(reference(**(NO_BIAS | tensors)), formula(**tensors))


@pytest.mark.parametrize("row", [row for row in ROWS if row != "several checkpoints"])
def test_gradcheck(row):
    sizes = {"batch": 1, "dim": 4, "length": 4, "d_state": 2, "rank": 2, "out": 3}
    tensors = problem(dtype=torch.float64, **(sizes | ROWS[row]))
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *values: inner(**dict(zip(tensors, values, strict=True))), leaves
    )


# float16 and bfloat16 round u, delta, B and C on the way, as every implementation must that keeps them.
BOUNDS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("row", ["base", "RMS weights", "both directions"])
def test_dtypes_against_float64(device, row, dtype):
    tensors = problem(device, dtype, length=130, **ROWS[row])
    got, cotangent = results(inner, tensors)
    wide = in_float64(tensors)
    expected, _ = results(formula, wide, cotangent.cpu())
    assert all(got[name].dtype == t.dtype for name, t in tensors.items())
    assert_near(got, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [row for row in ROWS if "both" not in row])
def test_checkpoint_levels_are_bit_equal(row, dtype):
    tensors = problem(dtype=dtype, **ROWS[row])
    kept, cotangent = results(lambda **t: inner(0, **t), tensors)
    again, _ = results(lambda **t: inner(1, **t), tensors, cotangent)
    for name, value in kept.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("is_variable_C", [False, True])
@pytest.mark.parametrize("is_variable_B", [False, True])
@pytest.mark.parametrize("complex_a", [False, True])
def test_mamba_inner_fn(device, complex_a, is_variable_B, is_variable_C):
    """Upstream's test of that name, with the gradients that it leaves out."""
    given = tuple(n for n, v in (("B", is_variable_B), ("C", is_variable_C)) if not v)
    sizes = {"dim": 768, "length": 128, "d_state": 8, "rank": 48, "width": 3, "out": 384}
    tensors = problem(device, given=given, static=given, complex_a=complex_a, **sizes)
    got, cotangent = results(inner, tensors)
    wide = in_float64(tensors)
    expected, _ = results(interface.mamba_inner_ref, wide, cotangent.cpu())
    assert_near(got, expected, 2e-5)


def test_no_out_proj_is_the_rest(device):
    tensors = problem(device)
    del tensors["out_proj_weight"], tensors["out_proj_bias"]
    got, cotangent = results(interface.mamba_inner_fn_no_out_proj, tensors)
    wide = in_float64(tensors)
    expected, _ = results(formula, wide, cotangent.cpu())
    assert got["out"].shape == (2, 12, 21)
    assert_near(got, expected, 2e-5)


@pytest.mark.parametrize("level", [0, 1])
def test_autocast(device, level):
    tensors = problem(device, optional=(*BASE, "B_proj_bias", "C_proj_bias"))
    whole, cotangent = results(lambda **t: inner(level, **t), tensors)

    def cast(**leaves):
        with torch.autocast(device, dtype=torch.bfloat16):
            return inner(level, **leaves)

    got, _ = results(cast, tensors, cotangent)
    assert got["out"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in tensors)
    assert_near(got, {name: value.cpu() for name, value in whole.items()}, 8e-2)


def test_backward_under_autocast_is_that_of_the_forward_pass(device):
    tensors = problem(device)
    expected, cotangent = results(inner, tensors)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = inner(**leaves)
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, expected[name])


def test_half_precision_with_float32_parameters_as_transformers_passes_them(device):
    tensors = problem(device, torch.bfloat16)
    mixed = tensors | {"out_proj_bias": tensors["out_proj_bias"].float()}
    assert torch.equal(inner(**mixed), inner(**tensors))


@pytest.mark.parametrize("wanted", TENSORS[:8])
def test_one_gradient_alone_is_that_of_all(wanted):
    tensors = problem()
    expected, cotangent = results(inner, tensors)
    leaf = tensors[wanted].detach().requires_grad_()
    (grad,) = torch.autograd.grad(inner(**(tensors | {wanted: leaf})), leaf, cotangent)
    assert torch.equal(grad, expected[wanted])


def test_backward_twice():
    tensors = {name: t.requires_grad_() for name, t in problem().items()}
    out = inner(**tensors).sum()
    first, second = (
        torch.autograd.grad(out, list(tensors.values()), retain_graph=keep)
        for keep in (True, False)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}], ids=["length", "batch"])
def test_empty(device, size):
    tensors = problem(device, **size)
    got, _ = results(inner, tensors)
    assert got["out"].numel() == 0
    assert all(got[name].shape == t.shape and not got[name].any() for name, t in tensors.items())


@pytest.mark.parametrize("row", ["base", "RMS weights", "both directions"])
def test_compiles_to_one_graph(device, row):
    tensors = problem(device, **ROWS[row])
    expected, cotangent = results(inner, tensors)
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    got, _ = results(compiled, tensors, cotangent)
    torch.testing.assert_close(got, expected)


class Storages(TorchDispatchMode):
    """Bytes of the storages that live beside those of `given`; the most at once is `peak`."""

    def __init__(self, given):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or size == 0:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def memory_formulas(tensors):
    """Bytes beside xz: ours between the passes, and the least that upstream holds at once.

    In tensors of u's size both keep y. Upstream's backward pass adds u, delta, dxz (2), dy, du, ddelta and out_z;
    it also keeps the rows of x_proj u, B, C, and 2N float32 for 2048 steps of a channel. Ours are N for 256.
    Parameters have gradients in both.
    """
    xz, A = tensors["xz"], tensors["A"]
    batch, channels, length = xz.shape
    states = 4 * batch * A.numel()
    large = xz.nbytes // 2
    columns = tensors["x_proj_weight"].shape[0] + 2 * A.shape[1]
    small = batch * length * columns * xz.element_size()
    kept = large + states * -(-length // 256)
    gradients = sum(tensor.nbytes for name, tensor in tensors.items() if name != "xz")
    return kept, 9 * large + small + states * 2 * -(-length // 2048) + gradients


def requested_bytes(which):
    """Of the GPU's memory. What is allocated for them depends on the blocks that are free."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "dim": 256, "length": 1024, "d_state": 16, "rank": 8, "out": 128},
        {"batch": 1, "dim": 1536, "length": 512, "d_state": 16, "rank": 48, "out": 768},
        {"batch": 16, "dim": 128, "length": 64, "d_state": 16, "rank": 4, "out": 64},
    ],
    ids=["base", "batch 1", "short"],
)
def test_memory_at_level_1_is_within_upstreams(device, sizes, dtype):
    tensors = {n: t.requires_grad_() for n, t in problem(device, dtype, **sizes).items()}
    cotangent = torch.randn(sizes["batch"], sizes["length"], sizes["out"], device=device).to(dtype)
    kept_formula, upstreams_peak = memory_formulas(tensors)
    leaves = list(tensors.values())
    if device == "cuda":
        torch.autograd.grad(inner(**tensors), leaves, cotangent)  # cuBLAS keeps a workspace
        before = requested_bytes("current")
        torch.cuda.reset_peak_memory_stats()
        out = inner(**tensors)
        kept = requested_bytes("current") - before - out.nbytes
        torch.autograd.grad(out, leaves, cotangent)
        peak = requested_bytes("peak") - before - out.nbytes
    else:
        with Storages([*leaves, cotangent]) as storages:
            out = inner(**tensors)
            kept = storages.bytes - out.nbytes
            torch.autograd.grad(out, leaves, cotangent)
            peak = storages.peak - out.nbytes
    print(
        f"kept {kept / kept_formula:.4f} of the formula, peak {peak / upstreams_peak:.3f} of upstream's"
    )
    assert kept <= kept_formula * 1.01
    assert peak <= upstreams_peak


WRONG = {
    "xz": (2, 23, 21),
    "conv1d_weight": (12, 4),
    "conv1d_bias": (13,),
    "x_proj_weight": (10, 12),
    "delta_proj_weight": (11, 3),
    "out_proj_weight": (8, 13),
    "out_proj_bias": (7,),
    "A": (12,),
    "A_b": (12, 5),
    "B": (3, 2, 4, 21),
    "C": (2, 2, 5, 21),
    "D": (11,),
    "delta_bias": (13,),
    "B_proj_bias": (5,),
    "C_proj_bias": (5,),
    "b_rms_weight": (5,),
    "c_rms_weight": (5,),
    "dt_rms_weight": (11,),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_shape_is_refused_by_name_and_changes_nothing(device, name):
    optional = (
        *BASE,
        *(() if name == "A_b" else TENSORS[13:]),
        *(n for n in (name,) if n == "A_b"),
    )
    tensors = problem(device, optional=optional, given=(name,) if name in "BC" else ())
    tensors[name] = torch.randn(WRONG[name], device=device)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(RuntimeError, match=rf"\b{name}\b.*must"):
        inner(**tensors)
    assert all(torch.equal(tensors[n], t) for n, t in before.items())


def test_rms_of_a_static_projection_is_refused_by_name():
    tensors = problem(given=("B",), static=("B",), optional=(*BASE, "b_rms_weight"))
    with pytest.raises(RuntimeError, match="b_rms_weight needs a B that varies with time"):
        inner(**tensors)


def test_checkpoint_level_is_0_or_1():
    with pytest.raises(AssertionError, match="checkpoint_lvl"):
        inner(2, **problem())


def test_signatures_are_upstreams():
    first = "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight"
    out = "out_proj_weight, out_proj_bias"
    rest = (
        "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
        "delta_softplus=True"
    )
    rms = (
        "checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
        "b_c_dt_rms_eps=1e-06"
    )
    expected = {
        "mamba_inner_fn": f"({first}, {out}, A, {rest}, {rms})",
        "mamba_inner_ref": f"({first}, {out}, A, {rest})",
        "mamba_inner_fn_no_out_proj": f"({first}, A, {rest})",
        "bimamba_inner_fn": f"({first}, {out}, A, A_b, {rest})",
        "bimamba_inner_ref": f"({first}, {out}, A, A_b, {rest})",
        "rms_norm_forward": "(x, weight, bias, eps=1e-06, is_rms_norm=True)",
    }
    assert {name: str(inspect.signature(getattr(interface, name))) for name in expected} == expected


def test_rms_norm_forward(device):
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((6, 16), (16,), (16,)))
    scaled = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    torch.testing.assert_close(interface.rms_norm_forward(x, weight, None, eps=1e-3), scaled)
    torch.testing.assert_close(
        interface.rms_norm_forward(x, weight, bias, is_rms_norm=False),
        F.layer_norm(x, (16,), weight, bias, 1e-6),
    )


def test_names_that_callers_import():
    import mamba_ssm
    import selective_scan_cuda

    assert mamba_ssm.mamba_inner_fn is mamba_ssm.falcon_mamba_inner_fn
    assert mamba_ssm.mamba_inner_fn is interface.mamba_inner_fn is mamba_inner.mamba_inner_fn
    assert issubclass(interface.MambaInnerFn, torch.autograd.Function)
    assert interface.selective_scan_cuda is selective_scan_cuda
    assert interface.causal_conv1d_fn.__name__ == "causal_conv1d_fn"
    assert {"mamba_inner_fn", "selective_scan_fn", "causal_conv1d_fwd_function"} <= {
        *dir(interface)
    }
    with pytest.raises(AttributeError, match="mamba_outer_fn"):
        _ = interface.mamba_outer_fn


def test_what_is_not_installed_is_none(monkeypatch):
    import sys

    names = ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function")
    for module in ("causal_conv1d", "causal_conv1d.cpp_functions", "causal_conv1d_cuda"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    for name in (*names, "causal_conv1d_update_function", "causal_conv1d_cuda"):
        assert getattr(interface, name) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("model", ["Mamba", "FalconMamba"])
def test_transformers_trains_through_it(monkeypatch, device, model, bias):
    """Its fused path, with ours and with the formula in our place: loss and every gradient."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{model}Config")(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2, use_bias=bias
    )
    net = getattr(transformers, f"{model}ForCausalLM")(config).train().to(device)
    module = inspect.getmodule(type(net))
    tokens = torch.randint(0, 32, (2, 19), device=device)
    calls = []

    def formula_by_position(*args, delta_softplus, b_c_dt_rms_eps=None, **rest):
        calls.append(args)
        names = list(inspect.signature(interface.mamba_inner_fn).parameters)
        arguments = dict(zip(names, args, strict=False)) | rest
        return formula(**{n: t for n, t in arguments.items() if t is not None})

    outcomes = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(module, "mamba_inner_fn", formula_by_position)
        loss = net(tokens, labels=tokens).loss
        outcomes.append((loss, *torch.autograd.grad(loss, list(net.parameters()))))
    assert len(calls) == 2
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
