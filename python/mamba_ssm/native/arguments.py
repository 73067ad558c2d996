"""Checks of arguments before Python touches them; what only kernels read is theirs to check."""

import torch

_INT32 = torch.iinfo(torch.int32)


def check_tensor(op, name, tensor, axes):
    """axes: the names of its dimensions, as in "batch, dim, length"."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != axes.count(",") + 1:
        raise RuntimeError(f"{op}: {name} must have shape ({axes}), got {tuple(tensor.shape)}")


def check_shapes(op, expected):
    """expected: (name, tensor or None, sizes); a size given as a letter may be any."""
    for name, tensor, sizes in expected:
        if tensor is None:
            continue
        fits = tensor.dim() == len(sizes) and all(
            isinstance(size, str) or size == actual
            for size, actual in zip(sizes, tensor.shape, strict=True)
        )
        if not fits:
            raise RuntimeError(
                f"{op}: {name} must have shape ({', '.join(map(str, sizes))}), "
                f"got {tuple(tensor.shape)}"
            )


def check_filled(op, name, tensor, shape, like, dtype=None):
    """For a result of the caller's: strides are free, shape, dtype (like's by default) and like's device are not."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    wanted = (tuple(shape), dtype or like.dtype, like.device)
    found = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if found != wanted:
        raise RuntimeError(
            f"{op}: {name} must have shape {wanted[0]} and be {wanted[1]} on {wanted[2]}, "
            f"got shape {found[0]}, {found[1]} on {found[2]}"
        )
    if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise RuntimeError(
            f"{op}: {name} is written, so it must not be an expanded view (stride 0); "
            f"pass a contiguous copy, got strides {tensor.stride()}"
        )


def to_int32(op, name, tensor):
    """int64 becomes int32, as kernels want it; what does not fit saturates and so stays out of range."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype == torch.int64:
        return tensor.clamp(_INT32.min, _INT32.max).to(torch.int32)
    if tensor.dtype != torch.int32:
        raise RuntimeError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")
    return tensor
