"""The gated RMSNorm of Mamba-2, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """norm(x) silu(z), or without norm_before_gate norm(x silu(z)); norm is x / rms(x) weight + bias.

    x, z: (..., N); weight, bias: (N); z and bias may be None. rms is that of each group of group_size features, of all
    when None, with eps under its root. Computed in float32, returned in x's dtype.
    """
    dtype = x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    gate = 1 if z is None else F.silu(z.to(wide))
    x = x if norm_before_gate else x * gate
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias.to(wide)
    return (y * gate if norm_before_gate else y).to(dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with a weight of its own, ones before training."""

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x, z=None):
        options = (self.eps, self.group_size, self.norm_before_gate)
        return rmsnorm_fn(x, self.weight, self.bias, z, *options)
