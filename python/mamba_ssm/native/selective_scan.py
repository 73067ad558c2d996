"""Shapes and gradient of the selective scan, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation

CHECKPOINT_INTERVAL = 256  # steps between two stored states


def _forward_fake(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus):
    batch, dim, length = u.shape
    d_state = A.shape[1]
    blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, dim, d_state), dtype=state_dtype),
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
):
    def like(tensor, dtype):
        return u.new_empty(0 if tensor is None else tensor.shape, dtype=dtype)

    sums = torch.promote_types(u.dtype, torch.float32)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtypes = (u.dtype, u.dtype, sums, B.dtype, C.dtype, sums, u.dtype, sums, sums)
    return tuple(map(like, inputs, dtypes))


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `selective_scan_forward`."""
    *tensors, ctx.delta_softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def backward(ctx, dout, dlast_state=None, _=None):
    """Gradients in the order of `selective_scan_forward`'s arguments."""
    *tensors, checkpoints = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    grads = selective_scan_backward(dout, dlast_state, *tensors, checkpoints, ctx.delta_softplus)
    return *(None if t is None else grad for t, grad in zip(tensors, grads, strict=True)), None


selective_scan_backward = operation("selective_scan_backward", _backward_fake)
selective_scan_forward = operation("selective_scan_forward", _forward_fake, setup_context, backward)
