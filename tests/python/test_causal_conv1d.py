"""causal_conv1d's functions against their references, layouts, packed sequences, decode steps."""

from itertools import pairwise

import causal_conv1d
import pytest
import torch
from causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from causal_conv1d.causal_conv1d_varlen import (
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from compare import DTYPES, FORWARD_SLACK, assert_close, convert, judge
from mamba_ssm.native import causal_conv1d as native
from mamba_ssm.native import ops
from mamba_ssm.utils.determinism import set_deterministic_mode


def problem(
    device="cpu",
    dtype=torch.float32,
    weight_dtype=None,
    batch=2,
    dim=64,
    length=151,
    width=4,
    bias=True,
    initial=False,
    layout="slice",
):
    """Inputs of a convolution as keyword arguments; weights are float32 (float64 for float64) by default."""
    weight_dtype = weight_dtype or torch.promote_types(dtype, torch.float32)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    x = {
        "slice": lambda: randn(batch, dim + 9, length)[:, 5 : 5 + dim],
        "channel last": lambda: randn(batch, length, dim).transpose(1, 2),
        "channel-last slice": lambda: randn(batch, length, dim + 9)[..., 5 : 5 + dim].transpose(
            1, 2
        ),
        "neither": lambda: randn(batch, dim, 2 * length)[..., ::2],
        "stride 0": lambda: randn(batch, 1, length).expand(-1, dim, -1),
    }[layout]()
    return {
        "x": x,
        "weight": randn(dim, width, dtype=weight_dtype),
        "bias": randn(dim, dtype=weight_dtype) if bias else None,
        "initial_states": randn(batch, width - 1, dim).transpose(1, 2) if initial else None,
    }


ROWS = {
    "base": {},
    "length 1": {"length": 1},
    "length 2": {"length": 2},
    "length 64": {"length": 64},
    "length 129": {"length": 129},
    "length 1134": {"length": 1134},
    "width 2": {"width": 2},
    "width 3": {"width": 3},
    "width 5": {"width": 5},
    "width 8": {"width": 8},
    "channel last, width 6": {"layout": "channel last", "width": 6, "initial": True},
    "width 7, initial states outlive a short sequence": {"width": 7, "initial": True, "length": 4},
    "no bias": {"bias": False},
    "one channel": {"dim": 1},
    "channels fill no vector": {"dim": 13},
    "many channels": {"dim": 1028, "length": 40},
    "batch 1": {"batch": 1},
    "initial states": {"initial": True},
    "initial states outlive a short sequence": {"initial": True, "length": 1},
    "channel last": {"layout": "channel last"},
    "channel last, channels fill no vector": {"layout": "channel last", "dim": 13},
    "channel last, initial states": {"layout": "channel last", "initial": True},
    "channel-last slice": {"layout": "channel-last slice"},
    "neither time nor channels contiguous": {"layout": "neither"},
    "stride 0": {"layout": "stride 0"},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")]
CASES += [("base", "f16"), ("base", "f64"), ("channel last", "f16")]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_outputs_and_gradients(device, row, dtype, activation):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    options = {"activation": activation, "return_final_states": True}
    judge(
        "causal_conv1d",
        dtype,
        lambda **tensors: causal_conv1d_fn(**tensors, **options),
        lambda **tensors: causal_conv1d_ref(**tensors, **options),
        problem(device, DTYPES[dtype], **ROWS[row]),
    )


@pytest.mark.parametrize("x_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("weight_dtype", ["f32", "f16", "bf16"])
def test_every_pair_of_dtypes(device, x_dtype, weight_dtype):
    tensors = problem(device, DTYPES[x_dtype], DTYPES[weight_dtype], dim=8, length=20)
    out = causal_conv1d_fn(**tensors, activation="silu")
    truth = causal_conv1d_ref(**convert(tensors, torch.float64), activation="silu")
    yardstick = causal_conv1d_ref(**convert(tensors, torch.float32), activation="silu")
    assert out.dtype == DTYPES[x_dtype]
    assert_close("causal_conv1d_forward", x_dtype, "out", out, truth, yardstick, FORWARD_SLACK)


def packed(batch, length, padding, device):
    """seq_idx (batch, length): sequences of different lengths, one of a single token, -1 in the padding."""
    seq_idx = torch.full((batch, length), -1, dtype=torch.int32, device=device)
    for row in range(batch):
        bounds = [0, 1, 3, 20 + row, length - padding]
        for i, (begin, end) in enumerate(pairwise(bounds)):
            seq_idx[row, begin:end] = i
    return seq_idx


def per_sequence(x, weight, bias, seq_idx, activation):
    """The packed convolution as one reference call a sequence; padding gives 0."""
    rows = []
    for row in range(x.shape[0]):
        _, lengths = seq_idx[row].unique_consecutive(return_counts=True)
        pieces = x[row : row + 1].split(lengths.tolist(), dim=-1)
        outs = [causal_conv1d_ref(piece, weight, bias, activation=activation) for piece in pieces]
        rows.append(torch.cat(outs, dim=-1) * (seq_idx[row] >= 0))
    return torch.cat(rows)


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("layout", ["slice", "channel last"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_packed_sequences(device, padding, layout, width, dtype):
    tensors = problem(device, DTYPES[dtype], length=60, width=width, layout=layout)
    del tensors["initial_states"]
    tensors["seq_idx"] = packed(2, 60, padding, device)
    judge(
        "causal_conv1d",
        dtype,
        lambda **t: (causal_conv1d_fn(**t, activation="silu"),),
        lambda **t: (per_sequence(**t, activation="silu"),),
        tensors,
    )


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize("row", ["initial states", "packed", "packed, initial states", "no bias"])
@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck(route, row, silu):
    tensors = problem(
        dtype=torch.float64, dim=3, length=6, bias=row != "no bias", initial="initial" in row
    )
    seq_idx = (
        torch.tensor([[0, 0, 1, 2, 2, -1], [0, 0, 0, 1, 2, 2]], dtype=torch.int32)
        if "packed" in row
        else None
    )
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        x, weight, bias, initial = (tensors | dict(zip(names, values, strict=True))).values()
        final = "initial" in row
        if route == "eager":
            activation = "silu" if silu else None
            return causal_conv1d_fn(x, weight, bias, seq_idx, initial, final, activation=activation)
        out, states = ops.causal_conv1d_forward(x, weight, bias, seq_idx, initial, final, silu)
        return (out, states) if final else out

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_reference_by_hand():
    out, final = causal_conv1d_ref(
        torch.tensor([[[1.0, 2.0, 3.0]]]),
        torch.tensor([[10.0, 1.0]]),
        torch.tensor([0.5]),
        initial_states=torch.tensor([[[4.0]]]),
        return_final_states=True,
    )
    torch.testing.assert_close(out, torch.tensor([[[41.5, 12.5, 23.5]]]))
    torch.testing.assert_close(final, torch.tensor([[[3.0]]]))


def test_split_with_carried_states_is_the_whole(device):
    tensors = problem(device, initial=True, length=50)
    whole, last = causal_conv1d_fn(**tensors, return_final_states=True, activation="silu")
    states, parts = tensors["initial_states"], []
    for begin, end in ((0, 1), (1, 3), (3, 50)):
        part = tensors | {"x": tensors["x"][..., begin:end], "initial_states": states}
        out, states = causal_conv1d_fn(**part, return_final_states=True, activation="silu")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, -1), whole)
    assert torch.equal(states, last)


def test_layout_of_the_output_is_that_of_the_input(device):
    x = problem(device, layout="channel-last slice")["x"]
    assert causal_conv1d_fn(x, torch.ones(64, 4, device=device)).stride(1) == 1
    x = problem(device, layout="slice")["x"]
    assert causal_conv1d_fn(x, torch.ones(64, 4, device=device)).is_contiguous()


def test_final_states_are_written_where_asked(device):
    tensors = problem(device, initial=True)
    tensors["x"].requires_grad_()
    target = torch.full((2, 64, 3), 9.0, device=device)
    _, final = causal_conv1d_fn(**tensors, return_final_states=True, final_states_out=target)
    assert final is target and torch.equal(target, tensors["x"][..., -3:])
    (gradient,) = torch.autograd.grad(final.sum(), tensors["x"])
    assert gradient.sum() == final.numel()


@pytest.mark.parametrize(
    "size", [{"length": 0, "initial": True}, {"batch": 0}], ids=["length", "batch"]
)
def test_empty(device, size):
    tensors = problem(device, **size)
    tensors["weight"].requires_grad_()
    out, final = causal_conv1d_fn(**tensors, return_final_states=True)
    assert out.shape == tensors["x"].shape
    if tensors["initial_states"] is not None:
        assert torch.equal(final, tensors["initial_states"])
    out.sum().backward()
    assert tensors["weight"].grad.abs().sum() == 0


def test_other_activations_are_refused():
    tensors = problem(length=4)
    for call in (causal_conv1d_fn, causal_conv1d_ref):
        with pytest.raises(NotImplementedError, match="gelu"):
            call(**tensors, activation="gelu")
    with pytest.raises(NotImplementedError, match="gelu"):
        causal_conv1d_update(tensors["x"], tensors["x"], tensors["weight"], activation="gelu")


@pytest.mark.parametrize("layout", ["slice", "channel last"])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_packed_sequences_carry_states(device, layout, width):
    """A packed row cut inside its sequences is the whole one, and so are the gradients."""
    tensors = problem(device, length=60, width=width, layout=layout, initial=True)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    seq_idx = packed(2, 60, 0, device)
    weights = torch.randn(2, 64, 60, device=device)
    results = []
    for cuts in ([0, 60], [0, 5, 6, 15, 40, 60]):
        states, parts = leaves["initial_states"], []
        for begin, end in pairwise(cuts):
            part = leaves | {"x": leaves["x"][..., begin:end], "initial_states": states}
            options = {"seq_idx": seq_idx[:, begin:end], "activation": "silu"}
            out, states = causal_conv1d_fn(**part, **options, return_final_states=True)
            parts.append(out)
        out = torch.cat(parts, -1)
        gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
        results.append((out, states, *gradients))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_initial_states_are_of_the_first_sequence(device):
    tensors = problem(device, length=9, initial=True)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2]] * 2, dtype=torch.int32, device=device)
    options = {"return_final_states": True, "activation": "silu"}
    out, final = causal_conv1d_fn(**tensors, seq_idx=seq_idx, **options)
    x, initial = tensors["x"], tensors.pop("initial_states")
    for begin, end in ((0, 2), (2, 5), (5, 9)):
        before = initial if begin == 0 else None
        part = causal_conv1d_fn(
            **tensors | {"x": x[..., begin:end]}, initial_states=before, **options
        )
        torch.testing.assert_close(out[..., begin:end], part[0])
    assert torch.equal(final, x[..., -3:])
    seq_idx[:, -1] = 3
    _, final = causal_conv1d_fn(**tensors, seq_idx=seq_idx, **options)
    assert torch.equal(final[..., -1], x[..., -1]) and not final[..., :-1].any()


@pytest.fixture
def deterministic():
    set_deterministic_mode(True)
    yield
    set_deterministic_mode(None)


@pytest.mark.parametrize("layout", ["slice", "channel last"])
@pytest.mark.parametrize("width", [4, 6])
def test_deterministic_mode_repeats_its_bits(device, deterministic, layout, width):
    tensors = problem(device, torch.bfloat16, batch=5, length=1500, width=width, layout=layout)
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    dout = torch.randn_like(leaves[0])

    def gradients():
        out = causal_conv1d_fn(*leaves, activation="silu")
        return torch.autograd.grad(out, leaves, dout)

    first = gradients()
    for _ in range(100 if device == "cuda" else 2):
        assert all(map(torch.equal, gradients(), first))


def test_deterministic_mode_reaches_the_operation(monkeypatch, deterministic):
    flags = []

    def spy(*args):
        flags.append(args[-1])
        return ops.causal_conv1d_backward(*args)

    monkeypatch.setattr(native, "causal_conv1d_backward", spy)
    tensors = problem(length=5)
    for value in (True, False):
        set_deterministic_mode(value)
        causal_conv1d_fn(tensors["x"].requires_grad_(), tensors["weight"]).sum().backward()
    assert flags == [True, False]


def test_compiles_to_one_graph(device):
    tensors = problem(device, initial=True, length=20)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    function = torch.compile(causal_conv1d_fn, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (causal_conv1d_fn, function):
        out, final = candidate(**leaves, return_final_states=True, activation="silu")
        gradients = torch.autograd.grad(out.square().sum() + final.sum(), list(leaves.values()))
        results.append((out, final, *gradients))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


def decode_problem(
    device, dtype, batch=5, dim=40, tokens=1, width=4, state_len=7, bias=True, weight_dtype=None
):
    tensors = problem(device, dtype, weight_dtype, batch, dim, tokens, width, bias)
    return {
        "x": tensors["x"],
        "conv_state": torch.randn(batch, state_len, dim, device=device).to(dtype).transpose(1, 2),
        "weight": tensors["weight"],
        "bias": tensors["bias"],
    }


DECODE_ROWS = {
    "base": {},
    "width 2": {"width": 2},
    "width 3": {"width": 3},
    "width 5": {"width": 5},
    "width 8": {"width": 8},
    "smallest state": {"state_len": 3},
    "several tokens": {"tokens": 5},
    "more tokens than state": {"tokens": 9, "state_len": 4},
    "no bias": {"bias": False},
    "channels fill no vector": {"dim": 13},
    "many channels": {"dim": 2064},
    "half weights": {"weight_dtype": torch.bfloat16},
}
DECODE_CASES = [(row, dtype) for row in DECODE_ROWS for dtype in ("f32", "bf16")] + [
    ("base", "f16")
]


def decode_against_reference(dtype, tensors, cache_seqlens=None):
    """Runs a step and the reference; the state must be equal bit for bit. Returns out."""
    expected_state = tensors["conv_state"].clone()
    truth, yardstick = (
        causal_conv1d_update_ref(
            **convert(tensors, wide),
            activation="silu",
            cache_seqlens=None if cache_seqlens is None else cache_seqlens.cpu(),
        )
        for wide in (torch.float64, torch.float32)
    )
    causal_conv1d_update_ref(
        **(tensors | {"conv_state": expected_state}), cache_seqlens=cache_seqlens
    )
    out = causal_conv1d_update(**tensors, activation="silu", cache_seqlens=cache_seqlens)
    assert torch.equal(tensors["conv_state"], expected_state)
    assert_close("causal_conv1d_update", dtype, "out", out, truth, yardstick, FORWARD_SLACK)
    return out


@pytest.mark.parametrize("row, dtype", DECODE_CASES, ids=[f"{r}-{d}" for r, d in DECODE_CASES])
def test_update(device, row, dtype):
    decode_against_reference(dtype, decode_problem(device, DTYPES[dtype], **DECODE_ROWS[row]))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("state_len", [4, 12])
def test_update_of_a_circular_state(device, tokens, state_len):
    tensors = decode_problem(device, torch.float32, tokens=tokens, state_len=state_len)
    cache_seqlens = torch.tensor([0, 1, 3, 11, 100], dtype=torch.int32, device=device)
    decode_against_reference("f32", tensors, cache_seqlens)


def test_update_without_a_time_axis(device):
    tensors = decode_problem(device, torch.float32)
    expected = causal_conv1d_update(**(tensors | {"conv_state": tensors["conv_state"].clone()}))
    out = causal_conv1d_update(**(tensors | {"x": tensors["x"].squeeze(-1)}))
    assert torch.equal(out, expected.squeeze(-1))


@pytest.mark.parametrize("circular", [False, True])
def test_update_of_gathered_rows(device, circular):
    tensors = decode_problem(device, torch.float32, tokens=2)
    pool = torch.randn(9, 40, 7, device=device)
    before = pool.clone()
    indices = torch.tensor([7, -1, 0, 3, -5], dtype=torch.int32, device=device)
    seqlens = torch.tensor([0, 1, 2, 30, 4], dtype=torch.int32, device=device) if circular else None
    live = indices >= 0
    rows = indices[live].long()
    gathered = tensors | {"x": tensors["x"][live], "conv_state": pool[rows]}
    expected = causal_conv1d_update(**gathered, cache_seqlens=seqlens[live] if circular else None)
    out = causal_conv1d_update(
        **(tensors | {"conv_state": pool}), cache_seqlens=seqlens, conv_state_indices=indices
    )
    assert torch.equal(out[live], expected) and torch.equal(pool[rows], gathered["conv_state"])
    assert out[~live].abs().sum() == 0
    untouched = [i for i in range(9) if i not in rows.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_step_by_step_is_the_whole(device):
    tensors = problem(device, length=12, layout="channel last")
    whole = causal_conv1d_fn(**tensors, activation="silu")
    state = torch.zeros(2, 64, 4, device=device)
    steps = [
        causal_conv1d_update(x, state, tensors["weight"], tensors["bias"], "silu")
        for x in tensors["x"].unbind(-1)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_states_of_packed_sequences(device, dtype, index_dtype):
    lengths = torch.tensor([3, 0, 31, 20, 1, 21, 0])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, index_dtype)
    x = torch.randn(76, 50, device=device).to(dtype)[:, 3:43]
    states = causal_conv1d_varlen_states(x, cu_seqlens, 20)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, cu_seqlens, 20))
    assert states.shape == (7, 40, 20) and states.stride(1) == 1


def test_the_package_offers_upstreams_names():
    assert callable(causal_conv1d.causal_conv1d_fn) and callable(causal_conv1d.causal_conv1d_update)
    assert callable(causal_conv1d.causal_conv1d_varlen_states)
    major, minor = causal_conv1d.__version__.split(".")[:2]
    assert (1, 6) <= (int(major), int(minor)) < (1, 7)
