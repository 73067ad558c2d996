"""Layers in plain PyTorch, in whatever dtype their weights have: what the native ones are held against."""

import torch

from mamba_ssm.modules.bimamba import BiMamba
from mamba_ssm.ops.mamba_inner import mamba_inner_ref


def of_mamba(layer, hidden):
    """`Mamba.forward` or `BiMamba.forward` of hidden (B, L, d_model) without cache and packed sequences."""
    xz = torch.nn.functional.linear(hidden, layer.in_proj.weight, layer.in_proj.bias)
    xz = xz.transpose(1, 2)
    y = _inner(layer, xz, layer.conv1d, layer.x_proj, layer.dt_proj, layer.A_log, layer.D)
    if isinstance(layer, BiMamba):
        y = y + _inner(layer, xz.flip(2), *layer._backward_weights()).flip(1)
        y = y / 2 if layer.divide_out else y
    return y if layer.out_proj.bias is None else y + layer.out_proj.bias


def _inner(layer, xz, conv1d, x_proj, dt_proj, A_log, D):
    """From the convolution to the output projection without its bias, causally: (B, L, d_model)."""
    return mamba_inner_ref(
        xz,
        conv1d.weight,
        conv1d.bias,
        x_proj.weight,
        dt_proj.weight,
        layer.out_proj.weight,
        None,
        -torch.exp(A_log),
        D=D,
        delta_bias=dt_proj.bias,
    )
