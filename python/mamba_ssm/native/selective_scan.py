"""Shapes and gradient of the selective scan, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation
from mamba_ssm.utils.determinism import use_deterministic_mode

CHECKPOINT_INTERVAL = 256  # steps between two stored states


def state_dtypes(dtype, A):
    """(dtype of D and delta_bias, dtype of A, static B and C and the states) of a scan over u of `dtype`."""
    real = torch.promote_types(dtype, torch.float32)
    return real, torch.promote_types(real, torch.complex64) if A.is_complex() else real


def as_parts(A, B, C, initial_state=None):
    """A, B, C and states as the operations take them: complex numbers are (..., 2), real and imaginary part.

    A, static B and C, initial_state: in A's dtype. Time-varying B and C for complex A: (B, G, N, 2L), both parts of a
    step beside each other; they become (B, G, N, L, 2).
    """
    if not A.is_complex():
        return A, B, C, initial_state

    def parts(tensor):
        return None if tensor is None else torch.view_as_real(tensor.resolve_conj())

    def projection(tensor):
        return parts(tensor) if tensor.dim() == 2 else tensor.unflatten(-1, (-1, 2))

    return parts(A), projection(B), projection(C), parts(initial_state)


def from_parts(A, dA, dB, dC):
    """`as_parts` undone, for gradients by a scan with this A."""
    if not A.is_complex():
        return dA, dB, dC

    def projection(tensor):
        return torch.view_as_complex(tensor) if tensor.dim() == 3 else tensor.flatten(-2)

    return torch.view_as_complex(dA), projection(dB), projection(dC)


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
    blocks = (length + CHECKPOINT_INTERVAL - 1) // CHECKPOINT_INTERVAL
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    rows = batch if sequences == 0 else sequences
    return (
        u.new_empty(u.shape),
        u.new_empty((rows, dim, *A.shape[1:]), dtype=state_dtype),
        u.new_empty((batch, dim, blocks, *A.shape[1:]), dtype=state_dtype),
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
