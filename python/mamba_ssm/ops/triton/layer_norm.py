"""LayerNorm and RMSNorm fused with the residual addition, and the same formula in plain PyTorch."""

import torch
import torch.nn.functional as F

from mamba_ssm.native import layer_norm as native
from mamba_ssm.native import vmap


class LayerNormFn(torch.autograd.Function):
    """Eager route to the kernels, cheaper than a registered formula; takes what `_arguments` prepared.

    Returns (y, y1, residual_out, mask, mask1); what is absent is an empty tensor or None.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, *rest):
        inputs = (x, weight, bias, residual, *rest)
        ctx.branches = _has_branches(inputs)
        if ctx.branches:
            output = native.layer_norm_branches_forward(*inputs)
            native.branches_setup_context(ctx, inputs, output)
            y, y1, residual_out, _, _, mask, mask1 = output
            return y, y1, residual_out, mask, mask1
        output = native.layer_norm_forward(x, weight, bias, residual, *rest[6:9])
        native.setup_context(ctx, (x, weight, bias, residual, *rest[6:9]), output)
        return output[0], None, output[1], None, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dy1, dresidual_out, *_):
        if ctx.branches:
            return native.branches_backward(ctx, dy, dy1, dresidual_out)
        return *native.gradients(ctx, ctx.saved_tensors, dy, dresidual_out), *[None] * 10


def _has_branches(arguments):
    """Whether `_arguments` ask for more than the norm of x + residual."""
    _, _, _, _, x1, weight1, bias1, rowscale, _, dropout_p, *_ = arguments
    return dropout_p != 0.0 or any(t is not None for t in (x1, weight1, bias1, rowscale))


def _draw_seed(x, dropout_p):
    """What dropout draws from torch's generator: one number, on x's device, so that graphs can be captured."""
    if dropout_p == 0.0:
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)


def _arguments(
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
    residual_in_fp32,
    is_rms_norm,
    return_dropout_mask,
):
    """The arguments of `layer_norm_branches_forward`: rows flattened, the seed drawn."""
    for name, other in (("residual", residual), ("x1", x1)):
        assert other is None or other.shape == x.shape, (
            f"{name} must have x's shape {tuple(x.shape)}, got {tuple(other.shape)}"
        )
    if rowscale is not None and rowscale.requires_grad and torch.is_grad_enabled():
        # rare enough to leave its gradient to torch
        x, rowscale = (x * rowscale.reshape(x.shape[:-1])[..., None]).to(x.dtype), None

    def rows(tensor):
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])

    return (
        rows(x),
        weight,
        bias,
        rows(residual),
        rows(x1),
        weight1,
        bias1,
        None if rowscale is None else rowscale.reshape(-1),
        _draw_seed(x, dropout_p),
        float(dropout_p),
        eps,
        bool(is_rms_norm),
        bool(residual_in_fp32),
        bool(return_dropout_mask),
    )


def _apply(arguments):
    """(y, y1, residual_out, mask, mask1), by the route that compiled graphs or eager code want."""
    if not vmap.through_dispatcher():
        return LayerNormFn.apply(*arguments)
    if _has_branches(arguments):
        forward = native.layer_norm_branches_forward
        y, y1, residual_out, _, _, mask, mask1 = vmap.call(forward, *arguments)
        return y, y1, residual_out, mask, mask1
    plain = (*arguments[:4], *arguments[10:13])
    y, residual_out, *_ = vmap.call(native.layer_norm_forward, *plain)
    return y, None, residual_out, None, None


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
    """h = dropout(x rowscale) + dropout(x1) + residual;  y = (h - mean) rstd weight + bias, h rstd weight + bias for RMS.

    x, x1, residual: (..., N), any float dtypes; rowscale: as many as rows; weight, bias: (N); eps is added to the
    variance or mean square. weight1, bias1: (N), a second output y1 from the same normalised h.
    dropout_p: in [0, 1]; the seed comes from torch's generator of x's device, the mask from the seed alone.
    Returns y in x's dtype, or a tuple: y, y1 with weight1, h with prenorm, and with return_dropout_mask the bool
    masks of x and x1 (True where they stay; None without dropout or x1). h has the residual's dtype, without
    residual float32 (residual_in_fp32) or x's; it is x itself where nothing changed it.
    Everything is differentiable. RuntimeError or AssertionError names an argument that does not fit.
    """
    arguments = _arguments(
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
        residual_in_fp32,
        is_rms_norm,
        return_dropout_mask,
    )
    y, y1, residual_out, *masks = _apply(arguments)
    outputs = [y.reshape(x.shape)]
    if weight1 is not None:
        outputs.append(y1.reshape(x.shape))
    if prenorm:
        unchanged = residual_out.dim() == 1  # the kernel does not copy a sum that is x itself
        outputs.append(x if unchanged else residual_out.reshape(x.shape))
    if return_dropout_mask:
        there = (dropout_p != 0.0, dropout_p != 0.0 and x1 is not None)
        outputs += [
            m.reshape(x.shape) if given else None for m, given in zip(masks, there, strict=True)
        ]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


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
    """`layer_norm_fn` with is_rms_norm: no mean, rstd = (mean(h^2) + eps)^-1/2."""
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


def _linear_dtype(x):
    """The dtype of the linear layer after a norm of x: autocast's where that is on, else the norm's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _linear(y, weight, bias, dtype):
    return F.linear(y.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class LayerNormLinearFn(torch.autograd.Function):
    """Eager route of `layer_norm_linear_fn` for (rows, features): y is computed again instead of kept."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, linear_weight, linear_bias, residual, *rest):
        inputs = (x, norm_weight, norm_bias, residual, *rest)
        y, residual_out, mean, rstd = native.layer_norm_forward(*inputs)
        ctx.eps, ctx.is_rms_norm, _ = rest
        ctx.has_residual = residual is not None
        ctx.has_residual_out = residual_out.dim() == 2  # otherwise empty: the sum is x itself
        ctx.x_dtype, ctx.linear_dtype = x.dtype, _linear_dtype(x)
        ctx.bias_dtype = None if linear_bias is None else linear_bias.dtype
        ctx.set_materialize_grads(False)
        h = residual_out if ctx.has_residual_out else x
        ctx.save_for_backward(h, norm_weight, norm_bias, linear_weight, mean, rstd)
        return _linear(y, linear_weight, linear_bias, ctx.linear_dtype), residual_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dresidual_out):
        h, norm_weight, norm_bias, linear_weight, mean, rstd = ctx.saved_tensors
        dy = dlinear_weight = dlinear_bias = None
        if dout is not None:
            y, *_ = native.layer_norm_forward(
                h, norm_weight, norm_bias, None, ctx.eps, ctx.is_rms_norm, False
            )
            dy = (dout @ linear_weight.to(dout.dtype)).to(ctx.x_dtype)
            dlinear_weight = (dout.t() @ y.to(dout.dtype)).to(linear_weight.dtype)
            if ctx.bias_dtype is not None:
                dlinear_bias = dout.sum(0).to(ctx.bias_dtype)
        saved = (h, norm_weight, norm_bias, mean, rstd)
        dx, dnorm_weight, dnorm_bias, dresidual = native.gradients(ctx, saved, dy, dresidual_out)
        gradients = (dx, dnorm_weight, dnorm_bias, dlinear_weight, dlinear_bias, dresidual)
        return *gradients, None, None, None


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
    """`layer_norm_fn`, then a linear layer in the norm's dtype, or autocast's where that is on.

    linear_weight: (M, N), linear_bias: (M), any float dtypes. Returns out (..., M), or (out, h) with prenorm.
    """
    assert residual is None or residual.shape == x.shape, (
        f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
    )
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    options = (eps, bool(is_rms_norm), bool(residual_in_fp32))
    if vmap.through_dispatcher():
        y, residual_out, *_ = vmap.call(
            native.layer_norm_forward, rows, norm_weight, norm_bias, residual_rows, *options
        )
        out = _linear(y, linear_weight, linear_bias, _linear_dtype(x))
    else:
        out, residual_out = LayerNormLinearFn.apply(
            rows, norm_weight, norm_bias, linear_weight, linear_bias, residual_rows, *options
        )
    out = out.reshape(*x.shape[:-1], out.shape[-1])
    if not prenorm:
        return out
    return out, x if residual_out.dim() == 1 else residual_out.reshape(x.shape)


def _layer_norm_fwd(
    x,
    weight,
    bias,
    eps,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    dropout_p=0.0,
    rowscale=None,
    out_dtype=None,
    residual_dtype=None,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """Forward of (rows, features) without a graph, as some callers of upstream want it.

    Returns (y, y1, mean, rstd, residual_out, seeds, mask, mask1), None for what is absent; residual_out is x
    itself where nothing changed it. seeds: (1) int64, what `_layer_norm_bwd` takes.
    """
    seed = _draw_seed(x, dropout_p)
    with torch.no_grad():
        y, y1, residual_out, mean, rstd, mask, mask1 = native.layer_norm_branches_forward(
            x,
            weight,
            bias,
            residual,
            x1,
            weight1,
            bias1,
            None if rowscale is None else rowscale.reshape(-1),
            seed,
            float(dropout_p),
            eps,
            bool(is_rms_norm),
            residual_dtype not in (None, x.dtype),
            bool(return_dropout_mask),
        )
        residual_out = x if residual_out.dim() == 1 else residual_out.to(residual_dtype)

        def there(condition, tensor, dtype=None):
            return tensor.to(dtype) if condition else None

        return (
            y.to(out_dtype),
            there(weight1 is not None, y1, out_dtype),
            there(not is_rms_norm, mean),
            rstd,
            residual_out,
            seed,
            there(mask.dim() == 2, mask),
            there(mask1.dim() == 2, mask1),
        )


def _layer_norm_bwd(
    dy,
    x,
    weight,
    bias,
    eps,
    mean,
    rstd,
    dresidual=None,
    dy1=None,
    weight1=None,
    bias1=None,
    seeds=None,
    dropout_p=0.0,
    rowscale=None,
    has_residual=False,
    has_x1=False,
    is_rms_norm=False,
    x_dtype=None,
    recompute_output=False,
):
    """Backward of `_layer_norm_fwd`: x is its residual_out, dresidual that output's gradient.

    x_dtype: of the branches and their gradients, by default x's. Returns (dx, dweight, dbias, dresidual, dx1,
    dweight1, dbias1), None for what is absent, and with recompute_output y as well.
    """
    x_dtype = x_dtype or x.dtype
    with torch.no_grad():
        dx, dx1, dresidual_in, dweight, dbias, dweight1, dbias1 = (
            native.layer_norm_branches_backward(
                dy,
                dy1,
                dresidual,
                x,
                weight,
                bias,
                weight1,
                bias1,
                None if rowscale is None else rowscale.reshape(-1),
                seeds,
                float(dropout_p),
                x.new_empty(0) if mean is None else mean,
                rstd,
                x_dtype,
                x_dtype if has_x1 else None,
                bool(has_residual),
                bool(is_rms_norm),
            )
        )
        gradients = (
            dx,
            dweight,
            None if bias is None else dbias,
            dresidual_in if has_residual else None,
            dx1 if has_x1 else None,
            None if weight1 is None else dweight1,
            None if bias1 is None else dbias1,
        )
        if not recompute_output:
            return gradients
        y, *_ = native.layer_norm_forward(x, weight, bias, None, eps, bool(is_rms_norm), False)
        return *gradients, y.to(dy.dtype)


class RMSNorm(torch.nn.Module):
    """RMSNorm with weight and no bias; forward(x, residual) adds the residual to x, dropped out in training."""

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
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
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
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
