"""The raw module causal_conv1d_cuda in every version's arguments, and the functions and operators above it."""

import gc
import importlib

import causal_conv1d_cuda
import pytest
import torch
from bad_calls import (
    FAULTS,
    NO_FLOATS,
    NO_INDICES,
    assert_refused,
    spoil,
    thousand_examples,
)
from causal_conv1d import causal_conv1d_fn, cpp_functions
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update
from compare import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops import selective_scan_interface
from test_causal_conv1d import decode_problem, packed, problem

HALVES = [torch.float32, torch.float16, torch.bfloat16]


def complete(device="cpu", dtype=torch.float32, kind="states", weight_dtype=None, **sizes):
    """Everything that any version of the three functions takes, by name."""
    initial = kind == "states"
    tensors = problem(device, dtype, weight_dtype, **sizes, initial=initial)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    batch, dim, length = x.shape
    states = (batch, weight.shape[1] - 1, dim)

    def randn(*shape, like=x):
        return torch.randn(shape, device=device).to(like.dtype)

    sums = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32))
    return tensors | {
        "seq_idx": packed(batch, length, 3, device) if kind == "packed" else None,
        "final_states_out": randn(*states).transpose(1, 2) if initial else None,
        "out": randn(batch, length, dim).transpose(1, 2),
        "dout": randn(batch, dim, length),
        "dfinal_states": randn(*states).transpose(1, 2) if initial else None,
        "dx": randn(batch, 2 * dim, length)[:, dim:],
        "dweight": randn(*weight.shape, like=sums),
        "dbias": None if bias is None else randn(dim, like=sums),
        "dinitial_states": randn(*states).transpose(1, 2) if initial else None,
        "return_dinitial_states": initial,
        "silu": True,
    }


def assert_near(got, expected):
    """Sums of gradients differ by their order from one call to the next on a GPU."""
    half = expected.dtype in (torch.float16, torch.bfloat16)
    tolerance = {} if half else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **tolerance)


def call(forms, function, count, arguments, **others):
    """function with the arguments of the version that takes `count`."""
    arguments = arguments | others
    return function(*(arguments[name] for name in forms[count].split()))


def fwd(count, arguments, **others):
    return call(
        causal_conv1d_cuda._FWD, causal_conv1d_cuda.causal_conv1d_fwd, count, arguments, **others
    )


def bwd(count, arguments, **others):
    return call(
        causal_conv1d_cuda._BWD, causal_conv1d_cuda.causal_conv1d_bwd, count, arguments, **others
    )


def update(count, arguments, **others):
    return call(
        causal_conv1d_cuda._UPDATE,
        causal_conv1d_cuda.causal_conv1d_update,
        count,
        arguments,
        **others,
    )


def expected_gradients(arguments, silu=True):
    """Those of causal_conv1d_fn: {"x": ..., "weight": ..., ...}, and (out, final_states)."""
    names = [n for n in ("x", "weight", "bias", "initial_states") if arguments[n] is not None]
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    states = arguments["initial_states"] is not None
    results = causal_conv1d_fn(
        **leaves,
        seq_idx=arguments["seq_idx"],
        return_final_states=states,
        activation="silu" if silu else None,
    )
    results = results if states else (results,)
    cotangents = [arguments["dout"], arguments["dfinal_states"]][: len(results)]
    grads = torch.autograd.grad(results, [*leaves.values()], cotangents)
    return dict(zip(names, grads, strict=True)), [r.detach() for r in results]


VERSIONS = {"plain": (4, 6), "packed": (5, 7), "states": (7, 10), "filled": (8, 12)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_the_function(device, version, dtype, bias, silu):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    forward_count, backward_count = VERSIONS[version]
    kind = "states" if version == "filled" else version
    arguments = complete(device, DTYPES[dtype], kind, bias=bias, length=40) | {"silu": silu}
    wanted, results = expected_gradients(arguments, silu)
    got = fwd(forward_count, arguments)
    if version == "filled":
        assert got is None
        got = arguments["out"]
    assert torch.equal(got, results[0])
    if kind == "states":
        assert torch.equal(arguments["final_states_out"], results[1])
    grads = bwd(backward_count, arguments)
    if version == "filled":
        assert grads is None
        grads = [arguments[name] for name in ("dx", "dweight", "dbias", "dinitial_states")]
    else:
        assert isinstance(grads, list) and len(grads) == (4 if kind == "states" else 3)
        assert grads[0] is arguments["dx"]
    for name, gradient in zip(("x", "weight", "bias", "initial_states"), grads, strict=False):
        assert (gradient is None) == (name not in wanted)
        if gradient is not None:
            assert_near(gradient.to(wanted[name].dtype), wanted[name])


@pytest.mark.parametrize("count", [6, 7, 10])
def test_gradients_that_nobody_gave_room_for(device, count):
    arguments = complete(device, kind="plain", bias=False)
    dx, dweight, dbias, *dinitial = bwd(count, arguments, dx=None)
    wanted, _ = expected_gradients(arguments)
    assert_near(dx, wanted["x"])
    assert_near(dweight, wanted["weight"])
    assert dbias is None and dinitial == [None] * (count == 10)


@pytest.mark.parametrize("x_dtype", HALVES, ids=str)
@pytest.mark.parametrize("weight_dtype", HALVES, ids=str)
def test_filled_sums_are_float32_and_not_rounded(device, x_dtype, weight_dtype):
    """Results have weight's dtype; what they were rounded from is what arguments receive."""
    arguments = complete(device, x_dtype, "plain", weight_dtype=weight_dtype, length=33)
    _, dweight, dbias = bwd(6, arguments)
    bwd(12, arguments)
    assert dweight.dtype == dbias.dtype == weight_dtype
    assert_near(arguments["dweight"].to(weight_dtype), dweight)
    assert_near(arguments["dbias"].to(weight_dtype), dbias)
    truth = arguments | {
        name: arguments[name].cpu().double() for name in ("x", "weight", "bias", "dout")
    }
    truth["dx"] = None
    _, dweight, dbias = bwd(6, truth)
    assert_near(arguments["dweight"].cpu().double(), dweight)
    assert_near(arguments["dbias"].cpu().double(), dbias)


@pytest.mark.parametrize("count", [10, 12])
def test_gradient_of_absent_initial_states_is_that_of_zeros(device, count):
    arguments = complete(device) | {"initial_states": None}
    zeros = arguments | {"initial_states": torch.zeros(2, 64, 3, device=device)}
    wanted, _ = expected_gradients(zeros)
    grads = bwd(count, arguments)
    got = grads[3] if count == 10 else arguments["dinitial_states"]
    assert_near(got, wanted["initial_states"])


def test_a_gradient_nobody_wants_is_none(device):
    *_, dinitial_states = bwd(10, complete(device), return_dinitial_states=False)
    assert dinitial_states is None
    assert bwd(12, complete(device), dinitial_states=None) is None


def test_halves_of_larger_tensors_are_filled(device):
    """As MambaInnerFn of upstream does with dxz; what lies around them stays."""
    arguments = complete(device)
    dxz = torch.full((2, 128, 151), 7.0, device=device)
    outs = torch.full((2, 151, 129), 7.0, device=device)
    dx, out = dxz[:, :64], outs[..., 1::2].transpose(1, 2)
    given, *_ = bwd(10, arguments, dx=dx)
    fwd(8, arguments, out=out)
    wanted, results = expected_gradients(arguments)
    assert given is dx and (dxz[:, 64:] == 7.0).all() and (outs[..., ::2] == 7.0).all()
    assert_near(dx, wanted["x"])
    assert torch.equal(out, results[0])


def test_a_result_may_take_the_place_of_an_input(device):
    arguments = complete(device)
    wanted, results = expected_gradients(arguments)
    x = arguments["x"].clone()
    dout = arguments["dout"].clone()
    bwd(12, arguments, dout=dout, dx=dout)
    fwd(8, arguments, x=x, out=x, final_states_out=arguments["initial_states"])
    assert_near(dout, wanted["x"])
    assert torch.equal(x, results[0]) and torch.equal(arguments["initial_states"], results[1])


@pytest.mark.parametrize("indexed, circular", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_update(device, dtype, tokens, indexed, circular):
    tensors = decode_problem(device, dtype, tokens=tokens or 1)
    if tokens is None:
        tensors["x"] = tensors["x"].squeeze(-1)
    indices = torch.tensor([4, -1, 0, 1, 2], dtype=torch.int32, device=device)
    seqlens = torch.tensor([0, 1, 3, 30, 7], dtype=torch.int32, device=device)
    options = {
        "cache_seqlens": seqlens if circular else None,
        "conv_state_indices": indices if indexed else None,
    }
    wanted = tensors | {"conv_state": tensors["conv_state"].clone()}
    expected = causal_conv1d_update(**wanted, **options, activation="silu")
    counts = [7, 8] if indexed else [6, 7, 8] if circular else [5, 6, 7, 8]
    for count in counts:
        arguments = tensors | options | {"silu": True, "out": torch.randn_like(tensors["x"])}
        arguments["conv_state"] = tensors["conv_state"].clone()
        out = update(count, arguments)
        assert (out is None) == (count == 8)
        assert torch.equal(arguments["out"] if out is None else out, expected)
        assert torch.equal(arguments["conv_state"], wanted["conv_state"])


@pytest.mark.parametrize(
    "function, counts",
    [
        ("causal_conv1d_fwd", "4, 5, 7 or 8"),
        ("causal_conv1d_bwd", "6, 7, 10 or 12"),
        ("causal_conv1d_update", "5, 6, 7 or 8"),
    ],
)
def test_other_argument_counts_name_those_that_are_accepted(function, counts):
    accepted = [int(n) for n in counts.replace(" or", ",").split(", ")]
    x = torch.randn(2, 4, 6)
    for count in {*range(14)} - {*accepted}:
        with pytest.raises(TypeError, match=rf"{function} takes {counts} .* got {count}\."):
            getattr(causal_conv1d_cuda, function)(*[x] * count)


def test_nothing_is_tied_to_a_graph(device):
    arguments = complete(device)
    for name in ("x", "weight", "bias", "initial_states", "dout"):
        arguments[name].requires_grad_()
    assert not fwd(7, arguments).requires_grad
    assert not any(gradient.requires_grad for gradient in bwd(10, arguments))


@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}], ids=str)
def test_empty(device, size):
    arguments = complete(device, **size)
    assert fwd(7, arguments).shape == arguments["x"].shape
    assert torch.equal(arguments["final_states_out"], arguments["initial_states"])
    dx, dweight, dbias, dinitial_states = bwd(10, arguments)
    assert dx.numel() == 0 and not dweight.any() and not dbias.any()
    assert torch.equal(dinitial_states, arguments["dfinal_states"])


# ---- causal_conv1d.cpp_functions ----


def test_functions_above_the_raw_module(device):
    arguments = complete(device)
    wanted, results = expected_gradients(arguments)
    x, weight, bias, initial = (
        arguments[name] for name in ("x", "weight", "bias", "initial_states")
    )
    out = cpp_functions.causal_conv1d_fwd_function(
        x=x,
        weight=weight,
        bias=bias,
        seq_idx=None,
        initial_states=initial,
        final_states_out=arguments["final_states_out"],
        silu_activation=True,
    )
    assert torch.equal(out, results[0])
    assert torch.equal(arguments["final_states_out"], results[1])
    grads = cpp_functions.causal_conv1d_bwd_function(
        x=x,
        weight=weight,
        bias=bias,
        dout=arguments["dout"],
        seq_idx=None,
        initial_states=initial,
        dfinal_states=arguments["dfinal_states"],
        dx=arguments["dx"],
        return_dinitial_states=True,
        silu_activation=True,
    )
    assert isinstance(grads, tuple) and grads[0] is arguments["dx"]
    for gradient, expected in zip(grads, wanted.values(), strict=True):
        assert_near(gradient, expected)
    assert grads[3].stride(1) == 1
    tensors = decode_problem(device, torch.float32)
    other = tensors["conv_state"].clone()
    expected = causal_conv1d_update(**tensors | {"conv_state": other})
    out = cpp_functions.causal_conv1d_update_function(
        **tensors, silu_activation=False, cache_seqlens=None, conv_state_indices=None
    )
    assert torch.equal(out, expected) and torch.equal(tensors["conv_state"], other)


def test_the_scans_module_offers_them():
    for name in ("fwd", "bwd", "update"):
        name = f"causal_conv1d_{name}_function"
        assert getattr(selective_scan_interface, name) is getattr(cpp_functions, name)
    assert selective_scan_interface.causal_conv1d_cuda is causal_conv1d_cuda


def operator_calls(device):
    """(operator, arguments) for each of DaoAILab's, with and without what may be absent."""
    operators = torch.ops.DaoAILab
    for kind in ("states", "packed"):
        arguments = complete(device, kind=kind, bias=kind == "states", dim=6, length=30)
        forward, backward = (
            tuple(arguments[name] for name in form.split())
            for form in (causal_conv1d_cuda._FWD[8], causal_conv1d_cuda._BWD[12])
        )
        yield operators._causal_conv1d_fwd_cpp, forward
        yield operators._causal_conv1d_bwd_cpp, backward
    x, conv_state, weight, bias = decode_problem(device, torch.float32).values()
    indices = torch.arange(5, dtype=torch.int32, device=device)
    for index in (None, indices):
        yield (
            operators._causal_conv1d_update_cpp,
            (x, conv_state, weight, bias, torch.empty_like(x), True, index, index),
        )


def test_operators_fill_what_they_are_given(device):
    for operator, arguments in operator_calls(device):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        assert operator(*arguments) is None
        raw = operator._qualified_op_name.removeprefix("DaoAILab::_").removesuffix("_cpp")
        getattr(causal_conv1d_cuda, raw)(*copies)
        for one, other in zip(arguments, copies, strict=True):
            if isinstance(one, torch.Tensor):
                assert_near(one, other)


def test_operators_are_what_torch_expects(device):
    for operator, arguments in operator_calls(device):
        torch.library.opcheck(operator.default, arguments)


def test_functions_compile_to_one_graph(device):
    arguments = complete(device, dim=6, length=30)
    x, weight, bias, dout = (arguments[name] for name in ("x", "weight", "bias", "dout"))

    def both(x, weight, bias, dout):
        out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, None, None, True)
        filled = torch.empty_like(x)
        torch.ops.DaoAILab._causal_conv1d_fwd_cpp(x, weight, bias, None, None, filled, None, True)
        grads = cpp_functions.causal_conv1d_bwd_function(
            x, weight, bias, dout, None, None, None, None, False, True
        )
        return out, filled, *grads[:3]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        compiled(x, weight, bias, dout), both(x, weight, bias, dout), strict=True
    ):
        assert_near(one, other)


def test_operators_that_another_package_registered_stay():
    """As where upstream's file runs in the same process, or ours twice."""
    operator = torch.ops.DaoAILab._causal_conv1d_fwd_cpp
    importlib.reload(cpp_functions)
    gc.collect()
    assert torch.ops.DaoAILab._causal_conv1d_fwd_cpp is operator
    x, weight = torch.randn(2, 4, 6), torch.randn(4, 3)
    out = torch.empty_like(x)
    operator(x, weight, None, None, None, out, None, False)
    assert_near(out, causal_conv1d_ref(x, weight))


# ---- generated bad calls ----

WORDS = ("text", 3, [1.0])  # what is no tensor
WRITTEN = {"out", "final_states_out", "dx", "dweight", "dbias", "dinitial_states"}
NAMES = {
    *("x", "weight", "bias", "seq_idx", "initial_states", "dout", "dfinal_states", "conv_state"),
    *("cache_seqlens", "conv_state_indices", "silu", "return_dinitial_states", "tensors"),
    *("positional", *WRITTEN),
}
REQUIRED = {"x", "weight", "conv_state", "dout", "out", "dweight", "dbias", "dx"}


def spoilt(draw, forms, count, arguments, free):
    """The arguments of a version in order, one of them or their number spoilt.

    free: {name: {fault: axes that a fault would not spoil}}.
    """
    names = forms[count].split()
    values = {name: arguments[name] for name in names}
    fault = draw(st.sampled_from([*FAULTS, "no tensor", "expanded", "count"]))
    if fault == "count":
        number = draw(st.sampled_from(sorted({*range(20)} - {*forms})))
        return [*values.values(), *[arguments["x"]] * number][:number]
    present = [name for name in names if isinstance(values[name], torch.Tensor)]
    if fault == "expanded" and (written := [n for n in present if n in WRITTEN]):
        name = draw(st.sampled_from(written))
        values[name] = values[name][:1].expand(values[name].shape)
        return [*values.values()]
    name = draw(st.sampled_from([n for n in names if values[n] is not None]))
    value = values[name]
    if fault in ("no tensor", "expanded") or isinstance(value, bool):
        choices = [*WORDS]
        optional_dx = name == "dx" and "dweight" not in names
        if (name in REQUIRED and not optional_dx) or isinstance(value, bool):
            choices.append(None)
        values[name] = draw(st.sampled_from(choices))
        return [*values.values()]
    axes = {*range(value.dim())} - {*free.get(name, {}).get(fault, ())}
    if fault in ("longer", "shorter") and not axes or fault in free.get(name, {}).get("not", ()):
        fault = "meta"
    index = name in ("seq_idx", "cache_seqlens", "conv_state_indices")
    dtypes = NO_INDICES if index else (*NO_FLOATS, torch.float64)
    values[name] = spoil(draw, value, fault, sorted(axes), dtypes)
    return [*values.values()]


@st.composite
def bad_calls(draw, versions):
    """Of a version with `versions[kind]` arguments; x's and weight's free sizes depend on the rest."""
    function, forms, counts = versions
    kind = draw(st.sampled_from([*counts]))
    arguments = complete(
        dtype=draw(st.sampled_from(HALVES)),
        kind="states" if kind == "filled" else kind,
        batch=draw(st.integers(2, 4)),
        dim=draw(st.integers(2, 4)),
        length=24,
        width=draw(st.integers(2, 4)),
        layout=draw(st.sampled_from(["slice", "channel last"])),
    )
    form = forms[counts[kind]]
    alone = not {"dout", "seq_idx", "initial_states", "out"} & {
        name for name in form.split() if arguments[name] is not None
    }
    with_states = arguments["initial_states"] is not None and "initial_states" in form
    x = {0, 2} if alone else {2} if with_states and not {"dout", "out"} & {*form.split()} else set()
    free = {"x": dict.fromkeys(("longer", "shorter"), x)}
    if not with_states:
        free["weight"] = {"longer": {1}, "shorter": {1}}
    return function, spoilt(draw, forms, counts[kind], arguments, free)


RAW_FWD = (
    causal_conv1d_cuda.causal_conv1d_fwd,
    causal_conv1d_cuda._FWD,
    {kind: counts[0] for kind, counts in VERSIONS.items()},
)
RAW_BWD = (
    causal_conv1d_cuda.causal_conv1d_bwd,
    causal_conv1d_cuda._BWD,
    {kind: counts[1] for kind, counts in VERSIONS.items()},
)


@thousand_examples
@given(bad_calls(RAW_FWD))
def test_generated_bad_forward_calls_change_nothing(call):
    function, arguments = call
    assert_refused(function, *arguments, names=NAMES)


@thousand_examples
@given(bad_calls(RAW_BWD))
def test_generated_bad_backward_calls_change_nothing(call):
    function, arguments = call
    assert_refused(function, *arguments, names=NAMES)


@st.composite
def bad_updates(draw):
    batch, width = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    dtype = draw(st.sampled_from(HALVES))
    state_len = width - 1 + draw(st.integers(0, 2))
    sizes = (batch, draw(st.integers(2, 5)), draw(st.integers(1, 3)), width, state_len)
    arguments = decode_problem("cpu", dtype, *sizes)
    flat = draw(st.booleans())
    if flat:
        arguments["x"] = arguments["x"][..., 0]
    arguments |= {
        "silu": True,
        "out": torch.randn_like(arguments["x"]),
        "cache_seqlens": torch.arange(batch, dtype=torch.int32),
        "conv_state_indices": torch.arange(batch, dtype=torch.int32).flip(0),
    }
    count = draw(st.sampled_from([5, 6, 7, 8]))
    tokens = set() if count == 8 else {2}  # any number, where out has none
    rows = {0} if count > 6 else set()  # more rows than indices are fine, as are more columns
    free = {
        "x": {"longer": tokens, "shorter": tokens, "not": {"deeper"} if flat else set()},
        "weight": {"longer": {1}, "shorter": {1}},
        "conv_state": {"longer": rows | {2}, "shorter": {2} if state_len >= width else set()},
    }
    return spoilt(draw, causal_conv1d_cuda._UPDATE, count, arguments, free)


@thousand_examples
@given(bad_updates())
def test_generated_bad_updates_change_nothing(arguments):
    assert_refused(causal_conv1d_cuda.causal_conv1d_update, *arguments, names=NAMES)
