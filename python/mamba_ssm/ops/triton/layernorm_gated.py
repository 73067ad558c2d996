"""The gated LayerNorm and RMSNorm of Mamba-2, and the RMSNorm in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.native import gated_norm as native
from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_filled


class LayerNormFn(torch.autograd.Function):
    """Eager route to the kernels for (rows, features), cheaper than a registered formula."""

    @staticmethod
    def forward(ctx, *inputs):
        output = native.gated_norm_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        return native.backward(ctx, dy)


def _rows(x, z):
    """x and z as (rows, features)."""
    if z is not None and z.shape != x.shape:
        raise RuntimeError(
            f"layernorm_gated: z must have x's shape {tuple(x.shape)}, got {tuple(z.shape)}"
        )
    return tuple(None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, z))


def _width(group_size, x):
    features = x.shape[-1]
    width = features if group_size is None else group_size
    if width < 1 or features % width:
        raise RuntimeError(
            f"layernorm_gated: group_size must divide the {features} features of x, got {width}"
        )
    return width


def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """norm(x) silu(z), or without norm_before_gate norm(x silu(z)); norm is (x - mean) rstd weight + bias.

    x, z: (..., N); weight, bias: (N), each of any float dtype; z and bias may be None. mean and rstd, with eps added to
    the variance, are those of each group of group_size neighbouring features, of all N when None.
    is_rms_norm: no mean, rstd = (mean(x^2) + eps)^-1/2.
    Returns (..., N) in x's dtype, computed in float32. Every tensor is differentiable. RuntimeError names an argument
    that does not fit.
    """
    rows, z = _rows(x, z)
    options = (eps, _width(group_size, x), bool(norm_before_gate), bool(is_rms_norm))
    if vmap.through_dispatcher():
        y, *_ = vmap.call(native.gated_norm_forward, rows, weight, bias, z, *options)
    else:
        y, *_ = LayerNormFn.apply(rows, weight, bias, z, *options)
    return y.reshape(x.shape)


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """`layernorm_fn` with is_rms_norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def rms_norm_ref(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    upcast=True,
):
    """`rmsnorm_fn` in plain PyTorch, in float32 with upcast, else in the tensors' dtypes."""
    dtype = x.dtype
    if upcast:
        wide = torch.promote_types(dtype, torch.float32)
        x, weight, bias, z = (None if t is None else t.to(wide) for t in (x, weight, bias, z))
    gate = 1 if z is None else F.silu(z)
    x = x if norm_before_gate else x * gate
    groups = x.unflatten(-1, (-1, _width(group_size, x)))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y * gate if norm_before_gate else y).to(dtype)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    z=None,
    out=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """Forward of (rows, features) without a graph, as some callers of upstream want it.

    out: filled if given. Returns (out, mean, rstd); mean, None for RMS, and rstd: (groups rows) float32, group by group.
    """
    if out is not None:
        check_filled("_layer_norm_fwd", "out", out, x.shape, x)
    options = (eps, _width(group_size, x), bool(norm_before_gate), bool(is_rms_norm))
    with torch.no_grad():
        y, mean, rstd = native.gated_norm_forward(x, weight, bias, z, *options)
        y = y if out is None else out.copy_(y)
    return y, None if is_rms_norm else mean.flatten(), rstd.flatten()


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    z=None,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
    recompute_output=False,
    dz=None,
    out=None,
):
    """Backward of `_layer_norm_fwd`: (dx, dweight, dbias, dz), None for what is absent.

    eps is in rstd already. With recompute_output the forward's output follows; dz and out are filled if given.
    """
    if dz is not None and z is not None:
        check_filled("_layer_norm_bwd", "dz", dz, x.shape, z)
    if out is not None:
        check_filled("_layer_norm_bwd", "out", out, x.shape, x)
    width = _width(group_size, x)
    groups = x.shape[-1] // width
    with torch.no_grad():
        mean = x.new_empty(0) if mean is None else mean.reshape(groups, -1)
        dx, dweight, dbias, dz_new, y = native.gated_norm_backward(
            dy,
            x,
            weight,
            bias,
            z,
            mean,
            rstd.reshape(groups, -1),
            width,
            bool(norm_before_gate),
            bool(is_rms_norm),
            bool(recompute_output),
        )
        if z is not None:
            dz_new = dz_new if dz is None else dz.copy_(dz_new)
        gradients = (dx, dweight, None if bias is None else dbias, None if z is None else dz_new)
        if not recompute_output:
            return gradients
        return *gradients, y if out is None else out.copy_(y)


class _GatedNorm(nn.Module):
    is_rms_norm = False

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
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty_like(self.weight))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x, z=None):
        options = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, z, *options)


class LayerNorm(_GatedNorm):
    """`layernorm_fn` with a weight of ones and a bias of zeros before training; forward(x, z)."""


class RMSNorm(_GatedNorm):
    """`rmsnorm_fn` with a weight of ones before training and no bias; forward(x, z)."""

    is_rms_norm = True
