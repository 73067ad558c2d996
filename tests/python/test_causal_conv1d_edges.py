"""causal_conv1d at its edges: a test for each case and for each fault of upstream, and generated bad calls."""

import inspect
import pkgutil
import subprocess
import sys

import causal_conv1d
import pytest
import torch
from bad_calls import (
    ERRORS,
    FAULTS,
    NO_FLOATS,
    NO_INDICES,
    assert_refused,
    spoil,
    thousand_examples,
)
from causal_conv1d.causal_conv1d_interface import (
    CausalConv1dFn,
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
)
from causal_conv1d.causal_conv1d_varlen import (
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from hypothesis import given
from hypothesis import strategies as st
from test_causal_conv1d import decode_problem, per_sequence, problem

pytestmark = pytest.mark.usefixtures("exact_references")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def gradients(function, tensors, **options):
    """(outputs, {name: gradient}) of a function that may return a tuple; weights of the sum are fixed."""
    leaves = {
        name: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(
        (o * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum() for o in outputs
    )
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    return outputs, dict(zip(wanted, torch.autograd.grad(loss, [*wanted.values()]), strict=True))


def assert_same(got, expected):
    for one, other in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert got[1].keys() == expected[1].keys()
    for name in got[1]:
        torch.testing.assert_close(got[1][name], expected[1][name], **TOLERANCE, msg=name)


# ---- cases ----


@pytest.mark.parametrize("layout", ["slice", "channel last"])
def test_one_step_with_states(device, layout):
    """A contiguous x of one step is channel-first and channel-last at once."""
    tensors = problem(device, length=1, initial=True, layout=layout)
    tensors["x"] = tensors["x"].contiguous()
    options = {"return_final_states": True, "activation": "silu"}
    assert_same(
        gradients(causal_conv1d_fn, tensors, **options),
        gradients(causal_conv1d_ref, tensors, **options),
    )


def test_one_step_of_a_packed_batch(device):
    tensors = problem(device, length=1)
    del tensors["initial_states"]
    seq_idx = torch.tensor([[3], [-1]], dtype=torch.int32, device=device)
    out = causal_conv1d_fn(**tensors, seq_idx=seq_idx)
    torch.testing.assert_close(out[:1], causal_conv1d_ref(**tensors)[:1])
    assert not out[1].any()


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}, {"length": 0, "batch": 0}], ids=str)
def test_no_steps_or_no_batch(device, size, initial):
    tensors = problem(device, **size, initial=initial)
    (out, final), grads = gradients(causal_conv1d_fn, tensors, return_final_states=True)
    assert out.shape == tensors["x"].shape and grads["x"].shape == out.shape
    states = tensors["initial_states"]
    assert torch.equal(final, torch.zeros_like(final) if states is None else states)
    assert not grads["weight"].any() and not grads["bias"].any()
    if initial:  # they pass through to the final states
        expected = torch.linspace(-1, 1, final.numel(), device=device).view(final.shape)
        assert torch.equal(grads["initial_states"], expected)


@pytest.mark.parametrize("size", [{"batch": 0}, {"tokens": 0}], ids=str)
def test_update_with_nothing_new(device, size):
    tensors = decode_problem(device, torch.float32, **size)
    before = tensors["conv_state"].clone()
    assert causal_conv1d_update(**tensors).shape == tensors["x"].shape
    assert torch.equal(tensors["conv_state"], before)


def test_states_of_no_tokens_and_no_sequences(device):
    x = torch.randn(0, 5, device=device)
    zeros = torch.zeros(4, dtype=torch.int32, device=device)
    assert not causal_conv1d_varlen_states(x, zeros, 3).any()
    assert causal_conv1d_varlen_states(x, zeros[:1], 3).shape == (0, 5, 3)
    assert causal_conv1d_varlen_states(x, zeros, 0).shape == (3, 5, 0)


@pytest.mark.parametrize("layout", ["slice", "channel last"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("boundary", [1, 2, 3, 63, 64, 65, 127, 128, 129])
def test_seq_idx_boundaries_anywhere(device, layout, width, boundary):
    """Inside the window, at the edges of chunks, with a sequence of one token before and padding at the end."""
    tensors = problem(device, dim=8, length=150, width=width, layout=layout)
    del tensors["initial_states"]
    seq_idx = torch.zeros(2, 150, dtype=torch.int32, device=device)
    seq_idx[:, boundary:] = 1
    seq_idx[:, boundary + 1 :] = 2
    seq_idx[1, 140:] = -1
    options = {"seq_idx": seq_idx, "activation": "silu"}
    assert_same(
        gradients(causal_conv1d_fn, tensors, **options),
        gradients(per_sequence, tensors, **options),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_tensors_are_int32_or_int64(device, dtype):
    """Of any strides; int64 beyond int32 is out of range and no other row."""
    tensors = problem(device, length=12)
    del tensors["initial_states"]
    wide = torch.arange(24, device=device).view(12, 2).t().to(dtype) // 5
    narrow = wide.to(torch.int32).contiguous()
    assert torch.equal(
        causal_conv1d_fn(**tensors, seq_idx=wide), causal_conv1d_fn(**tensors, seq_idx=narrow)
    )
    tensors = decode_problem(device, torch.float32, batch=2)
    expected = tensors | {"conv_state": tensors["conv_state"].flip(0)}
    indices = torch.tensor([[1, 9], [0, 9]], device=device).to(dtype)[:, 0]
    out = causal_conv1d_update(**tensors, conv_state_indices=indices, cache_seqlens=indices)
    assert torch.equal(
        out, causal_conv1d_update(**expected, cache_seqlens=indices.to(torch.int32).contiguous())
    )


def test_an_index_beyond_int32_is_no_other_row(device):
    tensors = decode_problem(device, torch.float32, batch=2)
    before = tensors["conv_state"].clone()
    negative = torch.tensor([-(2**32), -(2**40)], device=device)
    assert not causal_conv1d_update(**tensors, conv_state_indices=negative).any()
    beyond = torch.tensor([2**32, 2**40], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="conv_state_indices.*2 rows"):
            causal_conv1d_update(**tensors, conv_state_indices=beyond)
    else:
        assert causal_conv1d_update(**tensors, conv_state_indices=beyond).isnan().all()
    assert torch.equal(tensors["conv_state"], before)


@pytest.mark.parametrize("initial", [False, True])
def test_initial_states_without_a_gradient(device, initial):
    tensors = problem(device, initial=initial)
    tensors["x"].requires_grad_()
    out = causal_conv1d_fn(**tensors)
    out.sum().backward()
    assert tensors["x"].grad is not None
    assert not initial or tensors["initial_states"].grad is None


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
def test_swish_is_silu_and_none_is_linear(device, function):
    tensors = problem(device)
    linear = function(**tensors)
    silu = function(**tensors, activation="silu")
    assert torch.equal(silu, function(**tensors, activation="swish"))
    torch.testing.assert_close(silu, torch.nn.functional.silu(linear), **TOLERANCE)


@pytest.mark.parametrize("index", [-1, -2, -(2**31)])
def test_a_negative_state_index_gives_zeros(device, index):
    """In both kinds of buffer: the row is zero whatever bias says, the state stays as it is."""
    tensors = decode_problem(device, torch.float32, batch=3)
    before = tensors["conv_state"].clone()
    indices = torch.full((3,), index, dtype=torch.int32, device=device)
    seqlens = torch.arange(3, dtype=torch.int32, device=device)
    for cache_seqlens in (None, seqlens):
        out = causal_conv1d_update(
            **tensors, activation="silu", cache_seqlens=cache_seqlens, conv_state_indices=indices
        )
        assert not out.any() and torch.equal(tensors["conv_state"], before)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_state_of_width_columns_or_one_fewer(device, width):
    """transformers keeps W columns, upstream's Mamba W - 1 or more: the outputs are the same."""
    tensors = decode_problem(device, torch.float32, width=width, state_len=width)
    narrow = tensors | {"conv_state": tensors["conv_state"][..., 1:].clone()}
    for _ in range(3):
        assert torch.equal(causal_conv1d_update(**tensors), causal_conv1d_update(**narrow))
    assert torch.equal(tensors["conv_state"][..., 1:], narrow["conv_state"])


def views(tensor):
    """The tensor's values sliced from a wider one, and one element off any alignment."""
    storage = tensor.new_full((tensor.numel() * 3 + 1,), 7.0)
    yield storage[1::3].view(tensor.shape).copy_(tensor)
    yield storage.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["slice", "channel last"])
def test_expanded_sliced_and_misaligned_inputs(device, dtype, layout):
    tensors = problem(device, dtype, dim=16, length=70, initial=True, layout=layout)
    options = {"return_final_states": True, "activation": "silu"}
    plain = gradients(causal_conv1d_fn, tensors, **options)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else TOLERANCE
    for name, tensor in tensors.items():
        for view in views(tensor):
            got = gradients(causal_conv1d_fn, tensors | {name: view}, **options)
            for one, other in zip(got[0], plain[0], strict=True):
                torch.testing.assert_close(one, other, **tolerance, msg=name)
            for key, gradient in got[1].items():
                torch.testing.assert_close(gradient, plain[1][key], **tolerance, msg=name)
        expanded = tensor[:1].expand(tensor.shape)
        outs = [
            causal_conv1d_fn(**tensors | {name: value}, **options)[0]
            for value in (expanded, expanded.clone())
        ]
        torch.testing.assert_close(*outs, **tolerance, msg=name)


@pytest.mark.parametrize("name", ["x", "conv_state", "weight", "bias"])
def test_update_of_expanded_sliced_and_misaligned_inputs(device, name):
    tensors = decode_problem(device, torch.float32, tokens=2)
    changed = tensors["conv_state"].clone()
    expected = causal_conv1d_update(**tensors | {"conv_state": changed})
    for view in views(tensors[name]):
        given = tensors | {"conv_state": tensors["conv_state"].clone(), name: view}
        torch.testing.assert_close(causal_conv1d_update(**given), expected)
        assert torch.equal(given["conv_state"], changed)
    if name != "conv_state":
        expanded = tensors[name][:1].expand(tensors[name].shape)
        outs = [
            causal_conv1d_update(
                **tensors | {"conv_state": tensors["conv_state"].clone(), name: value}
            )
            for value in (expanded, expanded.clone())
        ]
        torch.testing.assert_close(*outs)


@pytest.mark.parametrize("used", ["out", "final states"])
def test_gradient_through_one_result_alone(device, used):
    """The other's missing gradient counts as zeros."""
    tensors = problem(device, initial=True, length=2)

    def one(function):
        def chosen(**leaves):
            out, final = function(**leaves, return_final_states=True, activation="silu")
            weight, bias = leaves["weight"], leaves["bias"]
            if used == "out":
                return out
            return final + 0 * weight.sum() + 0 * bias.sum()  # so that both have a gradient

        return chosen

    assert_same(
        gradients(one(causal_conv1d_fn), tensors), gradients(one(causal_conv1d_ref), tensors)
    )


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    tensors = {name: t.requires_grad_() for name, t in problem(device, initial=True).items()}
    with context():
        out, final = causal_conv1d_fn(**tensors, return_final_states=True)
    assert not out.requires_grad and not final.requires_grad


def test_steps_with_trainable_weights_make_no_graph(device):
    tensors = decode_problem(device, torch.float32)
    tensors["weight"].requires_grad_()
    tensors["x"].requires_grad_()
    for _ in range(2):
        assert not causal_conv1d_update(**tensors).requires_grad
    assert not tensors["conv_state"].requires_grad
    x = tensors["x"].squeeze(-1)
    cu_seqlens = torch.tensor([0, 5], device=device)
    assert not causal_conv1d_varlen_states(x, cu_seqlens, 3).requires_grad


def test_autocast_takes_dtypes_as_given(device):
    tensors = problem(device, initial=True)
    plain = causal_conv1d_fn(**tensors, return_final_states=True, activation="silu")
    step = decode_problem(device, torch.float32)
    states = [step["conv_state"].clone() for _ in range(2)]
    expected = causal_conv1d_update(**step | {"conv_state": states[0]})
    with torch.autocast(device, dtype=torch.bfloat16):
        got = causal_conv1d_fn(**tensors, return_final_states=True, activation="silu")
        out = causal_conv1d_update(**step | {"conv_state": states[1]})
    assert all(map(torch.equal, got, plain))
    assert torch.equal(out, expected) and torch.equal(*states)


@pytest.mark.parametrize("layout", ["(B, D, W-1)", "(B, W-1, D)", "slice"])
def test_final_states_out_of_any_strides(device, layout):
    """Only its own elements are written."""
    tensors = problem(device, initial=True)
    _, expected = causal_conv1d_fn(**tensors, return_final_states=True)
    space = torch.full((2, 64, 9), 7.0, device=device)
    target = {
        "(B, D, W-1)": lambda: space.new_empty(2, 64, 3),
        "(B, W-1, D)": lambda: space.new_empty(2, 3, 64).transpose(1, 2),
        "slice": lambda: space[..., 2:8:2],
    }[layout]()
    _, final = causal_conv1d_fn(**tensors, return_final_states=True, final_states_out=target)
    assert final is target and torch.equal(target, expected)
    space[..., 2:8:2] = 7.0
    assert (space == 7.0).all()


def test_the_function_class_takes_what_the_function_does(device):
    """Also fewer arguments: upstream's class has the same defaults."""
    tensors = problem(device)
    x, weight, bias = (tensors[name].requires_grad_() for name in ("x", "weight", "bias"))
    out = CausalConv1dFn.apply(x, weight)
    torch.testing.assert_close(out, causal_conv1d_fn(x, weight))
    got = torch.autograd.grad(CausalConv1dFn.apply(x, weight, bias).sum(), (x, weight, bias))
    expected = torch.autograd.grad(causal_conv1d_fn(x, weight, bias).sum(), (x, weight, bias))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        dx.sum().backward()


SIGNATURES = {
    "causal_conv1d_interface.causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, "
    "initial_states=None, return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_interface.causal_conv1d_ref": "(x, weight, bias=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_interface.causal_conv1d_update": "(x, conv_state, weight, bias=None, "
    "activation=None, cache_seqlens=None, conv_state_indices=None)",
    "causal_conv1d_interface.causal_conv1d_update_ref": "(x, conv_state, weight, bias=None, "
    "activation=None, cache_seqlens=None)",
    "causal_conv1d_varlen.causal_conv1d_varlen_states": "(x, cu_seqlens, state_len)",
    "causal_conv1d_varlen.causal_conv1d_varlen_states_ref": "(x, cu_seqlens, state_len)",
    "cpp_functions.causal_conv1d_fwd_function": "(x, weight, bias, seq_idx, initial_states, "
    "final_states_out, silu_activation)",
    "cpp_functions.causal_conv1d_bwd_function": "(x, weight, bias, dout, seq_idx, initial_states, "
    "dfinal_states, dx, return_dinitial_states, silu_activation)",
    "cpp_functions.causal_conv1d_update_function": "(x, conv_state, weight, bias, "
    "silu_activation, cache_seqlens, conv_state_indices)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    """Callers filter keywords by them, so they are plain functions."""
    function = pkgutil.resolve_name(f"causal_conv1d.{name}")
    assert inspect.isfunction(function)
    assert str(inspect.signature(function)) == SIGNATURES[name]
    top = getattr(causal_conv1d, function.__name__, function)
    assert top is function and function.__doc__


def test_importing_the_package_does_not_import_torch():
    code = "import sys, causal_conv1d; print('torch' in sys.modules, causal_conv1d.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["False", causal_conv1d.__version__], result.stderr


# ---- faults of upstream ----


@pytest.mark.parametrize("layout", ["slice", "channel last"])
def test_upstream_fault_12_gradient_on_padding_reaches_nothing(device, layout):
    tensors = problem(device, length=70, layout=layout)
    del tensors["initial_states"]
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    seq_idx = torch.zeros(2, 70, dtype=torch.int32, device=device)
    seq_idx[:, 60:] = -1
    seq_idx[1, :2] = -7
    out = causal_conv1d_fn(**leaves, seq_idx=seq_idx, activation="silu")
    padding = (seq_idx < 0)[:, None].expand(out.shape)
    assert not out[padding].any()
    dout = torch.randn_like(out)
    results = [
        torch.autograd.grad(out, [*leaves.values()], cotangent, retain_graph=True)
        for cotangent in (dout, dout.masked_fill(padding, 1e6))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    only = torch.autograd.grad(out, [*leaves.values()], padding.to(out.dtype))
    assert not any(gradient.any() for gradient in only)


@pytest.mark.parametrize("length", [1, 63, 65, 127, 129, 200])
@pytest.mark.parametrize("layout", ["slice", "channel last"])
def test_upstream_fault_13_seq_idx_is_read_inside_its_bounds(device, length, layout):
    """What lies before and behind it in memory changes no bit."""
    tensors = problem(device, length=length, layout=layout)
    del tensors["initial_states"]
    results = []
    for around in (0, 5, -1):
        buffer = torch.full((2 * length + 512,), around, dtype=torch.int32, device=device)
        seq_idx = buffer[256:-256].view(2, length)
        seq_idx.zero_()
        outputs, grads = gradients(causal_conv1d_fn, tensors, seq_idx=seq_idx)
        results.append((outputs[0], grads["x"]))
    for one, other in zip(*results[1:], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(results[0][0], causal_conv1d_ref(**tensors), **TOLERANCE)


def test_upstream_fault_13_reference_of_an_empty_sequence(device):
    x = torch.randn(3, 5, device=device)
    cu_seqlens = torch.tensor([0, 0, 3, 3], device=device)
    states = causal_conv1d_varlen_states_ref(x, cu_seqlens, 2)
    assert not states[[0, 2]].any() and torch.equal(states[1], x[1:].T)


# ---- generated bad calls ----

WORDS = ("text", 3, [1.0])  # what is no tensor
WEIGHTS = {"x", "weight", "bias", "tensors"}


@st.composite
def bad_forward_calls(draw):
    batch, dim, length = (draw(st.integers(2, 4)) for _ in range(3))
    width = draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    layout = draw(st.sampled_from(["slice", "channel last"]))
    kind = draw(st.sampled_from(["plain", "packed", "states"]))
    arguments = problem(
        "cpu", dtype, None, batch, dim, length, width, True, kind == "states", layout
    )
    if kind == "packed":
        arguments["seq_idx"] = torch.zeros(batch, length, dtype=torch.int32)
    if kind == "states":
        arguments["final_states_out"] = torch.randn(batch, dim, width - 1, dtype=dtype)
    arguments = {name: t for name, t in arguments.items() if t is not None}
    options = {"return_final_states": kind == "states", "activation": "silu"}
    name = draw(st.sampled_from([*arguments, "activation"]))
    if name == "activation":
        return arguments | options | {name: draw(st.sampled_from(["gelu", "SiLU", True, 1, ""]))}
    fault = draw(st.sampled_from([*FAULTS, "no tensor", *["expanded"] * (kind == "states")]))
    if fault == "expanded":  # what is written
        states = arguments["final_states_out"]
        return arguments | options | {"final_states_out": states[:1].expand(states.shape)}
    if fault == "no tensor":
        absent = (None,) if name in ("x", "weight") else ()
        return arguments | options | {name: draw(st.sampled_from([*WORDS, *absent]))}
    # x's batch and length are free where nothing else has them, weight's width without states
    axes = {"x": {"plain": [1], "states": [0, 1]}.get(kind)}
    axes["weight"] = None if kind == "states" else [0]
    dtypes = NO_INDICES if name == "seq_idx" else (*NO_FLOATS, torch.float64)
    tensor = spoil(draw, arguments[name], fault, axes.get(name), dtypes)
    return arguments | options | {name: tensor}


@thousand_examples
@given(bad_forward_calls())
def test_generated_bad_calls_change_nothing(arguments):
    names = {*WEIGHTS, "seq_idx", "initial_states", "final_states_out", "activation"}
    assert_refused(
        causal_conv1d_fn, **arguments, names=names, errors=(*ERRORS, NotImplementedError)
    )


@st.composite
def bad_updates(draw):
    batch, dim = draw(st.integers(2, 4)), draw(st.integers(2, 5))
    width = draw(st.integers(2, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    state_len = width - 1 + draw(st.integers(0, 3))
    arguments = decode_problem("cpu", dtype, batch, dim, draw(st.integers(1, 3)), width, state_len)
    if draw(st.booleans()):
        arguments["x"] = arguments["x"][..., 0]
    indexed, circular = draw(st.booleans()), draw(st.booleans())
    if indexed:
        arguments["conv_state_indices"] = torch.arange(batch).flip(0)
    if circular:
        arguments["cache_seqlens"] = torch.arange(batch, dtype=torch.int32)
    fault = draw(st.sampled_from([*FAULTS, "no tensor", "value"]))
    name = draw(st.sampled_from([*arguments]))
    if fault == "value":
        choices = ["conv_state", "activation"]
        choices += ["conv_state_indices"] * indexed + ["cache_seqlens"] * circular
        name = draw(st.sampled_from(choices))
        state = arguments["conv_state"]
        value = {
            "conv_state": state[:1].expand(state.shape),
            "activation": "relu",
            "conv_state_indices": torch.full((batch,), batch + draw(st.integers(0, 2**40))),
            "cache_seqlens": torch.full((batch,), -draw(st.integers(1, 2**40))),
        }[name]
        return arguments | {name: value}
    tensor = arguments[name]
    if fault == "no tensor":
        required = name in ("x", "conv_state", "weight")
        return arguments | {name: draw(st.sampled_from([*WORDS, None] if required else WORDS))}
    axes = None
    if name == "x":
        axes = [0, 1]  # any number of tokens is fine
        fault = "flat" if fault == "deeper" and tensor.dim() == 2 else fault
    elif name == "weight":
        axes = [0]
    elif name == "conv_state":  # as are more columns, and more rows than indices
        axes = [0, 1] if not indexed or fault == "shorter" else [1]
        axes += [2] * (fault == "shorter" and state_len == width - 1)
    index = name in ("conv_state_indices", "cache_seqlens")
    dtypes = NO_INDICES if index else (*NO_FLOATS, torch.float64)
    return arguments | {name: spoil(draw, tensor, fault, axes, dtypes)}


@thousand_examples
@given(bad_updates())
def test_generated_bad_updates_change_nothing(arguments):
    names = {*WEIGHTS, "conv_state", "conv_state_indices", "cache_seqlens", "activation"}
    assert_refused(
        causal_conv1d_update, **arguments, names=names, errors=(*ERRORS, NotImplementedError)
    )


@st.composite
def bad_varlen_states(draw):
    lengths = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=2, max_size=5)))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    cu_seqlens = cu_seqlens.to(draw(st.sampled_from([torch.int32, torch.int64])))
    tokens = int(cu_seqlens[-1])
    arguments = {
        "x": torch.randn(tokens, draw(st.integers(2, 5))),
        "cu_seqlens": cu_seqlens,
        "state_len": draw(st.integers(0, 6)),
    }
    name = draw(st.sampled_from([*arguments]))
    if name == "state_len":
        bad = st.one_of(st.integers(-(2**31), -1), st.sampled_from([None, "3", 2.5]))
        return arguments | {name: draw(bad)}
    tensor = arguments[name]
    fault = draw(st.sampled_from(["deeper", "flat", "dtype", "meta", "no tensor", "value"]))
    if fault == "no tensor":
        tensor = draw(st.sampled_from([*WORDS, None]))
    elif fault == "value":
        name, at = "cu_seqlens", draw(st.integers(0, len(lengths)))
        tensor = cu_seqlens.clone()
        # beyond the tokens, before the first, or none at all
        tensor[at] = draw(st.sampled_from([-1, -(2**31), tokens + 1, 2**31 - 1]))
        tensor = draw(st.sampled_from([tensor, tensor[:0]]))
    else:
        dtypes = NO_FLOATS if name == "x" else NO_INDICES
        tensor = spoil(draw, tensor, fault, dtypes=dtypes)
    return arguments | {name: tensor}


@thousand_examples
@given(bad_varlen_states())
def test_generated_bad_calls_for_states_change_nothing(arguments):
    names = ("x", "cu_seqlens", "state_len", "tensors")
    assert_refused(causal_conv1d_varlen_states, **arguments, names=names)
