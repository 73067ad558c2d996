"""The selective scan of Mamba-1 as a differentiable function, and the same formula in plain PyTorch."""

import itertools

import torch
import torch.nn.functional as F

from mamba_ssm._lazy import attach
from mamba_ssm.native import selective_scan as native
from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_tensor


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
        initial_states=None,
        seq_idx=None,
        sequences=0,
        reverse=False,
    ):
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_states)
        inputs = (*tensors, delta_softplus, seq_idx, sequences, reverse)
        output = native.selective_scan_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        return output[:2] if return_last_state else output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast_state=None):
        *grads, dinitial_states = native.backward(ctx, dout, dlast_state)[:9]
        return *grads, None, None, dinitial_states, None, None, None


def _unit_stride(tensor):
    """The kernels take any stride and are fast when time is contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _check(u, delta, A, B, C, D, z, delta_bias, initial_states):
    """What Python reads before the operation checks the rest."""
    op = "selective_scan_fn"
    steps, states = "batch, dim, length", "batch, dim, d_state"
    for name, tensor, axes in (("u", u, steps), ("delta", delta, steps), ("A", A, "dim, d_state")):
        check_tensor(op, name, tensor, axes)
    for name, tensor, axes in (
        ("D", D, "dim"),
        ("z", z, steps),
        ("delta_bias", delta_bias, "dim"),
        ("initial_states", initial_states, states),
    ):
        if tensor is not None:
            check_tensor(op, name, tensor, axes)
    for name, tensor in (("u", u), ("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.is_complex():
            raise RuntimeError(f"{op}: {name} must be real, got {tensor.dtype}")
    steps = u.shape[2] * (2 if A.is_complex() else 1)
    for name, tensor in (("B", B), ("C", C)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() not in (2, 3, 4) or (tensor.dim() > 2 and tensor.shape[-1] != steps):
            raise RuntimeError(
                f"{op}: {name} must have shape (dim, d_state), (batch, d_state, {steps}) or "
                f"(batch, groups, d_state, {steps}), got {tuple(tensor.shape)}"
            )


def _projection(tensor, dtype):
    """B or C as the kernels want it: (D, N) in the state's dtype, or (B, G, N, L)."""
    if tensor.dim() == 2:
        return tensor.to(dtype)
    return _unit_stride(tensor.unsqueeze(1) if tensor.dim() == 3 else tensor)


def _sequence_of_steps(cu_seqlens, u):
    """(seq_idx, number of sequences): steps beyond the last sequence have that number as index."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or u.shape[0] != 1:
        raise ValueError(
            "selective_scan_fn: cu_seqlens must have shape (sequences + 1) with u of batch 1, "
            f"got shape {tuple(cu_seqlens.shape)} and u of shape {tuple(u.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"selective_scan_fn: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}"
        )
    if not vmap.through_dispatcher() and cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > u.shape[2]:
            raise ValueError(
                "selective_scan_fn: cu_seqlens must start at 0, never fall and end at "
                f"{u.shape[2]} steps at most, got {bounds}"
            )
    steps = torch.arange(u.shape[2], device=u.device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[1:].to(u.device).contiguous()
    index = torch.searchsorted(ends, steps, right=True, out_int32=True)
    return index.unsqueeze(0), len(cu_seqlens) - 1


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
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    reverse=False,
):
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t];  out[t] = (C[t] h[t] + D u[t]) silu(z[t]).

    u, delta, z: (B, D, L), one dtype of float32, float16, bfloat16 (float64 on the CPU); out has it too.
    A: (D, N). B, C: (D, N), or (B, N, L) or (B, G, N, L) in u's dtype, G groups of D / G channels.
    A may be complex; then so are h, initial_states and static B and C, time-varying ones are (B, N, 2L) or (B, G, N, 2L)
    in u's dtype with real and imaginary part of a step beside each other, and out takes 2 Re(C[t] h[t]).
    D, delta_bias: (D). initial_states: (B, D, N), zero when absent.
    With delta_softplus, delta is softplus(delta + delta_bias).
    seq_idx: (B, L) int32; several sequences in a row, the state starts from zero wherever it changes.
    cu_seqlens: (S + 1) int32 or int64, batch 1: sequence s is the steps from cu_seqlens[s] to cu_seqlens[s + 1], may be
    empty, and has a row of its own in initial_states and last_state, (S, D, N). Steps beyond the last one are padding.
    With reverse the scan runs from the last step to the first, h[t] following h[t+1]: flip, scan and flip again, without
    the copies. initial_states enters at the last step, last_state is h[0].
    Returns out, or (out, last_state) with last_state (B or S, D, N) in float32, or complex64. Everything is differentiable.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_states)
    is_complex = A.is_complex()
    real_dtype, state_dtype = native.state_dtypes(u.dtype, A)

    def to(dtype, *tensors):
        return (None if tensor is None else tensor.to(dtype) for tensor in tensors)

    u, delta, z = _unit_stride(u), _unit_stride(delta), _unit_stride(z)
    B, C = _projection(B, state_dtype), _projection(C, state_dtype)
    A, initial_states = to(state_dtype, A, initial_states)
    A, B, C, initial_states = native.as_parts(A, B, C, initial_states)
    D, delta_bias = to(real_dtype, D, delta_bias)
    sequences = 0
    if cu_seqlens is not None:
        if seq_idx is not None:
            raise ValueError("selective_scan_fn: give seq_idx or cu_seqlens, got both")
        seq_idx, sequences = _sequence_of_steps(cu_seqlens, u)
    softplus, return_last_state, reverse = map(bool, (delta_softplus, return_last_state, reverse))
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if vmap.through_dispatcher():
        inputs = (*tensors, initial_states, softplus, seq_idx, sequences, reverse)
        out, last_state, _ = vmap.call(native.selective_scan_forward, *inputs)
    else:
        options = (softplus, return_last_state, initial_states, seq_idx, sequences, reverse)
        out = SelectiveScanFn.apply(*tensors, *options)
        if not return_last_state:
            return out
        out, last_state = out
    if not return_last_state:
        return out
    return out, torch.view_as_complex(last_state) if is_complex else last_state


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
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    reverse=False,
):
    """`selective_scan_fn` step by step in plain PyTorch, in float32 (float64 for float64)."""
    if cu_seqlens is not None:
        out, last_state = _reference_of_sequences(
            cu_seqlens.tolist(),
            (u, delta, A, B, C, D, z, delta_bias),
            delta_softplus,
            initial_states,
            reverse,
        )
        return (out, last_state) if return_last_state else out
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
    # Not decay[..., t]: its gradient is as large as decay, at every step.
    decays, drives = decay.unbind(-1), drive.unbind(-1)
    state = A.new_zeros((batch, *A.shape))
    if initial_states is not None:
        state = initial_states.to(A.dtype)
    states = [state] * length
    steps = range(length - 1, -1, -1) if reverse else range(length)
    for t in steps:
        if seq_idx is not None and t != steps[0]:
            same = seq_idx[:, t] == seq_idx[:, t - steps.step]
            state = torch.where(same[:, None, None], state, 0)
        state = decays[t] * state + drives[t]
        states[t] = state
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


def _reference_of_sequences(bounds, tensors, delta_softplus, initial_states, reverse):
    """One scan for each sequence and one for the padding, put together."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    outs, last_states = [], []
    for s, (begin, end) in enumerate(itertools.pairwise([*bounds, u.shape[2]])):

        def steps(tensor, width=1, begin=begin, end=end):
            is_static = tensor is None or tensor.dim() < 3
            return tensor if is_static else tensor[..., width * begin : width * end]

        width = 2 if A.is_complex() else 1
        part = [steps(u), steps(delta), steps(B, width), steps(C, width), steps(z)]
        enters = None if initial_states is None or s >= len(bounds) - 1 else initial_states[s, None]
        out, last_state = selective_scan_ref(
            part[0],
            part[1],
            A,
            part[2],
            part[3],
            D,
            part[4],
            delta_bias,
            delta_softplus,
            True,
            enters,
            reverse=reverse,
        )
        outs.append(out)
        last_states.append(last_state)
    return torch.cat(outs, dim=2), torch.cat(last_states[: len(bounds) - 1])


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
