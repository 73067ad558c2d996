"""Shapes and gradient of LayerNorm and RMSNorm with residual, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation


def _forward_fake(x, weight, bias, residual, eps, is_rms_norm, residual_in_fp32):
    rows = x.shape[0]
    statistics_dtype = torch.promote_types(x.dtype, torch.float32)
    residual_dtype = x.dtype
    if residual is not None:
        residual_dtype = residual.dtype
    elif residual_in_fp32:
        residual_dtype = statistics_dtype
    unchanged = residual is None and residual_dtype == x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if unchanged else x.shape, dtype=residual_dtype),
        x.new_empty(0 if is_rms_norm else rows, dtype=statistics_dtype),
        x.new_empty(rows, dtype=statistics_dtype),
    )


def _backward_fake(dy, dresidual_out, h, weight, bias, mean, rstd, x_dtype, is_rms_norm):
    return (
        h.new_empty(h.shape, dtype=x_dtype),
        h.new_empty(0 if h.dtype == x_dtype else h.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else bias.shape),
    )


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `layer_norm_forward`."""
    x, weight, bias, residual, _, ctx.is_rms_norm, _ = inputs
    _, residual_out, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.has_residual_out = residual_out.dim() == 2  # otherwise empty: the sum is x itself
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual_out if ctx.has_residual_out else x, weight, bias, mean, rstd)


def backward(ctx, dy, dresidual_out=None, *_):
    """Gradients in the order of `layer_norm_forward`'s arguments."""
    h, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(h, dtype=ctx.x_dtype)
    if not ctx.has_residual_out:
        dresidual_out = None  # compiled graphs pass a gradient of the empty tensor
    dx, dresidual, dweight, dbias = layer_norm_backward(
        dy, dresidual_out, h, weight, bias, mean, rstd, ctx.x_dtype, ctx.is_rms_norm
    )
    if not ctx.has_residual:
        dresidual = None
    elif h.dtype == ctx.x_dtype:
        dresidual = dx
    return dx, dweight, None if bias is None else dbias, dresidual, None, None, None


layer_norm_backward = operation("layer_norm_backward", _backward_fake)
layer_norm_forward = operation("layer_norm_forward", _forward_fake, setup_context, backward)
