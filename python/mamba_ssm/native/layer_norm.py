"""Shapes and gradients of LayerNorm and RMSNorm with residual, for eager code and for compiled graphs.

`layer_norm_forward` is the norm of x + residual; `layer_norm_branches_forward` has dropout, row scales, a second
branch and a second output besides.
"""

import torch

from mamba_ssm.native.loader import operation


def _sum_dtype(x, residual, residual_in_fp32):
    """The dtype of the sum that is normalised, as it is stored."""
    if residual is not None:
        return residual.dtype
    return torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype


def _norm_fake(x, residual, changed, is_rms_norm, residual_in_fp32):
    statistics_dtype = torch.promote_types(x.dtype, torch.float32)
    residual_dtype = _sum_dtype(x, residual, residual_in_fp32)
    stored = changed or residual is not None or residual_dtype != x.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if stored else 0, dtype=residual_dtype),
        x.new_empty(0 if is_rms_norm else x.shape[0], dtype=statistics_dtype),
        x.new_empty(x.shape[0], dtype=statistics_dtype),
    )


def _forward_fake(x, weight, bias, residual, eps, is_rms_norm, residual_in_fp32):
    return _norm_fake(x, residual, False, is_rms_norm, residual_in_fp32)


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
    return *gradients(ctx, ctx.saved_tensors, dy, dresidual_out), None, None, None


def gradients(ctx, saved, dy, dresidual_out):
    """Gradients of x, weight, bias and residual; `saved` is what `setup_context` saves."""
    h, weight, bias, mean, rstd = saved
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
    return dx, dweight, None if bias is None else dbias, dresidual


def _branches_forward_fake(
    x,
    weight,
    bias,
    residual,
    x1,
    weight1,
    bias1,
    rowscale,
    seed,
    dropout_p,
    eps,
    is_rms_norm,
    residual_in_fp32,
    return_dropout_mask,
):
    changed = x1 is not None or rowscale is not None or dropout_p > 0.0
    y, *rest = _norm_fake(x, residual, changed, is_rms_norm, residual_in_fp32)
    has_mask = return_dropout_mask and dropout_p > 0.0
    masks = (
        x.new_empty(x.shape if there else 0, dtype=torch.bool)
        for there in (has_mask, has_mask and x1 is not None)
    )
    return (y, x.new_empty(0 if weight1 is None else x.shape), *rest, *masks)


def _branches_backward_fake(
    dy,
    dy1,
    dresidual_out,
    h,
    weight,
    bias,
    weight1,
    bias1,
    rowscale,
    seed,
    dropout_p,
    mean,
    rstd,
    x_dtype,
    x1_dtype,
    has_residual,
    is_rms_norm,
):
    def like(parameter, dtype):
        return weight.new_empty(0 if parameter is None else parameter.shape, dtype=dtype)

    dtype1 = weight.dtype if weight1 is None else weight1.dtype
    return (
        h.new_empty(h.shape, dtype=x_dtype),
        h.new_empty(0 if x1_dtype is None else h.shape, dtype=x1_dtype or x_dtype),
        h.new_empty(h.shape) if has_residual else h.new_empty(0, dtype=x_dtype),
        like(weight, weight.dtype),
        like(bias, weight.dtype),
        like(weight1, dtype1),
        like(bias1, dtype1),
    )


def branches_setup_context(ctx, inputs, output):
    """Keeps what `branches_backward` needs; inputs and output are those of `layer_norm_branches_forward`."""
    x, weight, bias, residual, x1, weight1, bias1, rowscale, seed, ctx.dropout_p = inputs[:10]
    ctx.is_rms_norm = inputs[11]
    residual_out, mean, rstd = output[2:5]
    ctx.has_residual = residual is not None
    ctx.has_residual_out = residual_out.dim() == 2  # otherwise empty: the sum is x itself
    ctx.x_dtype, ctx.x1_dtype = x.dtype, None if x1 is None else x1.dtype
    ctx.set_materialize_grads(False)
    h = residual_out if ctx.has_residual_out else x
    ctx.save_for_backward(h, weight, bias, weight1, bias1, rowscale, seed, mean, rstd)


def branches_backward(ctx, dy, dy1=None, dresidual_out=None, *_):
    """Gradients in the order of `layer_norm_branches_forward`'s arguments; rowscale has none."""
    h, weight, bias, weight1, bias1, rowscale, seed, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(h, dtype=ctx.x_dtype)
    if weight1 is None:
        dy1 = None  # compiled graphs pass gradients of the empty tensors
    elif dy1 is None:
        dy1 = torch.zeros_like(h, dtype=ctx.x_dtype)
    if not ctx.has_residual_out:
        dresidual_out = None
    dx, dx1, dresidual, dweight, dbias, dweight1, dbias1 = layer_norm_branches_backward(
        dy,
        dy1,
        dresidual_out,
        h,
        weight,
        bias,
        weight1,
        bias1,
        rowscale,
        seed,
        ctx.dropout_p,
        mean,
        rstd,
        ctx.x_dtype,
        ctx.x1_dtype,
        ctx.has_residual,
        ctx.is_rms_norm,
    )

    def there(condition, gradient):
        return gradient if condition else None

    return (
        dx,
        dweight,
        there(bias is not None, dbias),
        there(ctx.has_residual, dresidual),
        there(ctx.x1_dtype is not None, dx1),
        there(weight1 is not None, dweight1),
        there(bias1 is not None, dbias1),
        *[None] * 7,
    )


layer_norm_backward = operation("layer_norm_backward", _backward_fake)
layer_norm_forward = operation("layer_norm_forward", _forward_fake, setup_context, backward)
layer_norm_branches_backward = operation("layer_norm_branches_backward", _branches_backward_fake)
layer_norm_branches_forward = operation(
    "layer_norm_branches_forward",
    _branches_forward_fake,
    branches_setup_context,
    branches_backward,
)
