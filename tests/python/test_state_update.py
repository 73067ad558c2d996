"""selective_state_update against the reference and against the scan."""

import pytest
import torch
from bad_calls import FAULTS, NO_FLOATS, NO_INDICES, assert_refused, spoil, thousand_examples
from compare import DTYPES, FORWARD_SLACK, assert_close, convert
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)


def problem(
    device="cpu",
    dtype=torch.float32,
    batch=8,
    heads=None,
    dim=256,
    d_state=16,
    groups=1,
    absent=(),
    tie=False,
    state_dtype=None,
):
    """Inputs of a step; without heads in Mamba-1's form. The parameters are float32, as clients keep them."""
    wide = torch.promote_types(dtype, torch.float32)
    per_head = () if heads is None else (heads,)
    per_group = () if heads is None else (groups,)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    tensors = {
        "state": randn(batch, *per_head, dim, d_state, dtype=state_dtype or dtype),
        "x": randn(batch, *per_head, dim),
        "dt": randn(batch, *per_head, dim),
        "A": -torch.rand(*per_head, dim, d_state, device=device).to(wide) - 0.5,
        "B": randn(batch, *per_group, d_state),
        "C": randn(batch, *per_group, d_state),
        "D": randn(*per_head, dim, dtype=wide),
        "z": randn(batch, *per_head, dim),
        "dt_bias": randn(*per_head, dim, dtype=wide) - 2.0,
    }
    if tie:  # Mamba-2's calls: one decay, step and skip a head
        tensors["A"] = tensors["A"][:, :1, :1].expand(-1, dim, d_state)
        tensors["dt"] = tensors["dt"][:, :, :1].expand(-1, -1, dim)
        tensors["D"] = tensors["D"][:, :1].expand(-1, dim)
        tensors["dt_bias"] = tensors["dt_bias"][:, :1].expand(-1, dim)
    return {name: None if name in absent else tensor for name, tensor in tensors.items()}


ROWS = {
    "base": {},
    "batch 1": {"batch": 1},
    "one channel": {"dim": 1, "batch": 200},
    "channels fill no vector": {"dim": 253},
    "many channels": {"dim": 2064},
    "d_state 1": {"d_state": 1},
    "d_state 8": {"d_state": 8},
    "d_state 64": {"d_state": 64},
    "d_state 96": {"d_state": 96},
    "d_state 256": {"d_state": 256},
    "no gate": {"absent": ("z",)},
    "no D": {"absent": ("D",)},
    "no bias": {"absent": ("dt_bias",)},
    "bare": {"absent": ("z", "D", "dt_bias")},
    "float32 state": {"state_dtype": torch.float32},
    "heads": {"heads": 4},
    "heads in groups": {"heads": 4, "groups": 2},
    "a group a head": {"heads": 4, "groups": 4},
    "tied heads": {"heads": 4, "groups": 2, "dim": 64, "tie": True},
    "tied heads, d_state 128": {"heads": 4, "dim": 64, "d_state": 128, "tie": True},
    "logarithm of A": {},
    "tied heads, logarithm of A": {"heads": 4, "groups": 2, "dim": 64, "tie": True},
    "limits": {},
    "tied heads, limits": {"heads": 4, "groups": 2, "dim": 64, "tie": True},
}
OPTIONS = {  # of the operation, where a row has any
    "logarithm of A": {"A_is_log": True},
    "tied heads, logarithm of A": {"A_is_log": True},
    "limits": {"dt_limit": (0.1, 0.4)},
    "tied heads, limits": {"dt_limit": (0.1, 0.4)},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")]
CASES += [("base", "f16"), ("tied heads", "f16"), ("base", "f64")]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@pytest.mark.parametrize("softplus", [True, False])
def test_state_and_output(device, row, dtype, softplus):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    tensors = problem(device, DTYPES[dtype], **ROWS[row])
    if not softplus:
        tensors["dt"] = tensors["dt"].abs()
    options = OPTIONS.get(row, {}) | {"dt_softplus": softplus}
    results = []
    for wide in (torch.float64, torch.float32):
        copies = convert(tensors, wide)
        out = selective_state_update_ref(**copies, **options)
        results.append((out, copies["state"]))
    out = selective_state_update(**tensors, **options)
    for name, got, truth, yardstick in zip(
        ("out", "state"), (out, tensors["state"]), *results, strict=True
    ):
        assert_close("selective_state_update", dtype, name, got, truth, yardstick, FORWARD_SLACK)


def test_reference_by_hand():
    """A = ln 1/2 and dt = 1: the state 4 becomes 4 / 2 + 1 * 3 * 2 = 8; out = (8 * 5 + 10 * 2) silu(0)."""
    state = torch.tensor([[[4.0]]])
    arguments = (
        torch.tensor([[2.0]]),
        torch.ones(1, 1),
        torch.tensor([[0.5]]).log(),
        torch.tensor([[3.0]]),
        torch.tensor([[5.0]]),
        torch.tensor([10.0]),
    )
    torch.testing.assert_close(
        selective_state_update_ref(state, *arguments), torch.tensor([[60.0]])
    )
    torch.testing.assert_close(state, torch.tensor([[[8.0]]]))
    assert selective_state_update_ref(state, *arguments, z=torch.zeros(1, 1)).item() == 0


def test_layers_parameter_and_limits_are_what_they_stand_for(device):
    """A_is_log: A = -exp(A); dt_limit: delta made before. A reference of either may not hide the other's fault."""
    tensors = problem(device, heads=4, dim=64, tie=True)
    states = [tensors["state"].clone() for _ in range(2)]
    logarithm = tensors["A"].neg().log()
    delta = torch.nn.functional.softplus(tensors["dt"] + tensors["dt_bias"]).clamp(0.1, 0.4)
    expected = selective_state_update(
        **tensors | {"state": states[0], "dt": delta, "dt_bias": None}
    )
    out = selective_state_update(
        **tensors | {"state": states[1], "A": logarithm},
        dt_softplus=True,
        dt_limit=(0.1, 0.4),
        A_is_log=True,
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"dt_limit must be \(smallest, largest\), got \(2"):
        selective_state_update(**tensors, dt_limit=(2.0, 1.0))


def test_output_comes_from_the_unrounded_state(device):
    """In bfloat16 256 + 1 is 256, yet the output has to see the 1."""
    state = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16, device=device)
    one = torch.ones(1, 1, device=device)
    for update in (selective_state_update, selective_state_update_ref):
        out = update(state.clone(), one, one, torch.zeros(1, 1, device=device), one, one)
        assert out.item() == 257


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gathered_rows(device, index_dtype):
    tensors = problem(device, batch=4, heads=2)
    pool = torch.randn(7, 2, 256, 16, device=device)
    before = pool.clone()
    indices = torch.tensor([5, -1, 0, 3], dtype=index_dtype, device=device)
    live = indices >= 0
    rows = indices[live].long()
    gathered = {
        name: t[live] if name in ("x", "dt", "B", "C", "z") else t for name, t in tensors.items()
    }
    gathered["state"] = pool[rows]
    expected = selective_state_update(**gathered)
    out = selective_state_update(**(tensors | {"state": pool}), state_batch_indices=indices)
    assert torch.equal(out[live], expected) and torch.equal(pool[rows], gathered["state"])
    assert out[~live].abs().sum() == 0
    untouched = [i for i in range(7) if i not in rows.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_strided_state_is_updated_in_place(device):
    tensors = problem(device)
    strided = torch.zeros(8, 16, 256, device=device).transpose(1, 2)
    strided.copy_(tensors["state"])
    out = selective_state_update(**(tensors | {"state": strided}))
    expected = selective_state_update(**tensors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strided, tensors["state"])


def test_step_by_step_is_the_scan(device):
    tensors = problem(device)
    length = 9
    u, delta, z = (torch.randn(8, 256, length, device=device) for _ in range(3))
    B, C = (torch.randn(8, 16, length, device=device) for _ in range(2))
    whole, last = selective_scan_fn(
        u,
        delta,
        tensors["A"],
        B,
        C,
        tensors["D"],
        z,
        tensors["dt_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    state = torch.zeros(8, 256, 16, device=device)
    steps = [
        selective_state_update(
            state,
            u[..., t],
            delta[..., t],
            tensors["A"],
            B[..., t],
            C[..., t],
            tensors["D"],
            z[..., t],
            tensors["dt_bias"],
            dt_softplus=True,
        )
        for t in range(length)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_compiles_to_one_graph(device):
    tensors = problem(device)
    compiled_state = tensors["state"].clone()
    expected = selective_state_update(**tensors)
    function = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**(tensors | {"state": compiled_state})), expected)
    assert torch.equal(compiled_state, tensors["state"])


# What upstream's own tests ask: rows of state and output within these rtol and atol of the reference.

UPSTREAM = {"f32": (3e-4, 1e-3), "f16": (5e-3, 1e-2), "bf16": (1e-2, 5e-2)}


def check_upstream(device, dtype, tolerance, d_state, entries=None, absent=(), **options):
    """One step; with `entries` the rows of a pool that random indices name."""
    tensors = problem(device, DTYPES[dtype], d_state=d_state, absent=absent, **options)
    batch = tensors["x"].shape[0]
    pool = tensors["state"]
    indices = None
    if entries is not None:
        pool = torch.randn(entries, *pool.shape[1:], device=device).to(pool.dtype)
        indices = torch.randperm(entries)[:batch].to(device, torch.int32)
    expected_state = pool.clone() if indices is None else pool[indices].clone()
    expected = selective_state_update_ref(**tensors | {"state": expected_state}, dt_softplus=True)
    out = selective_state_update(
        **tensors | {"state": pool}, dt_softplus=True, state_batch_indices=indices
    )
    state = pool if indices is None else pool[indices]
    rtol, atol = tolerance
    torch.testing.assert_close(state, expected_state, rtol=rtol, atol=atol)
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


def widths(device):
    return (2048, 2064, 4096) if device == "cuda" else (2064,)


@pytest.mark.parametrize("dtype", UPSTREAM)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("d_state", [16, 32, 64])
def test_selective_state_update(device, dtype, gate, d_state):
    for dim in widths(device):
        check_upstream(
            device,
            dtype,
            UPSTREAM[dtype],
            d_state,
            batch=2,
            dim=dim,
            absent=() if gate else ("z",),
        )


@pytest.mark.parametrize("dtype, tolerance", [("f16", (5e-3, 3e-2)), ("bf16", (1e-2, 1e-1))])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("d_state", [16, 32, 64])
def test_selective_state_update_with_heads(device, dtype, tolerance, tie, groups, d_state):
    for heads in (32, 64) if device == "cuda" else (32,):
        check_upstream(
            device,
            dtype,
            tolerance,
            d_state,
            batch=2,
            heads=heads,
            dim=64,
            groups=groups,
            tie=tie,
        )


@pytest.mark.parametrize("d_state", [16, 32, 64])
def test_selective_state_update_with_batch_indices(device, d_state):
    for dim in widths(device):
        check_upstream(device, "bf16", (6e-2, 6e-2), d_state, entries=160, batch=16, dim=dim)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_selective_state_update_with_heads_with_batch_indices(device, tie, groups):
    check_upstream(
        device,
        "bf16",
        (1e-1, 1e-1),
        64,
        entries=160,
        batch=16,
        heads=32,
        dim=64,
        groups=groups,
        tie=tie,
    )


# The contract's edge cases and upstream's faults, row by row.


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_or_one(device, batch):
    tensors = problem(device, batch=batch)
    assert selective_state_update(**tensors).shape == (batch, 256)


def test_any_divisor_of_the_heads_is_a_number_of_groups(device):
    """A group's B and C serve its heads: expanded to a group a head, nothing changes."""
    tensors = problem(device, heads=12, dim=8, groups=12)
    for groups in (1, 2, 3, 4, 6, 12):
        grouped = {k: tensors[k][:, :groups] for k in ("B", "C")}
        expanded = {k: t.repeat_interleave(12 // groups, dim=1) for k, t in grouped.items()}
        states = [tensors["state"].clone() for _ in range(2)]
        outs = [
            selective_state_update(**tensors | {"state": state} | projections)
            for state, projections in zip(states, (grouped, expanded), strict=True)
        ]
        assert torch.equal(*outs) and torch.equal(*states)


def test_negative_index_gives_zeros_and_leaves_the_state(device):
    tensors = problem(device, batch=3)
    before = tensors["state"].clone()
    indices = torch.tensor([-1, -2, -(2**31)], dtype=torch.int32, device=device)
    out = selective_state_update(**tensors, state_batch_indices=indices)
    assert not out.any() and torch.equal(tensors["state"], before)


def test_index_beyond_the_state(device):
    tensors = problem(device, batch=2)
    before = tensors["state"].clone()
    indices = torch.tensor([2, 2**31 - 1], dtype=torch.int32, device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="state_batch_indices.*2 entries"):
            selective_state_update(**tensors, state_batch_indices=indices)
    else:
        assert selective_state_update(**tensors, state_batch_indices=indices).isnan().all()
    assert torch.equal(tensors["state"], before)


def test_expanded_sliced_and_misaligned_inputs(device):
    tensors = problem(device, dim=64, batch=4)
    for name, tensor in tensors.items():
        if name == "state":
            continue
        expanded = tensor[:1].expand(tensor.shape)
        storage = torch.zeros(tensor.numel() * 3 + 1, device=device)
        sliced = storage[1::3].view(tensor.shape).copy_(tensor)
        misaligned = storage.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
        for view, plain in (
            (expanded, expanded.contiguous()),
            (sliced, tensor),
            (misaligned, tensor),
        ):
            states = [tensors["state"].clone() for _ in range(2)]
            outs = [
                selective_state_update(**tensors | {"state": state, name: value})
                for state, value in zip(states, (view, plain), strict=True)
            ]
            torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4, msg=name)
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("absent", [("dt_bias",), ("D",), ("dt_bias", "D", "z")])
def test_upstream_fault_10_absent_bias_or_skip(device, absent):
    tensors = problem(device, absent=absent)
    zeros = {"dt_bias": torch.zeros(256, device=device), "D": torch.zeros(256, device=device)}
    given = {name: zeros[name] for name in absent if name in zeros}
    states = [tensors["state"].clone() for _ in range(2)]
    outs = [
        selective_state_update(**tensors | {"state": state} | more)
        for state, more in zip(states, ({}, given), strict=True)
    ]
    assert torch.equal(*outs) and torch.equal(*states)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_no_graph(device, context):
    tensors = problem(device)
    with context():
        out = selective_state_update(**tensors | {"A": tensors["A"].requires_grad_()})
    assert not out.requires_grad and not tensors["state"].requires_grad


def test_autocast_takes_dtypes_as_given(device):
    tensors = problem(device)
    states = [tensors["state"].clone() for _ in range(2)]
    plain = selective_state_update(**tensors | {"state": states[0]})
    with torch.autocast(device, dtype=torch.bfloat16):
        out = selective_state_update(**tensors | {"state": states[1]})
    assert torch.equal(out, plain) and torch.equal(*states)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("heads", [None, 4])
def test_several_tokens_are_several_calls(device, dtype, indexed, heads):
    """Bit for bit, whatever the layout of the sequence."""
    tokens = 5
    tensors = problem(device, DTYPES[dtype], heads=heads, dim=32, batch=3)
    changing = ("x", "dt", "B", "C", "z")
    sequence = {
        name: torch.randn(
            3, tokens, *(tensors[name].shape[1:] if heads else (1, tensors[name].shape[1])),
            device=device,
        ).to(DTYPES[dtype])
        for name in changing
    }  # fmt: skip
    sequence["x"] = sequence["x"].transpose(1, 2).contiguous().transpose(1, 2)
    sequence["dt"] = sequence["dt"][:, :1].expand(sequence["dt"].shape)
    indices = torch.tensor([2, -1, 0], device=device) if indexed else None
    options = {"dt_softplus": True, "state_batch_indices": indices}
    state, alone = (tensors["state"].clone() for _ in range(2))
    out = selective_state_update(**tensors | sequence | {"state": state}, **options)
    steps = [
        selective_state_update(
            **tensors | {k: sequence[k][:, t] for k in changing} | {"state": alone}, **options
        )
        for t in range(tokens)
    ]
    assert torch.equal(out, torch.stack(steps, dim=1)) and torch.equal(state, alone)
    if not indexed:
        again = tensors["state"].clone()
        expected = selective_state_update_ref(
            **tensors | sequence | {"state": again}, dt_softplus=True
        )
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert selective_state_update(
        **tensors | {k: v[:, :0] for k, v in sequence.items()}
    ).shape[1] == 0  # fmt: skip


@pytest.mark.gpu
def test_a_step_replays_from_a_cuda_graph():
    tensors = problem("cuda", torch.bfloat16, heads=4, dim=64, d_state=128, tie=True)
    start = tensors["state"].clone()
    expected = [selective_state_update(**tensors, dt_softplus=True).clone() for _ in range(2)]
    tensors["state"].copy_(start)
    selective_state_update(**tensors | {"state": start.clone()}, dt_softplus=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = selective_state_update(**tensors, dt_softplus=True)
    for step in expected:
        graph.replay()
        assert torch.equal(out, step)


# ---- generated bad calls ----

NAMES = (*("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"),
         *("state_batch_indices", "heads", "tensors"))  # fmt: skip


@st.composite
def bad_calls(draw):
    heads = draw(st.sampled_from([None, 2, 4]))
    indexed = draw(st.booleans())
    arguments = problem(
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        batch=draw(st.integers(2, 4)),
        heads=heads,
        dim=draw(st.integers(2, 5)),
        d_state=draw(st.integers(2, 5)),
        tie=heads is not None and draw(st.booleans()),
    )
    if indexed:
        arguments["state_batch_indices"] = torch.arange(arguments["x"].shape[0])
    name = draw(st.sampled_from([*arguments]))
    tensor = arguments[name]
    fault = draw(st.sampled_from([*FAULTS, "absent"]))
    if fault != "absent":
        axes = None
        if fault == "longer" and name == "state" and indexed:
            axes = range(1, tensor.dim())  # more entries than indices are fine
        dtypes = NO_INDICES if name == "state_batch_indices" else (*NO_FLOATS, torch.float64)
        tensor = spoil(draw, tensor, fault, axes, dtypes)
    elif name in ("x", "dt", "A", "B", "C"):
        tensor = None
    else:  # what may be absent: an expanded state, an index that no entry has
        name = draw(st.sampled_from(["state", "state_batch_indices"]))
        state = arguments["state"]
        beyond = torch.full((arguments["x"].shape[0],), state.shape[0] + draw(st.integers(0, 9)))
        tensor = state[:1].expand(state.shape) if name == "state" else beyond
    return arguments | {name: tensor}


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    assert_refused(selective_state_update, **arguments, names=NAMES)
