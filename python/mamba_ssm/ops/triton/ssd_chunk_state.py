"""What every chunk adds to the state, in plain PyTorch: a piece of the chunked scan for code that takes it apart.

Names and results of the private functions are those that clients import; "ddA_cumsum" is the gradient of dA_cumsum,
"ddA" that of the exponents whose sum it is.
"""

import torch
import torch.nn.functional as F

from mamba_ssm.native import vmap
from mamba_ssm.ops.chunks import ids_in_chunks, in_chunks, store, wide
from mamba_ssm.ops.recompute import gradients_of, recomputed


def _chunk_cumsum_fwd(
    dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):
    """dt: (B, L, H); A, dt_bias: (H). Returns (dA_cumsum, delta), both (B, H, chunks, chunk_size) float32.

    delta is dt + dt_bias, through softplus if asked for, clamped to dt_limit, and 0 beyond L; dA_cumsum is the sum of
    delta A from the chunk's first step on.
    """
    dA, delta = _steps(dt, A, dt_bias, chunk_size, dt_softplus, dt_limit)
    return torch.cumsum(dA, dim=-1), delta


def _steps(dt, A, dt_bias, chunk_size, dt_softplus, dt_limit):
    """(delta A, delta), both (B, H, chunks, chunk_size)."""
    delta = wide(dt) if dt_bias is None else wide(dt) + dt_bias.to(wide(dt).dtype)
    delta = (F.softplus(delta, threshold=20.0) if dt_softplus else delta).clamp(*dt_limit)
    delta = in_chunks(delta, chunk_size).permute(0, 3, 1, 2)
    return delta * A.to(delta.dtype)[:, None, None], delta


def _chunk_cumsum_bwd(
    ddA,
    ddt_out,
    dt,
    A,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    ddt=None,
):
    """Gradients of dt, A and dt_bias (None without one) from those of delta A and of delta.

    ddA, ddt_out: (B, H, chunks, chunk_size). Returns (ddt in dt's dtype, in `ddt` if given; dA, ddt_bias).
    """

    def function(dt, A, dt_bias):
        return _steps(dt, A, dt_bias, ddA.shape[-1], dt_softplus, dt_limit)

    tensors = {"dt": dt, "A": A, "dt_bias": dt_bias}
    grad, *rest = gradients_of(function, tensors, tuple(tensors), (ddA, ddt_out))
    return store(grad, ddt), *rest


def _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=None, states=None, states_in_fp32=True):
    """The state that each chunk leaves when it starts from zero: sum over k of exp(decay from k) dt[k] x[k] B[k]^T.

    B: (B, L, G, N); x: (B, L, H, P); dt, dA_cumsum: (B, H, chunks, chunk_size) as `_chunk_cumsum_fwd` gives them;
    seq_idx: (B, L), only steps of the chunk's last sequence count, none where its index is negative.
    Returns (B, chunks, H, P, N), float32, or B's dtype without states_in_fp32, in `states` if given.
    """
    _, heads, _, chunk_size = dt.shape
    weight = torch.exp((dA_cumsum[..., -1:] - dA_cumsum).clamp(max=0)) * dt
    weight = weight.permute(0, 2, 3, 1)
    if seq_idx is not None:
        ids, last, _ = ids_in_chunks(seq_idx, chunk_size)
        last = last.unsqueeze(-1)
        weight = weight * ((ids == last) & (last >= 0)).unsqueeze(-1)
    weighted_x = in_chunks(wide(x), chunk_size) * weight.unsqueeze(-1)
    sums = torch.einsum("bclhp,bclhn->bchpn", weighted_x, in_chunks(wide(B), chunk_size, heads))
    return store(sums if states_in_fp32 else sums.to(B.dtype), states)


def chunk_state_ref(B, x, dt, dA_cumsum):
    """`chunk_state`, of which autograd keeps all inner tensors."""
    return _chunk_state_fwd(B, x, dt, dA_cumsum)


def _chunk_state(B, x, dt, dA_cumsum, states_in_fp32):
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


ChunkStateFn = recomputed("ChunkStateFn", _chunk_state)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):
    """The state that each chunk leaves when it starts from zero: `_chunk_state_fwd` without seq_idx. Differentiable."""
    run = _chunk_state if vmap.through_dispatcher() else ChunkStateFn.apply
    return run(B, x, dt, dA_cumsum, states_in_fp32)


def _gradients(names, B, x, dt, dA_cumsum, dstates, seq_idx=None):
    """Gradients of `_chunk_state_fwd`'s arguments in `names`."""
    tensors = {"B": B, "x": x, "dt": dt, "dA_cumsum": dA_cumsum}
    dstates = dstates.to(wide(x).dtype)
    return gradients_of(
        lambda **t: _chunk_state_fwd(**t, seq_idx=seq_idx), tensors, names, (dstates,)
    )


def _chunk_state_bwd_dx(B, x, dt, dA_cumsum, dstates, dx=None):
    """(dx, ddt, ddA_cumsum) from the gradient of the states (B, chunks, H, P, N); dx is filled if given."""
    grad, *rest = _gradients(("x", "dt", "dA_cumsum"), B, x, dt, dA_cumsum, dstates)
    return store(grad, dx), *rest


def _chunk_state_bwd_db(x, dt, dA_cumsum, dstates, seq_idx=None, B=None, ngroups=1):
    """dB (B, L, G, N) in x's dtype, or with B (dB in B's dtype, ddA_cumsum)."""
    if B is not None:
        return _gradients(("B", "dA_cumsum"), B, x, dt, dA_cumsum, dstates, seq_idx)
    B = x.new_zeros(*x.shape[:2], ngroups, dstates.shape[-1])
    return _gradients(("B",), B, x, dt, dA_cumsum, dstates, seq_idx)[0]


def _chunk_state_bwd_ddAcs_stable(B, x, dt, dA_cumsum, dstates, seq_idx=None):
    """ddA (B, H, chunks, chunk_size) by sums of terms of one kind: no difference of large sums."""
    _, heads, _, chunk_size = dt.shape
    dx_dot = torch.einsum(
        "bclhp,bclhn,bchpn->bhcl",
        in_chunks(wide(x), chunk_size),
        in_chunks(wide(B), chunk_size, heads),
        dstates.to(wide(x).dtype),
    )
    terms = dx_dot * dt * torch.exp((dA_cumsum[..., -1:] - dA_cumsum).clamp(max=0))
    if seq_idx is not None:
        ids, last, _ = ids_in_chunks(seq_idx, chunk_size)
        last = last.unsqueeze(-1)
        terms = terms * ((ids == last) & (last >= 0)).unsqueeze(1)
    # The exponent of step t is part of the decay of every step before t.
    return F.pad(torch.cumsum(terms[..., :-1], dim=-1), (1, 0))


def chunk_state_varlen(B, x, dt, dA_cumsum, cu_seqlens, chunk_states):
    """The state after each of several packed sequences.

    B: (T, G, N); x: (T, H, P); dt, dA_cumsum: (H, chunks, chunk_size); cu_seqlens: (S + 1);
    chunk_states: (chunks, H, P, N), the state that enters each chunk. Returns (S, H, P, N) in chunk_states' dtype, 0
    for an empty sequence. A sequence that begins inside the chunk in which it ends takes nothing from chunk_states.
    """
    _, _, chunk_size = dt.shape
    states = []
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        if begin == end:
            states.append(torch.zeros_like(chunk_states[0]))
            continue
        chunk = (end - 1) // chunk_size
        first = max(begin, chunk * chunk_size)
        inside = slice(first - chunk * chunk_size, end - chunk * chunk_size)
        sums = dA_cumsum[None, :, chunk, None, inside]
        state = chunk_state_ref(
            B[None, first:end], x[None, first:end], dt[None, :, chunk, None, inside], sums
        )[0, 0]
        if begin < chunk * chunk_size:
            state = state + torch.exp(sums[0, :, 0, -1, None, None]) * chunk_states[chunk]
        states.append(state.to(chunk_states.dtype))
    if not states:
        return chunk_states.new_empty(0, *chunk_states.shape[1:])
    return torch.stack(states)
