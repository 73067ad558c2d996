"""Whether operations must give the same bits every time, and the workspaces that this takes."""

import os

import torch

VARIABLE = "MAMBA_DETERMINISTIC"

_override = None


def set_deterministic_mode(value):
    """True or False for the whole process, whatever environment and torch say; None: as they say."""
    global _override
    _override = None if value is None else bool(value)


def use_deterministic_mode():
    """`set_deterministic_mode`'s value; else MAMBA_DETERMINISTIC, on if it starts with 1; else torch's switch."""
    if _override is not None:
        return _override
    if value := os.environ.get(VARIABLE):
        return value.startswith("1")
    return torch.are_deterministic_algorithms_enabled()


def alloc_tile_workspace(base_shape, tile_dim, dtype, device, deterministic, *, zero_init=True):
    """Where tiles of a sum go: (tensor, stride of the tile axis).

    deterministic: base_shape and a last axis of tile_dim, one slot a tile, zeros (with zero_init False, whatever was
    there). Otherwise base_shape, uninitialised, where tiles add up in any order, and stride 0.
    (None, 0) where base_shape is None.
    """
    if base_shape is None:
        return None, 0
    if not deterministic:
        return torch.empty(base_shape, dtype=dtype, device=device), 0
    allocate = torch.zeros if zero_init else torch.empty
    workspace = allocate((*base_shape, tile_dim), dtype=dtype, device=device)
    return workspace, workspace.stride(-1)


def finalize_tile_workspace(workspace, deterministic):
    """The sum over tiles; None stays None."""
    return workspace.sum(dim=-1) if workspace is not None and deterministic else workspace
