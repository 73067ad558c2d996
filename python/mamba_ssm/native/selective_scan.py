"""Shapes and gradient of the selective scan, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation
from mamba_ssm.utils.determinism import use_deterministic_mode

CHECKPOINT_INTERVAL = 256  # steps between two stored states


def _forward_fake(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    delta_softplus,
    seq_idx=None,
    sequences=0,
    reverse=False,
):
    batch, dim, length = u.shape
    d_state = A.shape[1]
    blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    rows = batch if sequences == 0 else sequences
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, dim, d_state), dtype=state_dtype),
        u.new_empty((batch, dim, blocks, d_state), dtype=state_dtype),
    )


def _backward_fake(
    dout,
    dlast_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    checkpoints,
    delta_softplus,
    seq_idx=None,
    sequences=0,
    reverse=False,
    deterministic=False,
):
    def like(tensor, dtype):
        return u.new_empty(0 if tensor is None else tensor.shape, dtype=dtype)

    sums = torch.promote_types(u.dtype, torch.float32)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtypes = (u.dtype, u.dtype, sums, B.dtype, C.dtype, sums, u.dtype, sums, sums)
    return tuple(map(like, inputs, dtypes))


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `selective_scan_forward`."""
    *tensors, ctx.delta_softplus, seq_idx, ctx.sequences, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seq_idx, output[2])


def backward(ctx, dout, dlast_state=None, _=None):
    """Gradients in the order of `selective_scan_forward`'s arguments."""
    *tensors, seq_idx, checkpoints = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    options = (ctx.delta_softplus, seq_idx, ctx.sequences, ctx.reverse, use_deterministic_mode())
    grads = selective_scan_backward(dout, dlast_state, *tensors, checkpoints, *options)
    grads = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *grads, None, None, None, None


selective_scan_backward = operation("selective_scan_backward", _backward_fake)
selective_scan_forward = operation("selective_scan_forward", _forward_fake, setup_context, backward)
