"""The recurrence from chunk to chunk, in plain PyTorch: a piece of the chunked scan for code that takes it apart."""

import torch

from mamba_ssm.native import vmap
from mamba_ssm.ops.chunks import ids_in_chunks, wide
from mamba_ssm.ops.recompute import recomputed


def _decay(dA_chunk_cumsum, seq_idx, chunk_size):
    """(B, H, chunks, 1): what is left of the state after each chunk, 0 where another sequence ends the chunk."""
    decay = torch.exp(wide(dA_chunk_cumsum))
    if seq_idx is not None:
        _, last, before = ids_in_chunks(seq_idx, chunk_size)
        decay = decay * (last == before).unsqueeze(1)
    return decay.unsqueeze(-1)


def _state_passing_fwd(
    states,
    dA_chunk_cumsum,
    initial_states=None,
    seq_idx=None,
    chunk_size=None,
    out_dtype=None,
):
    """S[c+1] = exp(dA_chunk_cumsum[c]) S[c] + states[c].

    states: (B, chunks, H, d), what each chunk adds; dA_chunk_cumsum: (B, H, chunks); initial_states: (B, H, d), zero
    when absent; seq_idx: (B, L) with chunk_size, a state goes on while the index at the ends of chunks stays.
    Returns the state that enters each chunk (B, chunks, H, d) in out_dtype (states' when None) and the last one
    (B, H, d) in float32.
    """
    out_dtype = states.dtype if out_dtype is None else out_dtype
    state = wide(states.new_zeros(states.shape[0], *states.shape[2:]))
    state = state if initial_states is None else initial_states.to(state.dtype)
    decay = _decay(dA_chunk_cumsum, seq_idx, chunk_size)
    entering = []
    for chunk in range(states.shape[1]):
        entering.append(state)
        state = decay[:, :, chunk] * state + states[:, chunk].to(state.dtype)
    if not entering:
        return states.to(out_dtype), state
    return torch.stack(entering, dim=1).to(out_dtype), state


def _state_passing_bwd(
    states,
    dA_chunk_cumsum,
    dout,
    dfinal_states=None,
    seq_idx=None,
    has_initial_states=None,
    dstates_dtype=None,
    states_dtype=None,
    chunk_size=None,
):
    """Gradients of `_state_passing_fwd`, from those of the entering states and of the last one (zero when None).

    states: (B, chunks, H, d), those that enter each chunk; dout: likewise. Returns (gradient of what each chunk adds in
    dstates_dtype (dout's when None), ddA (B, H, chunks) float32, gradient of initial_states float32 or None without
    has_initial_states), and with states_dtype a fourth: states in that dtype.
    """
    decay = _decay(dA_chunk_cumsum, seq_idx, chunk_size)
    grad = wide(dout.new_zeros(dout.shape[0], *dout.shape[2:]))
    grad = grad if dfinal_states is None else dfinal_states.to(grad.dtype)
    dstates = torch.empty_like(dout, dtype=dstates_dtype or dout.dtype)
    ddA = torch.empty_like(dA_chunk_cumsum, dtype=grad.dtype)
    for chunk in reversed(range(states.shape[1])):
        dstates[:, chunk] = grad
        left = decay[:, :, chunk] * grad
        ddA[..., chunk] = (left * states[:, chunk].to(grad.dtype)).sum(-1)
        grad = left + dout[:, chunk].to(grad.dtype)
    results = (dstates, ddA, grad if has_initial_states else None)
    return results if states_dtype is None else (*results, states.to(states_dtype))


def state_passing_ref(states, dA_chunk_cumsum, initial_states=None):
    """`state_passing`, of which autograd keeps all inner tensors."""
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


StatePassingFn = recomputed("StatePassingFn", state_passing_ref)


def state_passing(states, dA_chunk_cumsum, initial_states=None):
    """The states that enter the chunks and the last one: `_state_passing_fwd` without seq_idx. Differentiable."""
    run = state_passing_ref if vmap.through_dispatcher() else StatePassingFn.apply
    return run(states, dA_chunk_cumsum, initial_states)
