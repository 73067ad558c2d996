"""Upstream's functions below autograd, and its operators for torch.library.

Shapes and dtypes are those of `causal_conv1d_interface`, the checks those of `causal_conv1d_cuda`.
torch.ops.DaoAILab has the operators under upstream's names; each fills what its schema marks with "!" and returns
nothing. A package that registered the same names before keeps them.
"""

import causal_conv1d_cuda
import torch

_OPERATORS = {
    "_causal_conv1d_fwd_cpp": (
        causal_conv1d_cuda.causal_conv1d_fwd,
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, Tensor(a!) out, "
        "Tensor(b!)? final_states_out, bool silu_activation) -> ()",
    ),
    "_causal_conv1d_bwd_cpp": (
        causal_conv1d_cuda.causal_conv1d_bwd,
        "(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, Tensor? initial_states, "
        "Tensor? dfinal_states, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias, "
        "Tensor(d!)? dinitial_states, bool silu_activation) -> ()",
    ),
    "_causal_conv1d_update_cpp": (
        causal_conv1d_cuda.causal_conv1d_update,
        "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor(b!) out, bool silu_activation, "
        "Tensor? cache_seqlens, Tensor? conv_state_indices) -> ()",
    ),
}


for _name, (_function, _schema) in _OPERATORS.items():
    if not hasattr(torch.ops.DaoAILab, _name):
        torch.library.define(f"DaoAILab::{_name}", _schema)
        torch.library.impl(f"DaoAILab::{_name}", "CompositeExplicitAutograd", _function)
        torch.library.register_fake(f"DaoAILab::{_name}", lambda *args: None)


def causal_conv1d_fwd_function(
    x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
):
    """out (B, D, L); final_states_out (B, D, W-1), may be None, is filled. No autograd."""
    return causal_conv1d_cuda.causal_conv1d_fwd(
        x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
    )


def causal_conv1d_bwd_function(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    dx,
    return_dinitial_states,
    silu_activation,
):
    """(dx, dweight, dbias, dinitial_states); a given dx is written and returned, absent gradients are None."""
    return tuple(
        causal_conv1d_cuda.causal_conv1d_bwd(
            x,
            weight,
            bias,
            dout,
            seq_idx,
            initial_states,
            dfinal_states,
            dx,
            return_dinitial_states,
            silu_activation,
        )
    )


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    """out, shaped as x (B, D) or (B, D, S); conv_state is changed in place. No autograd."""
    return causal_conv1d_cuda.causal_conv1d_update(
        x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
    )
