"""SwiGLU, silu(x) y, of a tensor that holds x and y side by side (Shazeer 2020, arXiv:2002.05202)."""

import torch
import torch.nn.functional as F


def _halves(xy):
    """x and y of (..., 2k), in float32 (float64 for float64)."""
    if not xy.is_floating_point() or xy.dim() == 0 or xy.shape[-1] % 2 != 0:
        raise ValueError(
            f"swiglu: xy must be a floating tensor (..., 2k), got shape {tuple(xy.shape)}, {xy.dtype}"
        )
    return xy.to(torch.promote_types(xy.dtype, torch.float32)).chunk(2, dim=-1)


def _check_shape(name, tensor, shape):
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"swiglu: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def _store(values, out, dtype):
    return values.to(dtype) if out is None else out.copy_(values)


def _swiglu_fwd(xy, out=None):
    """silu(x) y of (..., 2k), in xy's dtype; `out` (..., k), any dtype and strides, is filled and returned."""
    x, y = _halves(xy)
    _check_shape("out", out, x.shape)
    return _store(F.silu(x) * y, out, xy.dtype)


def _swiglu_bwd(xy, dout, dxy=None, recompute_output=False, out=None):
    """Gradient of `_swiglu_fwd` at xy: dxy (..., 2k), or (dxy, out) with recompute_output.

    dxy and out are filled and returned where given; they may be slices of any strides.
    """
    x, y = _halves(xy)
    for name, tensor, shape in (("dout", dout, x.shape), ("dxy", dxy, xy.shape)):
        _check_shape(name, tensor, shape)
    _check_shape("out", out, x.shape)
    dout = dout.to(x.dtype)
    sigmoid = torch.sigmoid(x)
    silu = F.silu(x)
    dx = dout * y * (sigmoid + silu * (1 - sigmoid))
    dxy = _store(torch.cat([dx, dout * silu], dim=-1), dxy, xy.dtype)
    return (dxy, _store(silu * y, out, xy.dtype)) if recompute_output else dxy


class SwiGLU(torch.autograd.Function):
    """`swiglu` that keeps nothing but its input."""

    @staticmethod
    def forward(ctx, xy):
        ctx.save_for_backward(xy)
        return _swiglu_fwd(xy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (xy,) = ctx.saved_tensors
        return _swiglu_bwd(xy, dout)


def swiglu(xy):
    """silu(x) y for xy (..., 2k) = (x, y): (..., k) in xy's dtype, computed in float32. Differentiable."""
    if torch.compiler.is_compiling():  # torch 2.11 traces SwiGLU's backward to zeros
        return _swiglu_fwd(xy)
    return SwiGLU.apply(xy)
