"""The selective scan of Mamba-1 as a differentiable function, and the same formula in plain PyTorch."""

import torch
import torch.nn.functional as F

from mamba_ssm._lazy import attach
from mamba_ssm.native import selective_scan as native
from mamba_ssm.native import vmap


class SelectiveScanFn(torch.autograd.Function):
    """Eager route to the kernels, cheaper than a registered formula; takes prepared arguments."""

    @staticmethod
    def forward(
        ctx,
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        initial_state=None,
    ):
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
        output = native.selective_scan_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        return output[:2] if return_last_state else output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast_state=None):
        *grads, dinitial_state, _ = native.backward(ctx, dout, dlast_state)
        return *grads, None, None, dinitial_state


def _unit_stride(tensor):
    """The kernels take any stride and are fast when time is contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _projection(tensor, dtype):
    """B or C as the kernels want it: (D, N) in the state's dtype, or (B, G, N, L)."""
    if tensor.dim() == 2:
        return tensor.to(dtype)
    return _unit_stride(tensor.unsqueeze(1) if tensor.dim() == 3 else tensor)


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    initial_state=None,
):
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t];  out[t] = (C[t] h[t] + D u[t]) silu(z[t]).

    u, delta, z: (B, D, L), one dtype of float32, float16, bfloat16 (float64 on the CPU); out has it too.
    A: (D, N). B, C: (D, N), or (B, N, L) or (B, G, N, L) in u's dtype, G groups of D / G channels.
    D, delta_bias: (D). initial_state: (B, D, N), zero when absent.
    With delta_softplus, delta is softplus(delta + delta_bias).
    Returns out, or (out, last_state) with last_state (B, D, N) in float32. Everything is differentiable.
    """
    if A.is_complex():
        raise NotImplementedError("selective_scan_fn: A must be real, got complex A")
    state_dtype = torch.promote_types(u.dtype, torch.float32)

    def parameter(tensor):
        return None if tensor is None else tensor.to(state_dtype)

    u, delta, z = _unit_stride(u), _unit_stride(delta), _unit_stride(z)
    B, C = _projection(B, state_dtype), _projection(C, state_dtype)
    A, D, delta_bias, initial_state = map(parameter, (A, D, delta_bias, initial_state))
    softplus, return_last_state = bool(delta_softplus), bool(return_last_state)
    if vmap.through_dispatcher():
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, softplus)
        out, last_state, _ = vmap.call(native.selective_scan_forward, *inputs)
        return (out, last_state) if return_last_state else out
    return SelectiveScanFn.apply(
        u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state, initial_state
    )


def _reference_projection(tensor, A, dim):
    """B or C spread to (B or 1, D, N, L or 1) in A's dtype; complex values are stored as pairs along L."""
    if tensor.dim() == 2:
        return tensor.to(A.dtype)[None, :, :, None]
    tensor = tensor.to(A.real.dtype if A.is_complex() else A.dtype)
    if A.is_complex():
        tensor = torch.view_as_complex(tensor.unflatten(-1, (-1, 2)).contiguous())
    tensor = tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
    return tensor.repeat_interleave(dim // tensor.shape[1], dim=1)


def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    initial_state=None,
):
    """`selective_scan_fn` step by step in plain PyTorch, in float32 (float64 for float64); A may be complex."""
    out_dtype = u.dtype
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, dim, length = u.shape
    u, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta, threshold=20.0)
    A = A if A.is_complex() else A.to(dtype)
    B, C = _reference_projection(B, A, dim), _reference_projection(C, A, dim)
    decay = torch.exp(delta.unsqueeze(2) * A[None, :, :, None])  # (B, D, N, L)
    drive = (delta * u).unsqueeze(2) * B
    state = A.new_zeros((batch, *A.shape)) if initial_state is None else initial_state.to(A.dtype)
    states = []
    for t in range(length):
        state = decay[..., t] * state + drive[..., t]
        states.append(state)
    y = u.new_zeros(u.shape)
    if length:
        y = (torch.stack(states, dim=-1) * C).sum(dim=2)
        y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + u * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(out_dtype)
    return (out, state) if return_last_state else out


# What callers find in upstream's module and lives elsewhere, if anywhere.
__getattr__, _elsewhere = attach(
    __name__,
    functions={
        "causal_conv1d_fn": "mamba_ssm.ops.causal_conv1d",
        **dict.fromkeys(
            (
                "MambaInnerFn",
                "bimamba_inner_fn",
                "bimamba_inner_ref",
                "mamba_inner_fn",
                "mamba_inner_fn_no_out_proj",
                "mamba_inner_ref",
                "rms_norm_forward",
            ),
            "mamba_ssm.ops.mamba_inner",
        ),
    },
    submodules=(),
    optional={
        "selective_scan_cuda": "selective_scan_cuda:",
        "causal_conv1d_cuda": "causal_conv1d_cuda:",
        "causal_conv1d_fwd_function": "causal_conv1d.cpp_functions:causal_conv1d_fwd_function",
        "causal_conv1d_bwd_function": "causal_conv1d.cpp_functions:causal_conv1d_bwd_function",
        "causal_conv1d_update_function": "causal_conv1d.cpp_functions:causal_conv1d_update_function",
    },
)


def __dir__():
    return sorted({*globals(), *_elsewhere()})
