"""torch.amp's decorators for autograd.Function, bound to CUDA autocast."""

from functools import partial

import torch


def custom_amp_decorator(decorator):
    """Binds torch.amp.custom_fwd or custom_bwd to CUDA."""
    return partial(decorator, device_type="cuda")


custom_fwd = custom_amp_decorator(torch.amp.custom_fwd)
custom_bwd = custom_amp_decorator(torch.amp.custom_bwd)
