"""The chunked scan of Mamba-2 as a differentiable function, and the same formula in plain PyTorch."""

import torch
import torch.nn.functional as F

from mamba_ssm._lazy import attach
from mamba_ssm.native import ssd as native
from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_tensor, to_int32
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.sequences import sequence_of_steps
from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, chunk_state
from mamba_ssm.ops.triton.ssd_state_passing import state_passing


class MambaChunkScanCombinedFn(torch.autograd.Function):
    """Eager route to the kernels, cheaper than a registered formula; takes `native.ssd_forward`'s arguments."""

    @staticmethod
    def forward(ctx, *inputs):
        output = native.ssd_forward(*inputs)
        native.setup_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlast_states=None):
        return native.backward(ctx, dout, dlast_states)


def _scan(*inputs):
    """(out, last_states) of `native.ssd_forward`'s arguments but the last: checkpoints only for a backward."""
    tensors = (t for t in inputs if isinstance(t, torch.Tensor))
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if vmap.through_dispatcher():
        # Within torch.func's transforms a tensor need not show that a gradient of it is wanted.
        checkpoints = differentiable or not torch.compiler.is_compiling()
        return vmap.call(native.ssd_forward, *inputs, checkpoints)[:2]
    return MambaChunkScanCombinedFn.apply(*inputs, differentiable)


def _check(op, x, dt, A, B, C, D, z, dt_bias, initial_states):
    """What Python reads or converts before the operation checks the rest."""
    channels, groups = "batch, length, heads, headdim", "batch, length, groups, d_state"
    skip = "heads, headdim" if isinstance(D, torch.Tensor) and D.dim() == 2 else "heads"
    required = (
        ("x", x, channels),
        ("dt", dt, "batch, length, heads"),
        ("A", A, "heads"),
        ("B", B, groups),
        ("C", C, groups),
    )
    optional = (
        ("D", D, skip),
        ("z", z, channels),
        ("dt_bias", dt_bias, "heads"),
        ("initial_states", initial_states, "batch, heads, headdim, d_state"),
    )
    given = (argument for argument in optional if argument[1] is not None)
    for name, tensor, axes in (*required, *given):
        check_tensor(op, name, tensor, axes)
        if not tensor.is_floating_point():
            raise RuntimeError(f"{op}: {name} must be of floating point, got {tensor.dtype}")


def _rows_of_states(initial_states, rows):
    """Initial states with a row for each sequence: those given first, zeros for the others."""
    missing = rows - initial_states.shape[0]
    return F.pad(initial_states, (0, 0) * (initial_states.dim() - 1) + (0, missing))


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
    reverse=False,
):
    """S[t] = exp(delta[t] A) S[t-1] + delta[t] x[t] B[t]^T;  out[t] = (S[t] C[t] + D x[t]) silu(z[t]).

    x, z: (B, L, H, P), float32, float16, bfloat16 (float64 on the CPU); out has x's dtype. dt: (B, L, H). A: (H).
    B, C: (B, L, G, N), G groups of H / G heads. D: (H) or (H, P). dt_bias: (H).
    delta is dt + dt_bias, through softplus with dt_softplus, clamped to dt_limit.
    chunk_size: any number from 1 on; changes nothing here, because kernels choose their own.
    initial_states: (B, H, P, N), zero when absent; enters at the first step.
    seq_idx: (B, L) int32; several sequences in a row, the state starts from zero wherever it changes.
    cu_seqlens: (S + 1) int32 or int64, batch 1: where sequences begin and, last, where the last one ends. Read only for
    return_varlen_states, then instead of seq_idx, and for initial_states of (S, H, P, N), a row for each sequence.
    With reverse the scan runs from the last step to the first, S[t] following S[t+1]; final states are S[0].

    Returns out, or a tuple of out, with return_final_states the states after the last step (B, H, P, N) float32, and
    with return_varlen_states those after each sequence (S, H, P, N) in state_dtype (C's dtype when None); an empty
    sequence has its initial state. States are float32 inside. Everything is differentiable, with float32 sums.
    """
    op = "mamba_chunk_scan_combined"
    _check(op, x, dt, A, B, C, D, z, dt_bias, initial_states)
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{op}: return_varlen_states needs cu_seqlens, got None")
    wide = torch.promote_types(x.dtype, torch.float32)
    varlen_dtype = C.dtype if state_dtype is None else state_dtype

    def parameter(tensor):
        return None if tensor is None else tensor.to(wide)

    def activation(tensor):
        return None if tensor is None else tensor.to(x.dtype)

    A, D, dt_bias, initial_states = map(parameter, (A, D, dt_bias, initial_states))
    B, C, z = map(activation, (B, C, z))
    dt = dt if dt.dtype == x.dtype else parameter(dt)
    seq_idx = to_int32(op, "seq_idx", seq_idx)
    count = rows = 0
    own_states = initial_states is not None and initial_states.shape[0] != x.shape[0]
    if return_varlen_states or (own_states and cu_seqlens is not None):
        batch, length = x.shape[:2]
        seq_idx, count = sequence_of_steps(op, cu_seqlens, batch, length, x.device)
        if own_states and initial_states.shape[0] != count:
            raise ValueError(
                f"{op}: initial_states must have a row for the batch entry or for each of the {count} "
                f"sequences, got shape {tuple(initial_states.shape)}"
            )
        rows = count + 1  # the last for the steps after all sequences
        initial_states = None if initial_states is None else _rows_of_states(initial_states, rows)
    limits = (bool(dt_softplus), float(dt_limit[0]), float(dt_limit[1]))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    out, states = _scan(*tensors, *limits, seq_idx, rows, bool(reverse))
    results = [out]
    if return_final_states:
        final = states
        if rows:
            last_step = seq_idx[0, :1] if reverse else seq_idx[0, -1:]
            final = states[:1] if length == 0 else states.index_select(0, last_step)
        results.append(final)
    if return_varlen_states:
        results.append(states[:count].to(varlen_dtype))
    return tuple(results) if len(results) > 1 else out


def mamba_chunk_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    """`mamba_chunk_scan_combined` chunk by chunk in plain PyTorch; shapes as there. Returns out."""
    length = x.shape[1]
    tail = -length % chunk_size

    def whole_chunks(tensor):
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, tail))

    dA_cumsum, delta = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, dt_softplus)
    x, B, C = map(whole_chunks, (x, B, C))
    z = None if z is None else whole_chunks(z)
    states = chunk_state(B, x, delta, dA_cumsum)
    entering, _ = state_passing(states.flatten(-2), dA_cumsum[..., -1])
    entering = entering.unflatten(-1, states.shape[-2:])
    return chunk_scan(B, C, x, delta, dA_cumsum, entering, D, z)[:, :length]


ssd_chunk_scan_combined_ref = mamba_chunk_scan


def ssd_selective_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
):
    """`mamba_chunk_scan_combined` as a selective scan of H P channels whose A is tied within a head. Returns out."""
    heads, headdim, d_state = *x.shape[2:], B.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = (F.softplus(dt, threshold=20.0) if dt_softplus else dt).clamp(*dt_limit)

    def channels(tensor):
        return None if tensor is None else tensor.flatten(2).transpose(1, 2)

    def projection(tensor):
        return tensor.permute(0, 2, 3, 1).to(dtype)

    D = None if D is None else (D.unsqueeze(-1) if D.dim() == 1 else D).expand(heads, headdim)
    out = selective_scan_fn(
        channels(x).to(dtype),
        channels(dt.unsqueeze(-1).expand(*dt.shape, headdim)),
        A.to(dtype)[:, None, None].expand(heads, headdim, d_state).flatten(0, 1),
        projection(B),
        projection(C),
        D=None if D is None else D.flatten().to(dtype),
        z=None if z is None else channels(z).to(dtype),
    )
    return out.transpose(1, 2).unflatten(2, (heads, headdim)).to(x.dtype)


# What callers find in upstream's module and lives elsewhere.
__getattr__, _elsewhere = attach(
    __name__,
    functions={
        **dict.fromkeys(
            (
                "MambaSplitConv1dScanCombinedFn",
                "mamba_conv1d_scan_ref",
                "mamba_split_conv1d_scan_combined",
                "mamba_split_conv1d_scan_ref",
            ),
            "mamba_ssm.ops.mamba_split",
        ),
        **dict.fromkeys(
            (
                "_chunk_scan_chunk_state_bwd_dx",
                "_mamba_chunk_scan_combined_bwd",
                "_mamba_chunk_scan_combined_fwd",
                "ensure_stride",
                "selective_scan_bwd",
            ),
            "mamba_ssm.ops.ssd_pieces",
        ),
    },
    submodules=(),
)


def __dir__():
    return sorted({*globals(), *_elsewhere()})
