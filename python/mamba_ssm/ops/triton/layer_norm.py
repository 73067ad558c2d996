"""LayerNorm and RMSNorm fused with the residual addition, and the same formula in plain PyTorch."""

import torch
import torch.nn.functional as F

from mamba_ssm.native import layer_norm as native


class LayerNormFn(torch.autograd.Function):
    """Eager route to the kernels, cheaper than a registered formula; takes prepared (rows, features)."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, is_rms_norm, residual_in_fp32):
        inputs = (x, weight, bias, residual, eps, is_rms_norm, residual_in_fp32)
        output = native.layer_norm_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dresidual_out):
        return native.backward(ctx, dy, dresidual_out)


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """h = x + residual;  y = (h - mean) rstd weight + bias, or h rstd weight + bias for RMS.

    x, residual: (..., N), any float dtypes; weight, bias: (N); eps is added to the variance or mean square.
    Returns y in x's dtype, or (y, h) with prenorm: h in the residual's dtype, without residual in float32
    (residual_in_fp32) or x's dtype. Everything is differentiable.
    Dropout, row scales and a second branch (x1, weight1, bias1) are refused by name.
    """
    for name, given in (
        ("x1", x1 is not None),
        ("weight1", weight1 is not None),
        ("bias1", bias1 is not None),
        ("dropout_p", dropout_p > 0.0),
        ("rowscale", rowscale is not None),
        ("return_dropout_mask", return_dropout_mask),
    ):
        if given:
            raise NotImplementedError(f"layer_norm_fn does not support {name} in this version")
    if residual is not None:
        assert residual.shape == x.shape, "residual must have x's shape"
    features = x.shape[-1]
    arguments = (
        x.reshape(-1, features),
        weight,
        bias,
        None if residual is None else residual.reshape(-1, features),
        eps,
        bool(is_rms_norm),
        bool(residual_in_fp32),
    )
    if torch.compiler.is_compiling():
        y, residual_out, *_ = native.layer_norm_forward(*arguments)
    else:
        y, residual_out = LayerNormFn.apply(*arguments)
    y = y.reshape(x.shape)
    if not prenorm:
        return y
    unchanged = residual_out.dim() == 1  # the kernel does not copy a sum that is x itself
    return y, x if unchanged else residual_out.reshape(x.shape)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """`layer_norm_fn` without a mean: y = h rstd weight + bias, rstd = (mean(h^2) + eps)^-1/2."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """A norm followed by a linear layer whose weight is cast to the norm's output dtype."""
    y, residual_out = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    linear_bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), linear_bias)
    return (out, residual_out) if prenorm else out


class RMSNorm(torch.nn.Module):
    """RMSNorm with weight and no bias; forward(x, residual) adds the residual first."""

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        if dropout_p > 0.0:
            raise NotImplementedError("RMSNorm does not support dropout_p in this version")
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def _reference(normalise, x, weight, bias, residual, x1, weight1, bias1, options):
    dropout_p, rowscale, prenorm, mask, mask1, upcast = options
    dtype = x.dtype
    if upcast:

        def up(tensor):
            return (
                None
                if tensor is None
                else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            )

        x, weight, bias, residual = up(x), up(weight), up(bias), up(residual)
        x1, weight1, bias1 = up(x1), up(weight1), up(bias1)
    if rowscale is not None:
        assert x1 is None, "rowscale is not supported with x1"
        x = x * rowscale[..., None]
    if dropout_p > 0.0:
        x = x * mask / (1.0 - dropout_p) if mask is not None else F.dropout(x, p=dropout_p)
        if x1 is not None:
            x1 = x1 * mask1 / (1.0 - dropout_p) if mask1 is not None else F.dropout(x1, p=dropout_p)
    x = x if x1 is None else x + x1
    x = x if residual is None else (x + residual).to(x.dtype)
    normalised = normalise(x)

    def affine(weight, bias):
        out = normalised * weight
        return (out if bias is None else out + bias).to(dtype)

    outputs = [affine(weight, bias)]
    if weight1 is not None:
        outputs.append(affine(weight1, bias1))
    if prenorm:
        outputs.append(x)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """`layer_norm_fn` in plain PyTorch, in x's dtype or, with upcast, in float32."""

    def normalise(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)

    options = (dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1, upcast)
    return _reference(normalise, x, weight, bias, residual, x1, weight1, bias1, options)


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """`rms_norm_fn` in plain PyTorch, in x's dtype or, with upcast, in float32."""

    def normalise(h):
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)

    options = (dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1, upcast)
    return _reference(normalise, x, weight, bias, residual, x1, weight1, bias1, options)
