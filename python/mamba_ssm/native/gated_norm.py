"""Shapes and gradients of the gated LayerNorm and RMSNorm, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation


def _forward_fake(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm):
    dtype = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty(x.shape[1] // group_size, x.shape[0], dtype=dtype)
    return x.new_empty(x.shape), rstd.new_empty(0 if is_rms_norm else rstd.shape), rstd


def _backward_fake(
    dy,
    x,
    weight,
    bias,
    z,
    mean,
    rstd,
    group_size,
    norm_before_gate,
    is_rms_norm,
    recompute_output,
):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if z is None else x.new_empty(x.shape, dtype=z.dtype),
        x.new_empty(x.shape if recompute_output else 0),
    )


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `gated_norm_forward`."""
    x, weight, bias, z, _, *ctx.options = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, z, mean, rstd)


def backward(ctx, dy, *_):
    """Gradients in the order of `gated_norm_forward`'s arguments."""
    tensors = ctx.saved_tensors
    _, _, bias, z, _, _ = tensors
    dx, dweight, dbias, dz, _ = gated_norm_backward(dy, *tensors, *ctx.options, False)
    dbias, dz = None if bias is None else dbias, None if z is None else dz
    return dx, dweight, dbias, dz, None, None, None, None


gated_norm_backward = operation("gated_norm_backward", _backward_fake)
gated_norm_forward = operation("gated_norm_forward", _forward_fake, setup_context, backward)
