"""Decode steps of the selective state space, and the same formula in plain PyTorch."""

import math

import torch
import torch.nn.functional as F

from mamba_ssm.native import state_update as native


def _per_head(state, x, dt, A, B, C, D, z, dt_bias):
    """Gives tensors without a head axis one of size 1: a state (B, D, N) becomes (B, 1, D, N)."""

    def lift(tensor, dim, axis):
        missing = tensor is not None and tensor.dim() == dim - 1
        return tensor.unsqueeze(axis) if missing else tensor

    return (
        lift(state, 4, -3),
        lift(x, 3, -2),
        lift(dt, 3, -2),
        lift(A, 3, -3),
        lift(B, 3, -2),
        lift(C, 3, -2),
        lift(D, 2, -2),
        lift(z, 3, -2),
        lift(dt_bias, 2, -2),
    )


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
    dt_limit=(-math.inf, math.inf),
    A_is_log=False,
):
    """state = state exp(dt A) + dt B x, in place;  out = (C state + D x) silu(z). No gradient.

    state: (B or entries, D, N) or (..., H, D, N); x, dt, z: (B, D) or (B, H, D); A: (D, N) or (H, D, N);
    B, C: (B, N) or (B, G, N), H % G == 0; D, dt_bias: (D) or (H, D). Any float dtypes, any strides; expansions
    of A, dt, dt_bias and D over a head (stride 0) take a faster path.
    T tokens at once: x, dt, z (B, T, H, D) and B, C (B, T, G, N), with the bits of T calls.
    state_batch_indices: (B) int32 or int64, the row of state for each b; a negative one gives 0 and touches no
    state, one beyond the state is an error on the CPU and gives NaN on CUDA.
    dt_limit: (smallest, largest) of dt after bias and softplus. A_is_log: A holds log(-A), as the layers' A_log does.
    Returns out, shaped and typed as x (without its head axis where state has none), from the state in float32
    before it is rounded to its dtype. RuntimeError names an argument that does not fit; nothing is changed then.
    """
    has_heads = state.dim() > 3
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    with torch.no_grad():  # or torch would tie out and state to a gradient that does not exist
        tensors = _per_head(state, x, dt, A, B, C, D, z, dt_bias)
        options = (bool(dt_softplus), bool(A_is_log), *limits, state_batch_indices)
        out = native.selective_state_update(*tensors, *options)
    return out if has_heads else out.squeeze(-2)


def selective_state_update_ref(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(-math.inf, math.inf),
    A_is_log=False,
):
    """`selective_state_update` in plain PyTorch, in float32 (float64 for float64)."""
    if x.dim() == 4:

        def step(t):
            gate = None if z is None else z[:, t]
            token = (state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, dt_bias)
            return selective_state_update_ref(*token, dt_softplus, dt_limit, A_is_log)

        return torch.stack([step(t) for t in range(x.shape[1])], dim=1)
    has_heads = state.dim() > 3
    stored, *tensors = _per_head(state, x, dt, A, B, C, D, z, dt_bias)
    out_dtype = x.dtype
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.to(dtype) for t in tensors)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt, threshold=20.0) if dt_softplus else dt).clamp(*dt_limit)
    A = -torch.exp(A) if A_is_log else A
    heads_per_group = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(heads_per_group, dim=1).unsqueeze(2)  # (B, H, 1, N)
    C = C.repeat_interleave(heads_per_group, dim=1).unsqueeze(2)
    dt, x = dt.unsqueeze(-1), x.unsqueeze(-1)  # (B, H, D, 1)
    new_state = stored.to(dtype) * torch.exp(dt * A) + dt * B * x
    stored.copy_(new_state)
    out = (new_state * C).sum(-1)
    x = x.squeeze(-1)
    out = out if D is None else out + D * x
    out = (out if z is None else out * F.silu(z)).to(out_dtype)
    return out if has_heads else out.squeeze(1)
