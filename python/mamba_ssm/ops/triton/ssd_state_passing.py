"""The recurrence from chunk to chunk, in plain PyTorch: a piece of the chunked scan for code that takes it apart."""

import torch


def state_passing(states, dA_chunk_cumsum, initial_states=None):
    """S[c+1] = exp(dA_chunk_cumsum[c]) S[c] + states[c].

    states: (B, chunks, H, d), what each chunk adds; dA_chunk_cumsum: (B, H, chunks); initial_states: (B, H, d), zero
    when absent. Returns the state that enters each chunk (B, chunks, H, d) in states' dtype and the last one (B, H, d)
    in float32.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    state = states.new_zeros(states.shape[0], *states.shape[2:], dtype=dtype)
    state = state if initial_states is None else initial_states.to(dtype)
    decay = torch.exp(dA_chunk_cumsum.to(dtype)).unsqueeze(-1)
    entering = []
    for chunk in range(states.shape[1]):
        entering.append(state)
        state = decay[:, :, chunk] * state + states[:, chunk].to(dtype)
    if not entering:
        return states, state
    return torch.stack(entering, dim=1).to(states.dtype), state


state_passing_ref = state_passing
