"""The output of every chunk, in plain PyTorch: a piece of the chunked scan for code that takes it apart.

Names and results of the private functions are those that clients import; "ddA_cumsum" is the gradient of dA_cumsum,
"ddA" that of the exponents whose sum it is. dt, dA_cumsum: (B, H, chunks, chunk_size); x, dout: (B, L, H, P);
C: (B, L, G, N); CB: (B, chunks, G, chunk_size, chunk_size); states: (B, chunks, H, P, N).
"""

import torch
import torch.nn.functional as F

from mamba_ssm.native import vmap
from mamba_ssm.ops.chunks import ids_in_chunks, in_chunks, store, wide
from mamba_ssm.ops.recompute import gradients_of, recomputed
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd


def _decays(dA_cumsum):
    """exp of the sum over steps j + 1 .. i at [i, j], 0 above the diagonal."""
    lower = torch.ones(*dA_cumsum.shape[-1:] * 2, dtype=torch.bool, device=dA_cumsum.device).tril()
    sums = dA_cumsum.unsqueeze(-1) - dA_cumsum.unsqueeze(-2)
    return torch.exp(sums.masked_fill(~lower, -torch.inf).clamp(max=0))


def _by_head(cb, heads):
    """CB as (B, H, chunks, chunk_size, chunk_size), in float32."""
    return wide(cb).repeat_interleave(heads // cb.shape[2], dim=2).transpose(1, 2)


def _from_steps(cb, x, dt, dA_cumsum):
    """What the steps of a chunk give each other: (B, L, H, P) in float32."""
    weight = _by_head(cb, x.shape[2]) * _decays(dA_cumsum) * dt.unsqueeze(-2)
    out = torch.einsum("bhcls,bcshp->bclhp", weight, in_chunks(wide(x), dt.shape[-1]))
    return out.flatten(1, 2)[:, : x.shape[1]]


def _from_states(C, states, dA_cumsum, seq_idx=None):
    """What the state that enters a chunk gives its steps: (B, L, H, P) in float32."""
    _, heads, _, chunk_size = dA_cumsum.shape
    since = torch.exp(dA_cumsum).permute(0, 2, 3, 1)
    if seq_idx is not None:
        ids, _, before = ids_in_chunks(seq_idx, chunk_size)
        since = since * (ids == before.unsqueeze(-1)).unsqueeze(-1)
    wide_C = in_chunks(wide(C), chunk_size, heads)
    out = torch.einsum("bclhn,bchpn->bclhp", wide_C, states.to(wide_C.dtype)) * since.unsqueeze(-1)
    return out.flatten(1, 2)[:, : C.shape[1]]


def _skip(D):
    """D (H) or (H, P) as a factor of x."""
    return wide(D.unsqueeze(-1) if D.dim() == 1 else D)


def _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, states, D=None, z=None, seq_idx=None):
    """(out, out_x), both (B, L, H, P) in x's dtype: out_x before the gate z, None without one.

    cb: `_bmm_chunk_fwd` of C and B with the same seq_idx; states: those that enter the chunks; D: (H) or (H, P).
    """
    out = _from_steps(cb, x, dt, dA_cumsum) + _from_states(C, states, dA_cumsum, seq_idx)
    if D is not None:
        out = out + wide(x) * _skip(D)
    if z is None:
        return out.to(x.dtype), None
    return (out * F.silu(wide(z))).to(x.dtype), out.to(x.dtype)


def chunk_scan_ref(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """`chunk_scan`, of which autograd keeps all inner tensors."""
    chunks, chunk_size = dt.shape[2:]
    if x.shape[1] != chunks * chunk_size:
        raise ValueError(
            f"chunk_scan: x must have {chunks} chunks of {chunk_size} steps, got length {x.shape[1]}"
        )
    cb = _bmm_chunk_fwd(C, B, chunk_size, output_dtype=wide(x).dtype)
    return _chunk_scan_fwd(cb, x, dt, dA_cumsum, C, prev_states, D, z)[0]


ChunkScanFn = recomputed("ChunkScanFn", chunk_scan_ref)


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """The output of each chunk from the state that enters it and from its own steps. Differentiable.

    B, C: (B, L, G, N); x, z: (B, L, H, P); dt, dA_cumsum: (B, H, chunks, chunk_size), L = chunks * chunk_size;
    prev_states: (B, chunks, H, P, N); D: (H) or (H, P). Returns (B, L, H, P) in x's dtype; computed in float32.
    """
    run = chunk_scan_ref if vmap.through_dispatcher() else ChunkScanFn.apply
    return run(B, C, x, dt, dA_cumsum, prev_states, D, z)


def _chunk_scan_bwd_dz(
    x, z, out, dout, chunk_size, has_ddAcs=True, D=None, dz=None, recompute_output=False
):
    """The gate's gradients, from out before the gate: (dz, dout before the gate, dD or None).

    With has_ddAcs follows ddA_cumsum (B, H, chunks, chunk_size) as `_chunk_scan_bwd_ddAcs_unstable` has it, with
    recompute_output the gated output. dz is filled if given.
    """
    wide_z, wide_out, wide_dout = map(wide, (z, out, dout))
    sigmoid, silu = torch.sigmoid(wide_z), F.silu(wide_z)
    grad = store((wide_dout * wide_out * (sigmoid + silu * (1 - sigmoid))).to(z.dtype), dz)
    before = wide_dout * silu
    sums, dD = _ddA_cumsum(x, out, before, D, chunk_size)
    results = [grad, before.to(x.dtype), dD]
    results += [sums] if has_ddAcs else []
    results += [(wide_out * silu).to(x.dtype)] if recompute_output else []
    return tuple(results)


def _ddA_cumsum(x, out, dout, D, chunk_size):
    """(sum over p of dout times what is not D x, as (B, H, chunks, chunk_size); gradient of D or None)."""
    wide_x, wide_dout = wide(x), wide(dout)
    scanned = wide(out) if D is None else wide(out) - wide_x * _skip(D)
    sums = in_chunks((scanned * wide_dout).sum(-1), chunk_size).permute(0, 3, 1, 2)
    if D is None:
        return sums, None
    return sums, (wide_dout * wide_x).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)


def _chunk_scan_bwd_dstates(C, dA_cumsum, dout, seq_idx=None, dtype=None):
    """Gradient of the entering states, in `dtype` (C's when None)."""
    batch, heads, chunks, _ = dA_cumsum.shape
    states = wide(C.new_zeros(batch, chunks, heads, dout.shape[-1], C.shape[-1]))
    tensors = {"C": C, "states": states, "dA_cumsum": dA_cumsum, "seq_idx": seq_idx}
    grads = gradients_of(_from_states, tensors, ("states",), (wide(dout),))
    return grads[0].to(C.dtype if dtype is None else dtype)


def _chunk_scan_bwd_dC(prev_states, dA_cumsum, dout, seq_idx=None, C=None, ngroups=1):
    """dC by the entering states, in dout's dtype, or with C (dC in C's dtype, ddA_cumsum)."""
    rows = C
    if rows is None:
        rows = dout.new_zeros(*dout.shape[:2], ngroups, prev_states.shape[-1])
    tensors = {"C": rows, "states": prev_states, "dA_cumsum": dA_cumsum, "seq_idx": seq_idx}
    grads = gradients_of(_from_states, tensors, ("C", "dA_cumsum"), (wide(dout),))
    return grads[0] if C is None else grads


def _chunk_scan_bwd_ddAcs_prev(prev_states, C, dout, dA_cumsum, seq_idx=None):
    """ddA_cumsum by the entering states."""
    return _chunk_scan_bwd_dC(prev_states, dA_cumsum, dout, seq_idx, C)[1]


def _dweight(x, dout, chunk_size):
    """dout[i] x[j]^T within every chunk: (B, H, chunks, chunk_size, chunk_size) in float32."""
    rows = (in_chunks(wide(t), chunk_size) for t in (dout, x))
    return torch.einsum("bclhp,bcshp->bhcls", *rows)


def _ddA(terms):
    """ddA of terms [i, j] that decay over j + 1 .. i: their sum over j < t <= i, a sum of terms of one kind."""
    later = terms.flip(-2).cumsum(-2).flip(-2)
    return later.tril(-1).sum(-1)


def _chunk_scan_bwd_dcb(x, dt, dA_cumsum, dout, seq_idx=None, CB=None, ngroups=1):
    """dCB (B, chunks, G, chunk_size, chunk_size) in float32, or with CB (dCB, ddA)."""
    heads = x.shape[2]
    groups = ngroups if CB is None else CB.shape[2]
    weight = _dweight(x, dout, dt.shape[-1]) * _decays(dA_cumsum) * dt.unsqueeze(-2)
    if seq_idx is not None:
        ids, _, _ = ids_in_chunks(seq_idx, dt.shape[-1])
        weight = weight * (ids.unsqueeze(-1) == ids.unsqueeze(-2)).unsqueeze(1)
    dcb = weight.transpose(1, 2).unflatten(2, (groups, heads // groups)).sum(3)
    return dcb if CB is None else (dcb, _ddA(weight * _by_head(CB, heads)))


def _chunk_scan_bwd_dx(cb, x, dt, dA_cumsum, dout, D=None):
    """(dx in x's dtype, ddt (B, H, chunks, chunk_size)) by the steps of the same chunk, and by D x."""

    def function(x, dt):
        out = _from_steps(cb, x, dt, dA_cumsum)
        return out if D is None else out + wide(x) * _skip(D)

    return gradients_of(function, {"x": x, "dt": dt}, ("x", "dt"), (wide(dout),))


def _chunk_scan_bwd_ddAcs_stable(x, dt, dA_cumsum, dout, cb):
    """ddA (B, H, chunks, chunk_size) by the steps of the same chunk, without differences of large sums."""
    return _chunk_scan_bwd_dcb(x, dt, dA_cumsum, dout, CB=cb)[1]


def _chunk_scan_bwd_ddAcs_unstable(x, dt, out, dout, ddt, D=None, subtract_ddtdt=True):
    """(ddA_cumsum, dD or None) from the output: its part that is not D x times dout, less ddt times dt.

    out: before the gate; ddt: by `_chunk_scan_bwd_dx`. Cancels where the sums are large.
    """
    sums, dD = _ddA_cumsum(x, out, dout, D, dt.shape[-1])
    return (sums - ddt * dt if subtract_ddtdt else sums), dD
