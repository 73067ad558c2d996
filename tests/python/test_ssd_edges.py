"""The chunked scan at its edges: a test for each case and for each fault of upstream that concerns it."""

import functools
import importlib
import inspect
import itertools
import math

import pytest
import torch
from bad_calls import FAULTS, NO_FLOATS, NO_INDICES, assert_refused, spoil, thousand_examples
from compare import DTYPES, convert, evaluate, one_thread
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, ssd_selective_scan
from test_ssd import problem, recurrence, scan

TIMED = ("x", "dt", "B", "C", "z")
ALLOWED = {"f32": 1e-9, "bf16": 1e-4}  # of a GPU whose tensor cores take rounded factors
SMALL = {"heads": 8, "headdim": 16, "groups": 1, "d_state": 16}


def assert_recurrence(tensors, dtype="f32", **options):
    """Outputs and gradients, by their squared deviation over the square of the truth in float64."""
    outputs, gradients, cotangents = evaluate(functools.partial(scan, **options), tensors)
    reference = functools.partial(recurrence, **options)
    with one_thread():
        wide = [convert(t, torch.float64) for t in (tensors, cotangents)]
        truths = evaluate(reference, *wide)
    for name, result in (outputs | gradients).items():
        truth = (truths[0] | truths[1])[name]
        assert result.shape == truth.shape, name
        error = (result.cpu().double() - truth).square().sum().item()
        assert error <= ALLOWED[dtype] * truth.square().sum().item(), f"{name}: {error}"


def gradients(tensors, used=("out", "final"), **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = dict(zip(("out", "final"), scan(**leaves, **options), strict=True))
    loss = sum(results[name].float().square().sum() for name in used)
    grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def cut(tensors, rows, begin, end):
    return {
        name: t[rows, begin:end] if name in TIMED else t[rows] if name == "initial_states" else t
        for name, t in tensors.items()
    }


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- cases ----


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_step(device, dtype, reverse):
    assert_recurrence(problem(DTYPES[dtype], device, length=1), dtype, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}, {"length": 0, "batch": 0}], ids=str)
def test_no_steps_or_no_batch(device, size, reverse):
    tensors = problem(device=device, **size)
    out, final = scan(**tensors, reverse=reverse)
    assert out.shape == tensors["x"].shape
    assert torch.equal(final, tensors["initial_states"])
    for name, gradient in gradients(tensors, reverse=reverse).items():
        assert gradient.shape == tensors[name].shape
        expected = 2 * tensors[name] if name == "initial_states" else torch.zeros_like(gradient)
        assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("own_states", [False, True])
def test_no_steps_of_packed_sequences(device, own_states):
    tensors = problem(device=device, batch=1, length=0)
    states = torch.randn(3, *tensors["initial_states"].shape[1:], device=device)
    tensors["initial_states"] = states if own_states else None
    bounds = torch.zeros(4, dtype=torch.int32, device=device)
    out, final, varlen = scan(**tensors, cu_seqlens=bounds, return_varlen_states=True)
    assert out.numel() == 0 and final.shape == (1, *states.shape[1:])
    assert torch.equal(varlen, states if own_states else torch.zeros_like(states))


@pytest.mark.parametrize("length", [63, 64, 65, 127, 255, 256, 257, 300])
def test_length_that_is_no_multiple_of_a_chunk(device, length):
    """The public piece needs whole chunks, as upstream's."""
    tensors = problem(device=device, length=length, **SMALL)
    assert_recurrence(tensors)
    chunks = -(-length // 64)
    if length % 64:
        decays = torch.zeros(2, 8, chunks, 64, device=device)
        states = torch.zeros(2, chunks, 8, 16, 16, device=device)
        with pytest.raises(ValueError, match=f"got length {length}"):
            chunk_scan(*(tensors[n] for n in ("B", "C", "x")), decays, decays, states)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 48, 100, 128, 300, 4096])
def test_chunk_size_never_changes_a_result(device, chunk_size):
    tensors = problem(device=device, length=150)
    expected = gradients(tensors, chunk_size=256)
    for name, gradient in gradients(tensors, chunk_size=chunk_size).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale)
    for one, other in zip(scan(chunk_size, **tensors), scan(256, **tensors), strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("d_state", [1, 2, 3, 5, 15, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256])
def test_any_d_state(device, dtype, d_state):
    assert_recurrence(problem(DTYPES[dtype], device, **SMALL | {"d_state": d_state}), dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("headdim", [1, 3, 7, 16, 32, 64, 80, 96, 128, 256])
def test_any_headdim(device, dtype, headdim):
    assert_recurrence(problem(DTYPES[dtype], device, **SMALL | {"headdim": headdim}), dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_any_divisor_of_the_heads_may_be_the_groups(device, dtype, groups):
    shape = {"heads": 12, "headdim": 8, "groups": groups, "d_state": 8}
    assert_recurrence(problem(DTYPES[dtype], device, **shape), dtype)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("boundary", [1, 2, 15, 16, 63, 64, 65, 127, 128, 129, 255, 256, 257, 298])
def test_seq_idx_boundaries_anywhere(device, boundary, reverse):
    """Values and gradients; beside each boundary a sequence of one step, and in one row a tail of -1."""
    tensors = problem(device=device, length=300, **SMALL)
    del tensors["initial_states"]
    index = torch.zeros(2, 300, dtype=torch.int32, device=device)
    index[:, boundary:] = 1
    index[:, boundary + 1 :] = 2
    index[1, 299:] = -1
    weights = torch.randn_like(tensors["x"])

    def run(separate):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        if not separate:
            out = scan(**leaves, seq_idx=index, reverse=reverse)[0]
        else:
            rows = []
            for row in range(2):
                bounds = sorted({0, boundary, boundary + 1, 300 - row, 300})
                parts = [cut(leaves, slice(row, row + 1), *ab) for ab in itertools.pairwise(bounds)]
                rows.append(torch.cat([scan(**p, reverse=reverse)[0] for p in parts], dim=1))
            out = torch.cat(rows)
        grads = torch.autograd.grad((out * weights).sum(), [*leaves.values()])
        return dict(zip(("out", *leaves), (out, *grads), strict=True))

    packed, separate = run(False), run(True)
    for name, one in packed.items():
        scale = separate[name].abs().max().item()
        torch.testing.assert_close(one, separate[name], rtol=1e-3, atol=1e-4 * max(scale, 1))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_repeated_bounds_are_empty_sequences(device, index_dtype):
    tensors = problem(device=device, batch=1, length=9)
    states = torch.randn(6, *tensors["initial_states"].shape[1:], device=device)
    bounds = torch.tensor([0, 0, 5, 5, 5, 9, 9], dtype=index_dtype, device=device)
    options = {"cu_seqlens": bounds, "return_varlen_states": True}
    own = scan(**tensors | {"initial_states": states}, **options)[-1]
    none = scan(**tensors | {"initial_states": None}, **options)[-1]
    for empty in (0, 2, 3, 5):
        assert torch.equal(own[empty], states[empty])
        assert not none[empty].any()
    assert none[[1, 4]].any()


def test_bounds_alone_change_nothing(device):
    """Sequences come from seq_idx where varlen states are not asked for."""
    tensors = problem(device=device, batch=1, length=20)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    for one, other in zip(scan(**tensors, cu_seqlens=bounds), scan(**tensors), strict=True):
        assert torch.equal(one, other)


def test_ids_are_compared_alone(device):
    """Also where an id comes again, and -1 is an id as others."""
    tensors = problem(device=device, length=30)
    first = torch.tensor([0] * 9 + [1] * 9 + [2] * 12, dtype=torch.int32, device=device)
    again = torch.tensor([7] * 9 + [-1] * 9 + [7] * 12, dtype=torch.int32, device=device)
    results = [scan(**tensors, seq_idx=ids.expand(2, -1)) for ids in (first, again)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_initial_states_without_a_gradient_get_none(device):
    tensors = problem(device=device, length=20)
    leaves = {n: t if n == "initial_states" else t.requires_grad_() for n, t in tensors.items()}
    scan(**leaves)[0].sum().backward()
    assert tensors["initial_states"].grad is None and tensors["x"].grad.abs().sum() > 0
    zeros = tensors | {"initial_states": torch.zeros_like(tensors["initial_states"])}
    absent = scan(**tensors | {"initial_states": None})
    for one, other in zip(scan(**zeros), absent, strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("limit", [(0.05, math.inf), (0.0, 0.2), (0.1, 0.1), (0.05, 0.2)], ids=str)
def test_dt_limit_clamps_after_softplus_and_stops_the_gradient(device, limit, softplus):
    tensors = problem(device=device, length=40)
    assert_recurrence(tensors, dt_limit=limit, dt_softplus=softplus)
    delta = tensors["dt"] + tensors["dt_bias"]
    delta = torch.nn.functional.softplus(delta) if softplus else delta
    outside = (delta < limit[0]) | (delta > limit[1])
    gradient = gradients(tensors, dt_limit=limit, dt_softplus=softplus)["dt"]
    assert outside.any() and not gradient[outside].any()
    if limit[0] < limit[1]:
        assert gradient[~outside].all()


def test_negative_steps_without_softplus_stand_still(device):
    """The default limit makes them 0."""
    tensors = problem(device=device, length=40)
    tensors["dt"] = -tensors["dt"].abs()
    out, final = scan(**tensors, dt_softplus=False)
    assert torch.equal(final, tensors["initial_states"])
    C = tensors["C"].repeat_interleave(2, dim=2)
    y = torch.einsum("bhpn,blhn->blhp", final, C) + tensors["D"][:, None] * tensors["x"]
    close(out, y * torch.nn.functional.silu(tensors["z"]))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("given", [True, False])
def test_D_of_a_channel_or_of_a_head_or_none(device, dtype, given):
    tensors = problem(DTYPES[dtype], device)
    channels = torch.rand(4, 12, device=device) if given else None
    assert_recurrence(tensors | {"D": channels}, dtype)
    heads = tensors["D"][:, None].expand(4, 12)
    for one, other in zip(scan(**tensors | {"D": heads}), scan(**tensors), strict=True):
        close(one, other, 1e-5 if dtype == "f32" else 1e-2)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_states"])
def test_what_is_optional_may_be_absent(device, absent):
    assert_recurrence(problem(device=device) | {absent: None})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C", "A", "D", "dt_bias", "initial_states"])
def test_expanded_sliced_and_misaligned_inputs(device, dtype, name):
    tensors = problem(DTYPES[dtype], device)
    tensor = tensors[name]
    wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 5))
    wide[..., 3:-2] = tensor
    flat = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    expanded = tensor[:1].expand(tensor.shape)
    views = [wide[..., 3:-2], flat, expanded]
    if tensor.dim() > 1:
        views.append(tensor.transpose(0, -1).contiguous().transpose(0, -1))
        views.append(tensor.transpose(1, -1).contiguous().transpose(1, -1))
    for view in views:
        got = scan(**tensors | {name: view})
        expected = scan(**tensors | {name: view.contiguous()})
        tolerance = 1e-4 if dtype == "f32" else 1e-2
        for one, other in zip(got, expected, strict=True):
            close(one, other, tolerance)
        got = gradients(tensors | {name: view})
        for each, gradient in gradients(tensors | {name: view.contiguous()}).items():
            scale = gradient.abs().max().item()
            assert got[each].shape == gradient.shape
            torch.testing.assert_close(got[each], gradient, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("used", ["out", "final"])
def test_gradient_through_one_result_alone(device, used):
    tensors = problem(device=device)
    whole, alone = gradients(tensors), gradients(tensors, (used,))
    rest = gradients(tensors, ("final" if used == "out" else "out",))
    for name, together in whole.items():
        parts = [g[name] for g in (alone, rest) if g[name] is not None]
        torch.testing.assert_close(together, sum(parts), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    tensors = {name: t.requires_grad_() for name, t in problem(device=device, length=9).items()}
    with context():
        out, final = scan(**tensors)
    assert not out.requires_grad and not final.requires_grad


def test_autocast_takes_dtypes_as_given(device):
    tensors = problem(device=device, length=20)
    expected = scan(**tensors)
    with torch.autocast(device, torch.bfloat16):
        got = scan(**tensors)
    assert got[0].dtype == torch.float32
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C"])
@pytest.mark.parametrize("value", [None, 1.0, [1.0]])
def test_what_is_no_tensor_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        scan(**problem(length=4) | {name: value})


NAMES = ("x", "dt", *"ABCDz", "dt_bias", "initial_states", "seq_idx", "cu_seqlens", "tensors")


@st.composite
def bad_calls(draw):
    """Arguments by name, one of them spoilt."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    packed = draw(st.sampled_from(["", "seq_idx", "cu_seqlens"]))
    batch, length = (
        1 if packed == "cu_seqlens" else draw(st.integers(2, 3)),
        draw(st.integers(2, 9)),
    )
    shape = {"batch": batch, "length": length, "d_state": draw(st.integers(2, 5))}
    tensors = problem(dtype, headdim=draw(st.integers(2, 5)), **shape)
    if draw(st.booleans()):
        tensors["D"] = torch.rand(tensors["x"].shape[2:])
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    if packed == "seq_idx":
        tensors["seq_idx"] = torch.zeros(batch, length, dtype=index)
    elif packed:
        tensors["cu_seqlens"] = torch.tensor([0, 1, length], dtype=index)
        tensors["initial_states"] = tensors["initial_states"].repeat(2, 1, 1, 1)
    name, fault = draw(st.sampled_from(list(tensors))), draw(st.sampled_from(FAULTS))
    axes, dtypes = {"B": [0, 1, 3], "C": [0, 1, 3]}.get(name), NO_FLOATS
    if name in ("seq_idx", "cu_seqlens"):
        dtypes = NO_INDICES
    if name == "cu_seqlens" and fault in ("longer", "shorter", "meta"):
        fault = "deeper"  # another number of sequences; on any device
    if name == "D" and fault == "flat" and tensors["D"].dim() == 2:
        fault = "deeper"
    spoilt = spoil(draw, tensors[name], fault, axes, dtypes)
    return tensors | {name: spoilt, "return_varlen_states": packed == "cu_seqlens"}


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    assert_refused(mamba_chunk_scan_combined, names=NAMES, chunk_size=8, **arguments)


# ---- identities of gradients ----


def assert_same_gradients(got, expected, tolerance=1e-3):
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=tolerance, atol=tolerance * scale)


def test_gradients_are_those_of_a_selective_scan_with_tied_A(device):
    tensors = problem(device=device)
    del tensors["initial_states"]

    def run(function):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = function(**leaves, dt_softplus=True).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))

    assert_same_gradients(
        run(functools.partial(mamba_chunk_scan_combined, chunk_size=16)), run(ssd_selective_scan)
    )


def test_gradients_of_the_reverse_scan_are_flipped(device):
    tensors = problem(device=device)
    flipped = {name: t.flip(1) if name in TIMED else t for name, t in tensors.items()}
    expected = gradients(flipped)
    expected = {name: g.flip(1) if name in TIMED else g for name, g in expected.items()}
    assert_same_gradients(gradients(tensors, reverse=True), expected)


@pytest.mark.parametrize("split", [1, 33, 64, 69])
def test_gradients_flow_through_the_state_between_two_parts(device, split):
    tensors = problem(device=device)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    every = slice(None)
    first, states = scan(**cut(leaves, every, 0, split))
    second, final = scan(**cut(leaves, every, split, 70) | {"initial_states": states})
    loss = sum(t.square().sum() for t in (first, second, final))
    parts = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))
    assert_same_gradients(parts, gradients(tensors))


def test_gradients_of_groups_are_sums_over_their_heads(device):
    tensors = problem(device=device)
    wide = tensors | {n: tensors[n].repeat_interleave(2, dim=2) for n in ("B", "C")}
    expected = gradients(wide)
    for name in ("B", "C"):
        expected[name] = expected[name].unflatten(2, (2, 2)).sum(3)
    assert_same_gradients(gradients(tensors), expected)


# ---- faults of upstream ----


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("length", [255, 257, 300])
def test_upstream_fault_7_no_nan_in_a_ragged_last_chunk(device, dtype, length):
    """exp of what decays by thousands, and of nothing behind the last step: finite everywhere."""
    tensors = problem(DTYPES[dtype], device, length=length, **SMALL)
    tensors["A"] = tensors["A"] * 200
    tensors["dt_bias"] = tensors["dt_bias"] + 6
    results = [*scan(**tensors), *gradients(tensors).values()]
    assert all(t.isfinite().all() for t in results)
    tolerance = 1e-5 if dtype == "f32" else 2e-2
    for one, other in zip(results[:2], recurrence(**tensors), strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("length", [255, 257, 300])
def test_upstream_fault_7_what_lies_behind_the_last_step_takes_no_part(device, length):
    """NaN in the memory of a longer tensor, of which the scan gets the beginning."""
    tensors = problem(device=device, length=length, **SMALL)
    longer = {}
    for name, t in tensors.items():
        if name in TIMED:
            memory = torch.full((2, 320, *t.shape[2:]), math.nan, device=device)
            memory[:, :length] = t
            t = memory[:, :length]
        longer[name] = t
    for one, other in zip(scan(**longer), scan(**tensors), strict=True):
        close(one, other, 1e-5)
    assert_same_gradients(gradients(longer), gradients(tensors))


@pytest.mark.parametrize("first_id", [0, 1, 5, -1])
def test_upstream_fault_25_initial_states_enter_whatever_the_id(device, first_id):
    tensors = problem(device=device, length=20)
    ids = torch.full((2, 20), first_id, dtype=torch.int32, device=device)
    for one, other in zip(scan(**tensors, seq_idx=ids), scan(**tensors), strict=True):
        close(one, other, 1e-5)


def test_upstream_fault_25_initial_states_reach_a_sequence_within_one_chunk(device):
    tensors = problem(device=device, batch=1, length=20)
    bounds = torch.tensor([0, 7, 20], device=device)
    varlen = scan(**tensors, cu_seqlens=bounds, return_varlen_states=True)[-1]
    close(varlen[:1], scan(**cut(tensors, slice(None), 0, 7))[1])


# ---- torch's own machinery ----


class Scan(torch.nn.Module):
    def forward(self, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx):
        tensors = (D, z, dt_bias, initial_states, seq_idx)
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, 64, *tensors, dt_softplus=True, return_final_states=True
        )


def with_ids(tensors):
    batch, length = tensors["dt"].shape[:2]
    ids = (torch.arange(length, device=tensors["dt"].device) // 7).to(torch.int32)
    return tensors | {"seq_idx": ids.expand(batch, -1).contiguous()}


def test_exports_with_a_free_length(device):
    length = torch.export.Dim("length", min=2, max=500)
    tensors = with_ids(problem(device=device, length=20))
    shapes = {n: {1: length} if n in (*TIMED, "seq_idx") else None for n in tensors}
    exported = torch.export.export(Scan(), (), tensors, dynamic_shapes=shapes)
    longer = with_ids(problem(device=device, length=300, seed=1))
    for one, other in zip(exported.module()(**longer), Scan()(**longer), strict=True):
        close(one, other)


@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_forward_stores_states_for_a_backward_alone(device, grad):
    stored = []

    def backend(graph, inputs):
        stored.extend(n.args[-1] for n in graph.graph.nodes if "ssd_forward" in str(n.target))
        return graph.forward

    leaves = {name: t.requires_grad_() for name, t in problem(device=device, length=20).items()}
    with torch.set_grad_enabled(grad):
        torch.compile(lambda **t: scan(**t), fullgraph=True, backend=backend)(**leaves)
    assert stored == [grad]


@pytest.mark.parametrize("reverse", [False, True])
def test_compiles_with_packed_sequences(device, reverse):
    """A graph for every length, with a state for each sequence."""
    run = functools.partial(scan, return_varlen_states=True, reverse=reverse)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33):
        tensors = problem(device=device, batch=1, length=length)
        tensors["initial_states"] = tensors["initial_states"].repeat(3, 1, 1, 1)
        bounds = torch.tensor([0, 7, 7, length], dtype=torch.int32, device=device)
        results = []
        for function in (compiled, run):
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            outs = function(**leaves, cu_seqlens=bounds)
            grads = torch.autograd.grad(sum(o.square().sum() for o in outs), [*leaves.values()])
            results.append((*outs, *grads))
        for one, other in zip(*results, strict=True):
            close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [70, 1600])
def test_forward_and_backward_replay_from_a_cuda_graph(dtype, length):
    shape = {"length": length, "headdim": 64, "d_state": 64, "heads": 8}
    given, others = (problem(dtype, "cuda", **shape, seed=seed) for seed in (0, 1))
    leaves = {name: t.requires_grad_() for name, t in given.items()}

    def train(tensors):
        out, final = scan(**tensors)
        loss = out.float().square().sum() + final.square().sum()
        return out, final, *torch.autograd.grad(loss, [*tensors.values()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = train(leaves)
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(others[name])
    graph.replay()
    expected = train({name: t.detach().requires_grad_() for name, t in others.items()})
    for got, wanted in zip(replayed, expected, strict=True):
        scale = wanted.abs().max().item()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)


# ---- names and arguments ----

INF = "(0.0, inf)"
SCAN = "x dt A B C"
GATED = "D=None z=None dt_bias=None"
SIGNATURES = {
    "ssd_combined.mamba_chunk_scan_combined": f"{SCAN} chunk_size {GATED} initial_states=None "
    f"seq_idx=None cu_seqlens=None dt_softplus=False dt_limit={INF} return_final_states=False "
    "return_varlen_states=False state_dtype=None",
    "ssd_combined.mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D "
    f"chunk_size initial_states=None seq_idx=None dt_limit={INF} return_final_states=False "
    "activation=silu rmsnorm_weight=None rmsnorm_eps=1e-06 outproj_weight=None outproj_bias=None "
    "headdim=None ngroups=1 norm_before_gate=True state_dtype=None",
    "ssd_combined.mamba_chunk_scan": f"{SCAN} chunk_size {GATED} dt_softplus=False",
    "ssd_combined.ssd_chunk_scan_combined_ref": f"{SCAN} chunk_size {GATED} dt_softplus=False",
    "ssd_combined.ssd_selective_scan": f"{SCAN} {GATED} dt_softplus=False dt_limit={INF}",
    "ssd_combined.mamba_conv1d_scan_ref": "xBC conv1d_weight conv1d_bias dt A chunk_size "
    f"{GATED} dt_softplus=False dt_limit={INF} activation=silu headdim=None ngroups=1",
    "ssd_combined.mamba_split_conv1d_scan_ref": "zxbcdt conv1d_weight conv1d_bias dt_bias A D "
    f"chunk_size dt_limit={INF} activation=silu rmsnorm_weight=None rmsnorm_eps=1e-06 "
    "outproj_weight=None outproj_bias=None headdim=None ngroups=1 norm_before_gate=True",
    "ssd_combined.selective_scan_bwd": "dout x dt A B C D=None z=None",
    "ssd_combined.ensure_stride": "inp",
    "ssd_combined._mamba_chunk_scan_combined_fwd": f"{SCAN} chunk_size {GATED} initial_states=None "
    f"seq_idx=None cu_seqlens=None dt_softplus=False dt_limit={INF} state_dtype=None",
    "ssd_combined._mamba_chunk_scan_combined_bwd": f"dout {SCAN} out chunk_size {GATED} "
    f"initial_states=None dfinal_states=None seq_idx=None dt_softplus=False dt_limit={INF} dx=None "
    "ddt=None dB=None dC=None dz=None recompute_output=False state_dtype=None",
    "ssd_combined._chunk_scan_chunk_state_bwd_dx": "x dt dA_cumsum B CB dout dstates D=None "
    "seq_idx=None dx=None",
    "ssd_chunk_state.chunk_state": "B x dt dA_cumsum states_in_fp32=True",
    "ssd_chunk_state.chunk_state_ref": "B x dt dA_cumsum",
    "ssd_chunk_state.chunk_state_varlen": "B x dt dA_cumsum cu_seqlens chunk_states",
    "ssd_chunk_state._chunk_cumsum_fwd": f"dt A chunk_size dt_bias=None dt_softplus=False "
    f"dt_limit={INF}",
    "ssd_chunk_state._chunk_state_fwd": "B x dt dA_cumsum seq_idx=None states=None "
    "states_in_fp32=True",
    "ssd_chunk_state._chunk_state_bwd_dx": "B x dt dA_cumsum dstates dx=None",
    "ssd_chunk_state._chunk_state_bwd_db": "x dt dA_cumsum dstates seq_idx=None B=None ngroups=1",
    "ssd_chunk_state._chunk_state_bwd_ddAcs_stable": "B x dt dA_cumsum dstates seq_idx=None",
    "ssd_state_passing.state_passing": "states dA_chunk_cumsum initial_states=None",
    "ssd_state_passing.state_passing_ref": "states dA_chunk_cumsum initial_states=None",
    "ssd_chunk_scan.chunk_scan": "B C x dt dA_cumsum prev_states D=None z=None",
    "ssd_chunk_scan.chunk_scan_ref": "B C x dt dA_cumsum prev_states D=None z=None",
    "ssd_bmm._bmm_chunk_fwd": "a b chunk_size seq_idx=None causal=False output_dtype=None",
    "ssd_bmm._bmm_chunk_bwd": "a dout residual=None out=None",
}
OURS = {  # arguments that upstream's has not, behind those that it has
    "ssd_combined.mamba_chunk_scan_combined": ["reverse=False"],
}
OTHERS = {
    "ssd_combined": "MambaChunkScanCombinedFn MambaSplitConv1dScanCombinedFn",
    "ssd_chunk_state": "ChunkStateFn _chunk_cumsum_bwd",
    "ssd_state_passing": "StatePassingFn _state_passing_fwd _state_passing_bwd",
    "ssd_chunk_scan": "ChunkScanFn _chunk_scan_fwd _chunk_scan_bwd_dz _chunk_scan_bwd_dstates "
    "_chunk_scan_bwd_dC _chunk_scan_bwd_dcb _chunk_scan_bwd_dx _chunk_scan_bwd_ddAcs_stable "
    "_chunk_scan_bwd_ddAcs_unstable _chunk_scan_bwd_ddAcs_prev",
}


def found(name):
    module, name = name.split(".")
    return getattr(importlib.import_module(f"mamba_ssm.ops.triton.{module}"), name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name):
    expected = SIGNATURES[name].replace(INF, "(0.0,inf)").split()
    parameters = inspect.signature(found(name)).parameters.values()
    got = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    got = [argument.replace(", ", ",") for argument in got]
    assert got[: len(expected)] == expected
    assert got[len(expected) :] == OURS.get(name, [])


@pytest.mark.parametrize(
    "name", [f"{module}.{name}" for module, names in OTHERS.items() for name in names.split()]
)
def test_names_that_tests_and_forks_import(name):
    assert callable(found(name))
