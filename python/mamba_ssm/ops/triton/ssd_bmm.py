"""Products within chunks, in plain PyTorch: a piece of the chunked scan for code that takes it apart."""

import torch

from mamba_ssm.ops.chunks import ids_in_chunks, in_chunks, store, wide


def _bmm_chunk_fwd(a, b, chunk_size, seq_idx=None, causal=False, output_dtype=None):
    """a b^T within every chunk.

    a, b: (B, L, K) or (B, L, G, K); seq_idx: (B, L), the product is 0 where it differs. Returns
    (B, chunks, chunk_size, chunk_size) or (B, chunks, G, chunk_size, chunk_size) in output_dtype (a's when None).
    With causal, what is above the diagonal is not defined.
    """
    output_dtype = a.dtype if output_dtype is None else output_dtype
    has_groups = a.dim() == 4
    a, b = (in_chunks(wide(t), chunk_size) for t in (a, b))
    out = torch.einsum("bclgk,bcsgk->bcgls" if has_groups else "bclk,bcsk->bcls", a, b)
    if seq_idx is not None:
        ids, _, _ = ids_in_chunks(seq_idx, chunk_size)
        same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
        out = out * (same.unsqueeze(2) if has_groups else same)
    return out.to(output_dtype)


def _bmm_chunk_bwd(a, dout, residual=None, out=None):
    """dout^T a within every chunk: the gradient of `_bmm_chunk_fwd`'s b, and with dout transposed of its a.

    a: (B, L, K) or (B, L, G, K); dout: as `_bmm_chunk_fwd` returns it; residual: added, shaped as a. Returns a's shape
    and dtype, in `out` if given.
    """
    rows = in_chunks(wide(a), dout.shape[-1])
    formula = "bcgls,bclgk->bcsgk" if a.dim() == 4 else "bcls,bclk->bcsk"
    grad = torch.einsum(formula, dout.to(rows.dtype), rows).flatten(1, 2)[:, : a.shape[1]]
    return store((grad if residual is None else grad + residual.to(grad.dtype)).to(a.dtype), out)
