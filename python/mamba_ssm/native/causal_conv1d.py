"""Shapes and gradient of the causal convolution, for eager code and for compiled graphs."""

import torch

from mamba_ssm.native.loader import operation
from mamba_ssm.utils.determinism import use_deterministic_mode


def _time_major(like, batch, dim, length):
    """(batch, dim, length) laid out as (batch, length, dim)."""
    return like.new_empty((batch, length, dim)).transpose(1, 2)


def _layout_of(x):
    """Channel-last for a channel-last x, contiguous otherwise."""
    if x.stride(1) == 1 and x.stride(2) > 1:
        return _time_major(x, *x.shape)
    return x.new_empty(x.shape)


def _forward_fake(x, weight, bias, seq_idx, initial_states, return_final_states, silu):
    batch, dim, _ = x.shape
    if return_final_states:
        final_states = _time_major(x, batch, dim, weight.shape[1] - 1)
    else:
        final_states = x.new_empty(0)
    return _layout_of(x), final_states


def _backward_fake(
    dout, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, deterministic=False
):
    dinitial_states = x.new_empty(0)
    if initial_states is not None:
        dinitial_states = _time_major(x, *initial_states.shape)
    return (
        _layout_of(x),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else bias.shape),
        dinitial_states,
    )


def _update_fake(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return x.new_empty(x.shape)


def _varlen_states_fake(x, cu_seqlens, state_len):
    return _time_major(x, cu_seqlens.shape[0] - 1, x.shape[1], state_len)


def setup_context(ctx, inputs, output):
    """Keeps what `backward` needs; inputs and output are those of `causal_conv1d_forward`."""
    *tensors, ctx.has_final_states, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def backward(ctx, dout, dfinal_states=None):
    """Gradients in the order of `causal_conv1d_forward`'s arguments."""
    x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(x)
    if not ctx.has_final_states:
        dfinal_states = None  # compiled graphs pass a gradient of the empty tensor
    dx, dweight, dbias, dinitial_states = causal_conv1d_backward(
        dout,
        dfinal_states,
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        ctx.silu,
        use_deterministic_mode(),
    )
    dbias = None if bias is None else dbias
    dinitial_states = None if initial_states is None else dinitial_states
    return dx, dweight, dbias, None, dinitial_states, None, None


causal_conv1d_backward = operation("causal_conv1d_backward", _backward_fake)
causal_conv1d_forward = operation("causal_conv1d_forward", _forward_fake, setup_context, backward)
causal_conv1d_update = operation("causal_conv1d_update", _update_fake)
causal_conv1d_varlen_states = operation("causal_conv1d_varlen_states", _varlen_states_fake)
