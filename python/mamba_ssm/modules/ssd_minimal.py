"""The chunked form of state space duality in a few lines of PyTorch (Dao & Gu 2024, listing 1).

For reading and for comparing; `ops.triton.ssd_combined.mamba_chunk_scan_combined` is the operation.
"""

import torch
import torch.nn.functional as F


def segsum_unstable(x):
    """As `segsum`, from differences of one cumulative sum: cancels where the sums are large."""
    total = torch.cumsum(x, dim=-1)
    sums = total.unsqueeze(-1) - total.unsqueeze(-2)
    return sums.masked_fill(~_lower(x, 0), -torch.inf)


def segsum(x):
    """x: (..., T). Returns (..., T, T): [i, j] = x[j + 1] + ... + x[i] for j <= i, -inf above the diagonal."""
    length = x.shape[-1]
    x = x.unsqueeze(-1).expand(*x.shape, length)
    sums = torch.cumsum(x.masked_fill(~_lower(x, -1), 0), dim=-2)
    return sums.masked_fill(~_lower(x, 0), -torch.inf)


def _lower(x, diagonal):
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device)
    return ones.tril(diagonal)


def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    """S[t] = exp(A[t]) S[t-1] + X[t] B[t]^T;  Y[t] = S[t] C[t].

    X: (B, L, H, P), already times dt; A: (B, L, H), dt times A; B, C: (B, L, H, N); one dtype, L a multiple of
    block_len. initial_states: (B, H, P, N) or (B, 1, H, P, N), zero when absent.
    Returns Y (B, L, H, P) and the last states (B, H, P, N).
    """
    if X.shape[1] % block_len or not X.dtype == A.dtype == B.dtype == C.dtype:
        raise ValueError(
            "ssd_minimal_discrete: X, A, B and C must have one dtype and a length that is a multiple of "
            f"block_len {block_len}, got length {X.shape[1]} and {X.dtype}, {A.dtype}, {B.dtype}, {C.dtype}"
        )
    X, A, B, C = (t.unflatten(1, (X.shape[1] // block_len, block_len)) for t in (X, A, B, C))
    A = A.permute(0, 3, 1, 2)  # (B, H, blocks, block_len)
    A_cumsum = torch.cumsum(A, dim=-1)

    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, torch.exp(segsum(A)), X)

    until = torch.exp(A_cumsum[..., -1:] - A_cumsum)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, until, X)
    if initial_states is None:
        initial_states = states.new_zeros(states.shape[0], *states.shape[2:])
    states = torch.cat([initial_states.reshape(-1, 1, *states.shape[2:]), states], dim=1)
    between = torch.exp(segsum(F.pad(A_cumsum[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)

    since = torch.exp(A_cumsum)
    across = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], since)
    return (within + across).flatten(1, 2), states[:, -1]


def test_correctness():
    """Compares `ssd_minimal_discrete` with the operation on a problem of Mamba-2's size."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    torch.manual_seed(42)
    batch, length, block_len, heads, headdim, d_state = 1, 2048, 64, 32, 64, 64
    x = torch.randn(batch, length, heads, headdim)
    dt = F.softplus(torch.randn(batch, length, heads) - 4)
    A = -torch.exp(torch.rand(heads))
    B, C = torch.randn(2, batch, length, 1, d_state)
    y, last_states = mamba_chunk_scan_combined(x, dt, A, B, C, block_len, return_final_states=True)
    wide = (t.expand(-1, -1, heads, -1) for t in (B, C))
    y_min, states_min = ssd_minimal_discrete(x * dt.unsqueeze(-1), A * dt, *wide, block_len)
    torch.testing.assert_close(y_min, y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states_min, last_states, rtol=1e-3, atol=1e-3)
