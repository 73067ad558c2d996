"""The output of every chunk, in plain PyTorch: a piece of the chunked scan for code that takes it apart."""

import torch
import torch.nn.functional as F

from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    """The output of each chunk from the state that enters it and from its own steps.

    B, C: (B, L, G, N); x, z: (B, L, H, P); dt, dA_cumsum: (B, H, chunks, chunk_size), L = chunks * chunk_size;
    prev_states: (B, chunks, H, P, N); D: (H) or (H, P). Returns (B, L, H, P) in x's dtype; computed in float32.
    """
    _, heads, chunks, chunk_size = dt.shape
    if x.shape[1] != chunks * chunk_size:
        raise ValueError(
            f"chunk_scan: x must have {chunks} chunks of {chunk_size} steps, got length {x.shape[1]}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_group = heads // B.shape[2]
    CB = _bmm_chunk_fwd(C, B, chunk_size, output_dtype=dtype).repeat_interleave(per_group, dim=2)
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    sums = (dA_cumsum.unsqueeze(-1) - dA_cumsum.unsqueeze(-2)).masked_fill(~lower, -torch.inf)
    weight = CB.transpose(1, 2) * torch.exp(sums.clamp(max=0)) * dt.unsqueeze(-2)

    def to_chunks(tensor):
        return tensor.to(dtype).unflatten(1, (chunks, chunk_size))

    wide_x = to_chunks(x)
    out = torch.einsum("bhcls,bcshp->bclhp", weight, wide_x)
    since = torch.exp(dA_cumsum).permute(0, 2, 3, 1).unsqueeze(-1)
    wide_C = to_chunks(C).repeat_interleave(per_group, dim=3)
    out = out + since * torch.einsum("bclhn,bchpn->bclhp", wide_C, prev_states.to(dtype))
    if D is not None:
        out = out + wide_x * (D.unsqueeze(-1) if D.dim() == 1 else D).to(dtype)
    if z is not None:
        out = out * F.silu(to_chunks(z))
    return out.flatten(1, 2).to(x.dtype)


chunk_scan_ref = chunk_scan
