"""Shapes and gradient of the chunked scan of Mamba-2, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation
from mamba_ssm.utils.determinism import use_deterministic_mode

CHECKPOINT_INTERVAL = 256  # steps between two stored states


def _forward_fake(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_states,
    dt_softplus,
    dt_min,
    dt_max,
    seq_idx,
    sequences,
    reverse,
    checkpoints,
):
    batch, length, heads, headdim = x.shape
    state = (heads, headdim, B.shape[-1])
    blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    rows = batch if sequences == 0 else sequences
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, *state), dtype=state_dtype),
        x.new_empty((batch, blocks, *state) if checkpoints else 0, dtype=state_dtype),
    )


def _backward_fake(
    dout,
    dlast_states,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_states,
    checkpoints,
    dt_softplus,
    dt_min,
    dt_max,
    seq_idx,
    sequences,
    reverse,
    deterministic,
):
    def like(tensor, dtype):
        return x.new_empty(0 if tensor is None else tensor.shape, dtype=dtype)

    sums = torch.promote_types(x.dtype, torch.float32)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    dtypes = (x.dtype, dt.dtype, sums, B.dtype, C.dtype, sums, x.dtype, sums, sums)
    return tuple(map(like, inputs, dtypes))


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `ssd_forward`."""
    *tensors, softplus, low, high, seq_idx, sequences, reverse, _ = inputs
    ctx.limits, ctx.packing = (softplus, low, high), (sequences, reverse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seq_idx, output[2])


def backward(ctx, dout, dlast_states=None, _=None):
    """Gradients in the order of `ssd_forward`'s arguments."""
    *tensors, seq_idx, checkpoints = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    options = (*ctx.limits, seq_idx, *ctx.packing, use_deterministic_mode())
    grads = ssd_backward(dout, dlast_states, *tensors, checkpoints, *options)
    grads = (None if t is None else grad for t, grad in zip(tensors, grads, strict=True))
    return *grads, None, None, None, None, None, None, None


ssd_backward = operation("ssd_backward", _backward_fake)
ssd_forward = operation("ssd_forward", _forward_fake, setup_context, backward)
