"""Autocast for functions that cast by themselves; a device that has none, like meta, is as if it were off."""

import contextlib

import torch


def autocast_dtype(x):
    """The dtype of x under autocast: autocast's where that is on, x's else and for float64."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device_type):
        return x.dtype
    on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else x.dtype


def no_autocast(x):
    """A context without autocast on x's device."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
