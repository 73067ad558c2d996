"""Time cut into chunks, for the pieces of the chunked scan in plain PyTorch."""

import torch
import torch.nn.functional as F


def wide(tensor):
    """In float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_chunks(tensor, chunk_size, heads=None):
    """(B, L, ...) as (B, chunks, chunk_size, ...), zero beyond L; with heads, (.., G, N) groups spread over them."""
    tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, -tensor.shape[1] % chunk_size))
    tensor = tensor.unflatten(1, (tensor.shape[1] // chunk_size, chunk_size))
    return tensor if heads is None else tensor.repeat_interleave(heads // tensor.shape[3], dim=3)


def ids_in_chunks(seq_idx, chunk_size):
    """(ids (B, chunks, chunk_size), of each chunk's last step (B, chunks), of the step before each chunk (B, chunks)).

    Beyond L the last step goes on. Before the first step is what belongs to its own sequence: initial states.
    """
    length = seq_idx.shape[1]
    chunks = (length + chunk_size - 1) // chunk_size
    steps = torch.arange(chunks * chunk_size, device=seq_idx.device).clamp(max=max(length - 1, 0))
    ids = seq_idx[:, steps].unflatten(1, (chunks, chunk_size))
    last = ids[..., -1]
    return ids, last, torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)


def store(values, out):
    """values, or `out` filled with them where the caller gave one."""
    return values if out is None else out.copy_(values)
