"""Packed sequences: from where each begins to which one a step belongs to."""

import torch


def sequence_of_steps(name, cu_seqlens, batch, length, device):
    """(seq_idx (1, length) int32, number of sequences): steps beyond the last one have that number as index.

    cu_seqlens: (S + 1) int32 or int64, batch 1. `name` is the function that errors speak of. What the bounds must be
    is checked on the CPU only, where reading them is free.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name}: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or batch != 1:
        raise ValueError(
            f"{name}: cu_seqlens must have shape (sequences + 1) with batch 1, "
            f"got shape {tuple(cu_seqlens.shape)} and batch {batch}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > length:
            raise ValueError(
                f"{name}: cu_seqlens must start at 0, never fall and end at {length} steps at most, "
                f"got {bounds}"
            )
    steps = torch.arange(length, device=device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[1:].to(device).contiguous()
    index = torch.searchsorted(ends, steps, right=True, out_int32=True)
    return index.unsqueeze(0), len(cu_seqlens) - 1
