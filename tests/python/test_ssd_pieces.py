"""The pieces of the chunked scan, forward and backward, against the scan and against autograd."""

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import (
    ChunkScanFn,
    _chunk_scan_bwd_dC,
    _chunk_scan_bwd_dcb,
    _chunk_scan_bwd_ddAcs_prev,
    _chunk_scan_bwd_ddAcs_stable,
    _chunk_scan_bwd_ddAcs_unstable,
    _chunk_scan_bwd_dstates,
    _chunk_scan_bwd_dx,
    _chunk_scan_bwd_dz,
    _chunk_scan_fwd,
    chunk_scan,
    chunk_scan_ref,
)
from mamba_ssm.ops.triton.ssd_chunk_state import (
    ChunkStateFn,
    _chunk_cumsum_bwd,
    _chunk_cumsum_fwd,
    _chunk_state_bwd_db,
    _chunk_state_bwd_ddAcs_stable,
    _chunk_state_bwd_dx,
    _chunk_state_fwd,
    chunk_state,
    chunk_state_ref,
    chunk_state_varlen,
)
from mamba_ssm.ops.triton.ssd_combined import (
    _chunk_scan_chunk_state_bwd_dx,
    _mamba_chunk_scan_combined_bwd,
    _mamba_chunk_scan_combined_fwd,
    ensure_stride,
    mamba_chunk_scan_combined,
    selective_scan_bwd,
    ssd_selective_scan,
)
from mamba_ssm.ops.triton.ssd_state_passing import (
    StatePassingFn,
    _state_passing_bwd,
    _state_passing_fwd,
    state_passing,
    state_passing_ref,
)

BATCH, HEADS, HEADDIM, GROUPS, D_STATE, CHUNK = 2, 4, 3, 2, 5, 8
LIMITS = {"dt_softplus": True, "dt_limit": (0.1, 0.9)}
IDS = {
    "one_sequence": None,
    "packed": [[0] * 3 + [1] * 9 + [2] * 8 + [3], [4] * 16 + [5] * 5],
}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=IDS)
def seq_idx(request):
    ids = IDS[request.param]
    return None if ids is None else torch.tensor(ids, dtype=torch.int32)


@pytest.fixture
def given():
    """float64: what is left is no rounding."""
    length = 21

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64)

    return {
        "x": randn(BATCH, length, HEADS, HEADDIM),
        "dt": randn(BATCH, length, HEADS),
        "A": -torch.rand(HEADS, dtype=torch.float64) - 0.1,
        "B": randn(BATCH, length, GROUPS, D_STATE),
        "C": randn(BATCH, length, GROUPS, D_STATE),
        "D": randn(HEADS),
        "z": randn(BATCH, length, HEADS, HEADDIM),
        "dt_bias": randn(HEADS),
        "initial_states": randn(BATCH, HEADS, HEADDIM, D_STATE),
    }


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def by_pieces(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx):
    """The scan from forward pieces: (out, final states, dict of what lies between)."""
    dA_cumsum, delta = _chunk_cumsum_fwd(dt, A, CHUNK, dt_bias, **LIMITS)
    added = _chunk_state_fwd(B, x, delta, dA_cumsum, seq_idx)
    entering, final = _state_passing_fwd(
        added.flatten(-2), dA_cumsum[..., -1], initial_states.flatten(-2), seq_idx, CHUNK
    )
    entering = entering.view_as(added)
    cb = _bmm_chunk_fwd(C, B, CHUNK, seq_idx)
    out, out_x = _chunk_scan_fwd(cb, x, delta, dA_cumsum, C, entering, D, z, seq_idx)
    between = {"dt": delta, "dA_cumsum": dA_cumsum, "states": entering, "out_x": out_x, "cb": cb}
    return out, final.view_as(initial_states), between


def test_forward_pieces_make_the_scan(given, seq_idx):
    out, final, between = by_pieces(**given, seq_idx=seq_idx)
    options = LIMITS | {"chunk_size": CHUNK, "seq_idx": seq_idx}
    expected = mamba_chunk_scan_combined(**given, **options, return_final_states=True)
    close(out, expected[0])
    close(final, expected[1])
    out, out_x, dt, dA_cumsum, states, final = _mamba_chunk_scan_combined_fwd(**given, **options)
    close(out, expected[0])
    close(final, expected[1])
    for name, tensor in {
        "out_x": out_x,
        "dt": dt,
        "dA_cumsum": dA_cumsum,
        "states": states,
    }.items():
        close(tensor, between[name])


def test_varlen_states_of_the_private_forward(given):
    one = {name: t[:1] if t.dim() > 2 or name == "dt" else t for name, t in given.items()}
    del one["initial_states"], one["z"]
    cu_seqlens = torch.tensor([0, 4, 4, 17, 21])
    ids = torch.arange(4).repeat_interleave(cu_seqlens.diff()).unsqueeze(0).int()
    options = LIMITS | {"chunk_size": CHUNK, "cu_seqlens": cu_seqlens}
    *_, final, varlen = _mamba_chunk_scan_combined_fwd(**one, **options, seq_idx=ids)
    expected = mamba_chunk_scan_combined(**one, **options, return_varlen_states=True)[1]
    close(varlen, expected)
    close(final, expected[-1:])


def test_backward_pieces_make_the_gradient(given, seq_idx):
    """Put together as the chunked backward pass is derived."""
    out, final, t = by_pieces(**given, seq_idx=seq_idx)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    leaves = {name: leaf(value) for name, value in given.items()}
    results = mamba_chunk_scan_combined(
        **leaves, **LIMITS, chunk_size=CHUNK, seq_idx=seq_idx, return_final_states=True
    )
    grads = torch.autograd.grad(results, leaves.values(), (dout, dfinal))
    expected = dict(zip(leaves, grads, strict=True))

    x, B, C, D = (given[name] for name in "xBCD")
    delta, sums, states, cb = (t[name] for name in ("dt", "dA_cumsum", "states", "cb"))
    dz, g, dD, ddA_cumsum, outz = _chunk_scan_bwd_dz(
        x, given["z"], t["out_x"], dout, CHUNK, D=D, recompute_output=True
    )
    close(dz, expected["z"])
    close(dD, expected["D"])
    close(outz, out)
    dentering = _chunk_scan_bwd_dstates(C, sums, g, seq_idx)
    dadded, ddA_chunk, dinitial = _state_passing_bwd(
        states.flatten(-2),
        sums[..., -1],
        dentering.flatten(-2),
        dfinal.flatten(-2),
        seq_idx,
        has_initial_states=True,
        chunk_size=CHUNK,
    )
    close(dinitial.view_as(final), expected["initial_states"])
    dadded = dadded.view_as(states)
    dx, ddt, dD = _chunk_scan_chunk_state_bwd_dx(x, delta, sums, B, cb, g, dadded, D, seq_idx)
    close(dx, expected["x"])
    close(dD, expected["D"])
    dB, _ = _chunk_state_bwd_db(x, delta, sums, dadded, seq_idx, B=B)
    close(_chunk_state_bwd_db(x, delta, sums, dadded, seq_idx, ngroups=GROUPS), dB)
    dC, ddA_prev = _chunk_scan_bwd_dC(states, sums, g, seq_idx, C=C)
    close(_chunk_scan_bwd_dC(states, sums, g, seq_idx, ngroups=GROUPS), dC)
    close(_chunk_scan_bwd_ddAcs_prev(states, C, g, sums, seq_idx), ddA_prev)
    dcb, ddA_within = _chunk_scan_bwd_dcb(x, delta, sums, g, seq_idx, CB=cb)
    close(_chunk_scan_bwd_dcb(x, delta, sums, g, seq_idx, ngroups=GROUPS), dcb)
    close(_bmm_chunk_bwd(C, dcb, residual=dB), expected["B"])
    close(_bmm_chunk_bwd(B, dcb.mT, residual=dC), expected["C"])

    ddA_prev[..., -1] += ddA_chunk
    ddA = ddA_prev.flip(-1).cumsum(-1).flip(-1) + ddA_within
    ddA = ddA + _chunk_state_bwd_ddAcs_stable(B, x, delta, sums, dadded, seq_idx)
    ddt, dA, ddt_bias = _chunk_cumsum_bwd(
        ddA, ddt, given["dt"], given["A"], given["dt_bias"], **LIMITS
    )
    close(ddt, expected["dt"])
    close(dA, expected["A"])
    close(ddt_bias, expected["dt_bias"])


def test_the_unstable_form_is_the_stable_one_where_nothing_cancels(given):
    t = by_pieces(**given, seq_idx=None)[2]
    x, D = given["x"], given["D"]
    delta, sums, cb = t["dt"], t["dA_cumsum"], t["cb"]
    dout = torch.randn_like(x)
    zero = torch.zeros_like(t["states"])
    out, _ = _chunk_scan_fwd(cb, x, delta, sums, given["C"], zero, D)
    dx, ddt = _chunk_scan_bwd_dx(cb, x, delta, sums, dout, D)
    unstable, dD = _chunk_scan_bwd_ddAcs_unstable(x, delta, out, dout, ddt, D)
    stable = _chunk_scan_bwd_ddAcs_stable(x, delta, sums, dout, cb)
    close(unstable.flip(-1).cumsum(-1).flip(-1), stable)
    close(dD, (dout * x).sum((0, 1, 3)))
    leaves = [leaf(v) for v in (x, delta)]
    results = _chunk_scan_fwd(cb, leaves[0], leaves[1], sums, given["C"], zero, D)[0]
    for got, expected in zip((dx, ddt), torch.autograd.grad(results, leaves, dout), strict=True):
        close(got, expected)


def test_gradient_of_the_state_of_a_chunk(given):
    sums, delta = _chunk_cumsum_fwd(given["dt"], given["A"], CHUNK, given["dt_bias"], **LIMITS)
    leaves = [leaf(t) for t in (given["B"], given["x"], delta, sums)]
    states = chunk_state_ref(*leaves)
    dstates = torch.randn_like(states)
    dB, *expected = torch.autograd.grad(states, leaves, dstates)
    buffer = torch.empty_like(given["x"])
    dx, ddt, ddA_cumsum = _chunk_state_bwd_dx(
        given["B"], given["x"], delta, sums, dstates, dx=buffer
    )
    assert dx is buffer
    for got, wanted in zip((dx, ddt, ddA_cumsum), expected, strict=True):
        close(got, wanted)
    stable = _chunk_state_bwd_ddAcs_stable(given["B"], given["x"], delta, sums, dstates)
    close(stable, ddA_cumsum.flip(-1).cumsum(-1).flip(-1))
    close(_chunk_state_bwd_db(given["x"], delta, sums, dstates, B=given["B"]), (dB, ddA_cumsum))


def test_the_private_backward_is_autograds(given):
    leaves = {name: leaf(value) for name, value in given.items()}
    out, final = mamba_chunk_scan_combined(
        **leaves, **LIMITS, chunk_size=CHUNK, return_final_states=True
    )
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    expected = torch.autograd.grad((out, final), leaves.values(), (dout, dfinal))
    buffer = torch.empty_like(given["x"])
    positional = {name: given[name] for name in ("x", "dt", "A", "B", "C")}
    rest = {name: given[name] for name in ("D", "z", "dt_bias", "initial_states")}
    *grads, outz = _mamba_chunk_scan_combined_bwd(
        dout,
        *positional.values(),
        None,
        CHUNK,
        **rest,
        **LIMITS,
        dfinal_states=dfinal,
        dx=buffer,
        recompute_output=True,
    )
    assert grads[0] is buffer
    close(outz, out)
    for got, wanted in zip(grads, expected, strict=True):
        close(got, wanted)
    grads = _mamba_chunk_scan_combined_bwd(dout, *positional.values(), None, CHUNK)
    assert len(grads) == 9 and grads[5] is grads[6] is grads[7] is grads[8] is None


def test_selective_scan_bwd(given):
    names = ("x", "dt", "A", "B", "C", "D", "z")
    dt = F.softplus(given["dt"])
    leaves = [leaf(dt if name == "dt" else given[name]) for name in names]
    out = ssd_selective_scan(*leaves)
    dout = torch.randn_like(out)
    grads = selective_scan_bwd(dout, *(value.detach() for value in leaves))
    for got, wanted in zip(grads, torch.autograd.grad(out, leaves, dout), strict=True):
        close(got, wanted)


CLASSES = {
    "chunk_state": (ChunkStateFn, chunk_state, chunk_state_ref, ("B", "x", "dt", "dA_cumsum")),
    "state_passing": (
        StatePassingFn,
        state_passing,
        state_passing_ref,
        ("states", "decay", "initial_states"),
    ),
    "chunk_scan": (
        ChunkScanFn,
        chunk_scan,
        chunk_scan_ref,
        ("B", "C", "x", "dt", "dA_cumsum", "entering", "D", "z"),
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_public_pieces_keep_their_arguments_alone(name, device):
    """And have the gradient of their formulas, in float32 under autocast too."""
    function_class, function, reference, arguments = CLASSES[name]
    shapes = {
        "B": (2, 16, 2, 5),
        "C": (2, 16, 2, 5),
        "x": (2, 16, 4, 3),
        "z": (2, 16, 4, 3),
        "D": (4, 3),
        "dt": (2, 4, 2, 8),
        "dA_cumsum": (2, 4, 2, 8),
        "entering": (2, 2, 4, 3, 5),
        "states": (2, 2, 4, 15),
        "decay": (2, 4, 2),
        "initial_states": (2, 4, 15),
    }
    values = {n: torch.randn(shapes[n], device=device) for n in arguments}
    for n in ("dA_cumsum", "decay"):
        if n in values:
            values[n] = -values[n].abs().cumsum(-1)
    results = []
    for run in (reference, function):
        leaves = [leaf(value) for value in values.values()]
        kept = set()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t
        )
        with hooks, torch.autocast(device, torch.bfloat16, enabled=run is function):
            outs = run(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.manual_seed(7)
        douts = [torch.randn_like(out) for out in outs]
        results.append((*outs, *torch.autograd.grad(outs, leaves, douts)))
    assert kept <= {v.untyped_storage().data_ptr() for v in leaves}
    assert function_class.__name__ in type(outs[0].grad_fn).__name__
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-5)


def test_states_may_be_given_and_narrow(given):
    sums, delta = _chunk_cumsum_fwd(given["dt"], given["A"], CHUNK)
    inputs = (given["B"].half(), given["x"].half(), delta.float(), sums.float())
    assert chunk_state(*inputs).dtype == torch.float32
    narrow = chunk_state(*inputs, states_in_fp32=False)
    assert narrow.dtype == torch.float16
    buffer = torch.empty_like(narrow)
    assert _chunk_state_fwd(*inputs, states=buffer, states_in_fp32=False) is buffer
    assert torch.equal(buffer, narrow)
    passed, final = _state_passing_fwd(
        chunk_state(*inputs).flatten(-2), sums[..., -1].float(), out_dtype=torch.bfloat16
    )
    assert passed.dtype == torch.bfloat16 and final.dtype == torch.float32
    *_, cast = _state_passing_bwd(
        passed, sums[..., -1].float(), passed, dstates_dtype=torch.float32, states_dtype=torch.half
    )
    assert cast.dtype == torch.half and _[0].dtype == torch.float32 and _[2] is None


def test_padding_at_the_end_of_a_chunk_adds_no_state(given):
    """A negative index is no sequence."""
    sums, delta = _chunk_cumsum_fwd(given["dt"], given["A"], CHUNK)
    ids = torch.tensor([[0] * 12 + [-1] * 9] * 2)
    states = _chunk_state_fwd(given["B"], given["x"], delta, sums, ids)
    assert states[:, 0].abs().min() > 0 and not states[:, 1:].any()


def test_chunk_state_varlen_takes_no_state_across_sequences(given):
    sums, delta = _chunk_cumsum_fwd(given["dt"], given["A"], CHUNK, given["dt_bias"], **LIMITS)
    one = (given["B"][0], given["x"][0], delta[0], sums[0])
    bounds = torch.tensor([0, 8, 10, 16, 21])
    poison = torch.full((3, HEADS, HEADDIM, D_STATE), torch.nan, dtype=torch.float64)
    poison[0] = 0
    assert chunk_state_varlen(*one, bounds, poison).isfinite().all()


def test_ensure_stride():
    even, odd = torch.zeros(2, 3, 16)[..., :5], torch.zeros(2, 3, 9)[..., :5]
    assert ensure_stride(even) is even
    assert ensure_stride(odd).is_contiguous() and torch.equal(ensure_stride(odd), odd)
