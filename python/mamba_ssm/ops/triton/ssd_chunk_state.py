"""What every chunk adds to the state, in plain PyTorch: a piece of the chunked scan for code that takes it apart."""

import torch
import torch.nn.functional as F


def _chunk_cumsum_fwd(
    dt, A, chunk_size, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))
):
    """dt: (B, L, H); A, dt_bias: (H). Returns (dA_cumsum, delta), both (B, H, chunks, chunk_size) float32.

    delta is dt + dt_bias, through softplus if asked for, clamped to dt_limit, and 0 beyond L; dA_cumsum is the sum of
    delta A from the chunk's first step on.
    """
    dtype = torch.promote_types(dt.dtype, torch.float32)
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = (F.softplus(delta, threshold=20.0) if dt_softplus else delta).clamp(*dt_limit)
    delta = F.pad(delta.transpose(1, 2), (0, -dt.shape[1] % chunk_size))
    delta = delta.unflatten(-1, (delta.shape[-1] // chunk_size, chunk_size))
    return torch.cumsum(delta * A.to(dtype)[:, None, None], dim=-1), delta


def _to_chunks(tensor, chunks, chunk_size, heads=None):
    """(B, L, G, N) as (B, chunks, chunk_size, H, N) in float32, zero beyond L, groups spread over the heads."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    tensor = F.pad(tensor, (0, 0, 0, 0, 0, chunks * chunk_size - tensor.shape[1]))
    tensor = tensor.unflatten(1, (chunks, chunk_size))
    return tensor if heads is None else tensor.repeat_interleave(heads // tensor.shape[3], dim=3)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):
    """The state that each chunk leaves when it starts from zero: sum over k of exp(decay from k) dt[k] x[k] B[k]^T.

    B: (B, L, G, N); x: (B, L, H, P); dt, dA_cumsum: (B, H, chunks, chunk_size) as `_chunk_cumsum_fwd` gives them.
    Returns (B, chunks, H, P, N), float32, or B's dtype without states_in_fp32.
    """
    _, heads, chunks, chunk_size = dt.shape
    wide_B = _to_chunks(B, chunks, chunk_size, heads)
    wide_x = _to_chunks(x, chunks, chunk_size)
    weight = torch.exp((dA_cumsum[..., -1:] - dA_cumsum).clamp(max=0)) * dt
    weighted_x = wide_x * weight.permute(0, 2, 3, 1).unsqueeze(-1)
    states = torch.einsum("bclhp,bclhn->bchpn", weighted_x, wide_B)
    return states if states_in_fp32 else states.to(B.dtype)


chunk_state_ref = chunk_state


def chunk_state_varlen(B, x, dt, dA_cumsum, cu_seqlens, chunk_states):
    """The state after each of several packed sequences.

    B: (T, G, N); x: (T, H, P); dt, dA_cumsum: (H, chunks, chunk_size); cu_seqlens: (S + 1);
    chunk_states: (chunks, H, P, N), the state that enters each chunk. Returns (S, H, P, N) in chunk_states' dtype, 0
    for an empty sequence. A sequence that begins inside the chunk in which it ends takes nothing from chunk_states.
    """
    _, chunks, chunk_size = dt.shape
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
        state = chunk_state(
            B[None, first:end], x[None, first:end], dt[None, :, chunk, None, inside], sums
        )[0, 0]
        if begin < chunk * chunk_size:
            state = state + torch.exp(sums[0, :, 0, -1, None, None]) * chunk_states[chunk]
        states.append(state.to(chunk_states.dtype))
    if not states:
        return chunk_states.new_empty(0, *chunk_states.shape[1:])
    return torch.stack(states)
