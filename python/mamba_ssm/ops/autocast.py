"""Autocast for functions that cast by themselves; on meta tensors, which have none, it is as if it were off.

torch.amp.is_autocast_available() would know for any device, but torch 2.10's compiler cannot see through it.
"""

import contextlib

import torch


def autocast_dtype(x):
    """The dtype of x under autocast: autocast's where that is on, x's else and for float64."""
    if x.dtype == torch.float64 or x.is_meta:
        return x.dtype
    on = torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def no_autocast(x):
    """A context without autocast on x's device."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
