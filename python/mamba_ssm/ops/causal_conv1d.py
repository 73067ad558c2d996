"""The causal depthwise convolution; the package `causal_conv1d` is this module under upstream's names."""

import torch
import torch.nn.functional as F

from mamba_ssm.native import causal_conv1d as native
from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_filled, check_tensor, to_int32


class CausalConv1dFn(torch.autograd.Function):
    """Eager route to the kernels, cheaper than a registered formula; takes prepared arguments."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        inputs = (
            x,
            weight,
            bias,
            seq_idx,
            initial_states,
            return_final_states,
            _is_silu(activation),
        )
        out, final_states = output = native.causal_conv1d_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        if not return_final_states:
            return out
        if final_states_out is not None:
            final_states = final_states_out.copy_(final_states)
            ctx.mark_dirty(final_states_out)
        return out, final_states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dfinal_states=None):
        dx, dweight, dbias, _, dinitial_states, *_ = native.backward(ctx, dout, dfinal_states)
        return dx, dweight, dbias, None, dinitial_states, None, None, None


def _is_silu(activation):
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, silu, or swish, got {activation!r}")
    return activation is not None


def _fast_layout(x):
    """The kernels take any strides and are fast when time or channels are contiguous."""
    return x if x is None or x.stride(2) == 1 or x.stride(1) == 1 else x.contiguous()


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """out[b,d,l] = act(bias[d] + sum_w weight[d,w] x[b,d,l-(W-1-w)]), zeros (or initial_states) before x.

    x: (B, D, L), channels or time contiguous; weight: (D, W), W from 2 to 8; bias: (D), weight's dtype.
    x and weight: float32, float16, bfloat16 in any pair (float64 on the CPU, both). out: x's dtype and layout.
    seq_idx: (B, L) int32 or int64; taps across sequences count as 0, a negative index gives 0.
    initial_states: (B, D, W-1), x's dtype: the inputs before x; with seq_idx, of the sequence of position 0.
    activation: None, "silu" or "swish".
    Returns out, or with return_final_states (out, final_states): (B, D, W-1), the last W-1 inputs, written to
    final_states_out (any strides) where given; with seq_idx, inputs of other sequences than the last position's are 0
    there. Everything but seq_idx is differentiable.
    NotImplementedError for another activation; TypeError or RuntimeError names an argument that does not fit, and
    nothing is changed then.
    """
    op = "causal_conv1d_fn"
    silu = _is_silu(activation)
    check_tensor(op, "x", x, "batch, dim, length")
    check_tensor(op, "weight", weight, "dim, width")
    if initial_states is not None:
        check_tensor(op, "initial_states", initial_states, "batch, dim, width - 1")
    if seq_idx is not None:
        seq_idx = to_int32(op, "seq_idx", seq_idx).contiguous()
    return_final_states = bool(return_final_states)
    if return_final_states and final_states_out is not None:
        shape = (*x.shape[:2], weight.shape[1] - 1)
        check_filled(op, "final_states_out", final_states_out, shape, x)
    x, initial_states = _fast_layout(x), _fast_layout(initial_states)
    if vmap.through_dispatcher():
        out, final_states = vmap.call(
            native.causal_conv1d_forward,
            x,
            weight,
            bias,
            seq_idx,
            initial_states,
            return_final_states,
            silu,
        )
        if not return_final_states:
            return out
        return out, final_states if final_states_out is None else final_states_out.copy_(
            final_states
        )
    return CausalConv1dFn.apply(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation
    )


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """`causal_conv1d_fn` with F.conv1d, computed in the weight's dtype; no seq_idx."""
    silu = _is_silu(activation)
    dtype_in = x.dtype
    dim, width = weight.shape
    if initial_states is None:
        padded = F.pad(x, (width - 1, 0))
    else:
        padded = torch.cat([initial_states, x], dim=-1)
    out = F.conv1d(padded.to(weight.dtype), weight.unsqueeze(1), bias, groups=dim)
    out = (F.silu(out) if silu else out).to(dtype_in)
    if not return_final_states:
        return out
    final_states = padded[..., padded.shape[-1] - (width - 1) :].to(dtype_in)
    return out, final_states.clone() if final_states_out is None else final_states_out.copy_(
        final_states
    )


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """Convolves new tokens after those in conv_state, which is changed in place. No gradient.

    x: (B, D) or (B, D, S), S new tokens; conv_state: (B or entries, D, state_len >= W-1), x's dtype.
    cache_seqlens: (B) int32 or int64; conv_state is then circular and token i goes to slot (cache_seqlens + i) mod
    state_len. conv_state_indices: (B) int32 or int64, the row of conv_state for each b; a negative one gives 0 and
    touches no state, one beyond conv_state is an error on the CPU and gives NaN on CUDA.
    Returns out, shaped and typed as x. NotImplementedError for another activation; TypeError or RuntimeError names
    an argument that does not fit, and nothing is changed then.
    """
    op = "causal_conv1d_update"
    silu = _is_silu(activation)
    one_token = isinstance(x, torch.Tensor) and x.dim() == 2
    x = x.unsqueeze(-1) if one_token else x
    check_tensor(op, "x", x, "batch, dim, tokens")
    with torch.no_grad():  # or torch would tie out to a gradient that does not exist
        out = native.causal_conv1d_update(
            x,
            conv_state,
            weight,
            bias,
            silu,
            to_int32(op, "cache_seqlens", cache_seqlens),
            to_int32(op, "conv_state_indices", conv_state_indices),
        )
    return out.squeeze(-1) if one_token else out


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """`causal_conv1d_update` in plain PyTorch; conv_state is changed in place."""
    silu = _is_silu(activation)
    one_token = x.dim() == 2
    x = x.unsqueeze(-1) if one_token else x
    dim, width = weight.shape
    state_len, tokens = conv_state.shape[-1], x.shape[-1]
    if cache_seqlens is None:
        context = torch.cat([conv_state, x], dim=-1)
        conv_state.copy_(context[..., context.shape[-1] - state_len :])
        context = context[..., context.shape[-1] - tokens - (width - 1) :]
    else:
        start = cache_seqlens.long().unsqueeze(1)
        before = (start + torch.arange(1 - width, 0, device=x.device)) % state_len
        context = torch.cat(
            [conv_state.gather(2, before.unsqueeze(1).expand(-1, dim, -1)), x], dim=-1
        )
        kept = torch.arange(max(0, tokens - state_len), tokens, device=x.device)  # one a slot
        slots = (start + kept) % state_len
        conv_state.scatter_(2, slots.unsqueeze(1).expand(-1, dim, -1), x[..., kept])
    out = F.conv1d(context.to(weight.dtype), weight.unsqueeze(1), bias, groups=dim)
    out = (F.silu(out) if silu else out).to(x.dtype)
    return out.squeeze(-1) if one_token else out


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last state_len tokens of each packed sequence, right-aligned after zeros. No gradient.

    x: (T, D), any strides; cu_seqlens: (S+1) int32 or int64, sorted, from 0 to T.
    Returns (S, D, state_len) in x's dtype, laid out as (S, state_len, D); zeros for an empty sequence.
    RuntimeError names an argument that does not fit; on CUDA cu_seqlens beyond [0, T] are clamped instead.
    """
    with torch.no_grad():
        return native.causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """`causal_conv1d_varlen_states` in plain PyTorch."""
    bounds = cu_seqlens.tolist()
    states = x.new_zeros((len(bounds) - 1, state_len, x.shape[1])).transpose(1, 2)
    for state, start, end in zip(states, bounds[:-1], bounds[1:], strict=True):
        kept = min(end - start, state_len)
        if kept:
            state[:, -kept:] = x[end - kept : end].T
    return states
