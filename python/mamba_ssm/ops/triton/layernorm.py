"""`layer_norm` under the path and with the argument order that it had before mamba_ssm 2."""

from mamba_ssm.ops.triton import layer_norm as _current
from mamba_ssm.ops.triton.layer_norm import RMSNorm as RMSNorm


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """See `mamba_ssm.ops.triton.layer_norm.layer_norm_fn`."""
    return _current.layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )


def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    """See `mamba_ssm.ops.triton.layer_norm.rms_norm_fn`."""
    return layer_norm_fn(
        x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True
    )
