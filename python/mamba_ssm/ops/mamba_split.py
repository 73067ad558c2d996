"""The Mamba-2 layer between its input projection and its output, as one differentiable function.

(zx0, z, xBC, dt) = zxbcdt;  (x, B, C) = act(conv(xBC));  y = chunked scan(x, dt, A, B, C, D);
out = out_proj [swiglu(zx0), norm(y, z)], where without a norm z gates y inside the scan.
"""

import torch
import torch.nn.functional as F

from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_shapes
from mamba_ssm.ops.anticausal_conv1d import anticausal_conv1d_fn
from mamba_ssm.ops.autocast import autocast_dtype
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm.ops.recompute import recomputed
from mamba_ssm.ops.triton.k_activations import swiglu
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref, rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, ssd_selective_scan


def _heads(xBC, dim, headdim, ngroups):
    """x (B, L, H, P), B and C (B, L, G, N) of xBC (B, L, H P + 2 G N)."""
    states = (xBC.shape[-1] - dim) // 2
    x, B, C = xBC.split([dim, states, states], dim=-1)
    B, C = (t.unflatten(-1, (ngroups, states // ngroups)) for t in (B, C))
    return x.unflatten(-1, (dim // headdim, headdim)), B, C


def _conv1d_scan(
    xBC,
    conv1d_weight,
    conv1d_bias,
    dt,
    A,
    chunk_size,
    D,
    z,
    dt_bias,
    initial_states,
    seq_idx,
    dt_limit,
    return_final_states,
    activation,
    headdim,
    ngroups,
    state_dtype,
    reverse,
):
    """Convolution and scan: (y (B, L, H P),), with return_final_states also the states (B, H, P, N) in float32."""
    convolve = anticausal_conv1d_fn if reverse else causal_conv1d_fn
    xBC = convolve(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx, activation=activation
    ).transpose(1, 2)
    x, B, C = _heads(xBC, len(A) * headdim, headdim, ngroups)
    result = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=None if z is None else z.unflatten(-1, (len(A), headdim)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
        state_dtype=state_dtype,
        reverse=reverse,
    )
    y, *states = result if return_final_states else (result,)
    return y.flatten(2), *states


Conv1dScanFn = recomputed("Conv1dScanFn", _conv1d_scan)


def conv1d_scan(
    xBC,
    conv1d_weight,
    conv1d_bias,
    dt,
    A,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    headdim=64,
    ngroups=1,
    reverse=False,
    recompute=True,
):
    """Convolution and chunked scan of one direction of time: (B, L, H P) in xBC's dtype.

    xBC: (B, L, H P + 2 G N); conv1d_weight: (H P + 2 G N, W); dt: (B, L, H); A: (H); D: (H) or (H, P);
    z: (B, L, H P), gates the result; everything else as `mamba_split_conv1d_scan_combined` takes it.
    With reverse both run from the last step to the first. With recompute the backward pass computes the convolution
    again, and nothing but the arguments is kept for it.
    """
    arguments = (xBC, conv1d_weight, conv1d_bias, dt, A, chunk_size, D, z, dt_bias, None, seq_idx)
    options = (tuple(dt_limit), False, activation, headdim, ngroups, None, reverse)
    if not recompute or vmap.through_dispatcher():
        return _conv1d_scan(*arguments, *options)[0]
    return Conv1dScanFn.apply(*arguments, *options)[0]


def _split(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """`mamba_split_conv1d_scan_combined` of prepared arguments, as its parts. Returns a tuple."""
    heads, headdim = D.shape if D.dim() == 2 else (len(D), headdim)
    dim, conv_dim = heads * headdim, conv1d_weight.shape[0]
    extra = zxbcdt.shape[-1] - dim - conv_dim - heads
    zx0, z, xBC, dt = zxbcdt.split([extra, dim, conv_dim, heads], dim=-1)
    y, *states = _conv1d_scan(
        xBC,
        conv1d_weight,
        conv1d_bias,
        dt,
        A,
        chunk_size,
        D,
        z if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_limit,
        return_final_states,
        activation,
        headdim,
        ngroups,
        state_dtype,
        False,
    )
    if rmsnorm_weight is not None:
        norm = {"group_size": dim // ngroups, "norm_before_gate": norm_before_gate}
        y = rmsnorm_fn(y, rmsnorm_weight, None, z=z, eps=rmsnorm_eps, **norm)
    if extra:
        y = torch.cat([swiglu(zx0), y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return y, *states


MambaSplitConv1dScanCombinedFn = recomputed("MambaSplitConv1dScanCombinedFn", _split)


def _check(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight, outproj, headdim, G):
    """Shapes that decide where the parts begin; what only one part reads is its to check."""
    op = "mamba_split_conv1d_scan_combined"
    check_shapes(op, [("zxbcdt", zxbcdt, "BLF"), ("conv1d_weight", conv1d_weight, "CW")])
    if D.dim() == 1:
        if headdim is None:
            raise ValueError(f"{op}: D of shape (heads) needs headdim, got None")
        D = D.unsqueeze(1).expand(-1, headdim)
    check_shapes(op, [("D", D, "HP")])
    (heads, headdim), channels = D.shape, conv1d_weight.shape[0]
    dim = heads * headdim
    extra = zxbcdt.shape[2] - dim - channels - heads
    if channels <= dim or (channels - dim) % (2 * G):
        raise RuntimeError(
            f"{op}: conv1d_weight must have {dim} rows for x and 2 * {G} * d_state for B and C, "
            f"got {channels}"
        )
    if extra < 0 or extra % 2:
        raise RuntimeError(
            f"{op}: zxbcdt must have {dim} + {channels} + {heads} features for z, xBC and dt, and before them "
            f"an even number for the MLP or none, got {zxbcdt.shape[2]}"
        )
    width = dim + extra // 2
    weight, bias = outproj
    if weight is None and bias is not None:
        raise ValueError(f"{op}: outproj_bias needs outproj_weight, got None")
    shapes = [
        ("conv1d_bias", conv1d_bias, (channels,)),
        ("dt_bias", dt_bias, (heads,)),
        ("A", A, (heads,)),
        ("rmsnorm_weight", rmsnorm_weight, (dim,)),
        ("outproj_weight", weight, ("E", width)),
    ]
    check_shapes(op, shapes)
    if bias is not None:
        check_shapes(op, [("outproj_bias", bias, (weight.shape[0],))])
    for name, tensor, _ in (*shapes, ("outproj_bias", bias, None)):  # the rest the kernels check
        if tensor is not None and tensor.device != zxbcdt.device:
            raise RuntimeError(
                f"{op}: {name} must be on {zxbcdt.device} like zxbcdt, got {tensor.device}"
            )


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """Convolution, chunked scan, gated norm and output projection of a Mamba-2 layer.

    zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H), the features [zx0 (2 M), z (H P), xBC (H P + 2 G N), dt (H)]; M >= 0 is
    what remains: swiglu(zx0) stands before the scan's channels in the result.
    conv1d_weight: (H P + 2 G N, W); conv1d_bias: (H P + 2 G N) or None; any number of channels.
    dt_bias, A: (H); D: (H, P), or (H) with headdim = P. G is ngroups.
    initial_states, seq_idx, dt_limit, state_dtype: as `mamba_chunk_scan_combined` takes them; delta is always
    softplus(dt + dt_bias). The convolution starts from zeros. chunk_size changes nothing.
    activation: None, "silu" or "swish", of the convolution.
    rmsnorm_weight: (H P); y is then normalised in groups of H P / G channels and gated by z, before the gate with
    norm_before_gate, else after it. None: y silu(z), and rmsnorm_eps is not read.
    outproj_weight: (E, M + H P); outproj_bias: (E).

    Returns out (B, L, E), or without outproj_weight (B, L, M + H P), in zxbcdt's dtype; under autocast the projection
    takes autocast's. With return_final_states (out, states (B, H, P, N) in float32).
    Every tensor but seq_idx is differentiable. Nothing but the arguments is kept for the backward pass, which computes
    the rest again. ValueError or RuntimeError for what does not fit.
    """
    outproj = (outproj_weight, outproj_bias)
    weights = (conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight)
    _check(zxbcdt, *weights, outproj, headdim, ngroups)
    if outproj_weight is not None:
        dtype = autocast_dtype(zxbcdt)
        outproj = (None if t is None else t.to(dtype) for t in outproj)
    arguments = (
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        initial_states,
        seq_idx,
        tuple(dt_limit),
        return_final_states,
        activation,
        rmsnorm_weight,
        rmsnorm_eps,
        *outproj,
        headdim,
        ngroups,
        norm_before_gate,
        state_dtype,
    )
    run = _split if vmap.through_dispatcher() else MambaSplitConv1dScanCombinedFn.apply
    out, *states = run(*arguments)
    return (out, *states) if return_final_states else out


def mamba_conv1d_scan_ref(
    xBC,
    conv1d_weight,
    conv1d_bias,
    dt,
    A,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    headdim=None,
    ngroups=1,
):
    """Convolution, then the scan step by step, in plain PyTorch: (B, L, H, P).

    xBC: (B, L, H P + 2 G N); z: (B, L, H P) or (B, L, H, P); headdim: P, needed unless D or z show it.
    """
    heads = len(A)
    if headdim is None:
        shown = [t.shape[-1] for t, rank in ((D, 2), (z, 4)) if t is not None and t.dim() == rank]
        if not shown:
            raise ValueError(
                "mamba_conv1d_scan_ref: headdim is needed where neither D (H, P) nor z (B, L, H, P) shows it"
            )
        headdim = shown[0]
    xBC = causal_conv1d_ref(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation
    ).transpose(1, 2)
    x, B, C = _heads(xBC, heads * headdim, headdim, ngroups)
    z = z if z is None or z.dim() == 4 else z.unflatten(-1, (heads, headdim))
    options = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    return ssd_selective_scan(x, dt.to(x.dtype), A, B, C, D=D, z=z, **options)


def mamba_split_conv1d_scan_ref(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """`mamba_split_conv1d_scan_combined` from `mamba_conv1d_scan_ref`; the norm has its groups too."""
    heads, headdim = D.shape if D.dim() == 2 else (len(D), headdim)
    dim, conv_dim = heads * headdim, conv1d_weight.shape[0]
    extra = zxbcdt.shape[-1] - dim - conv_dim - heads
    zx0, z, xBC, dt = zxbcdt.split([extra, dim, conv_dim, heads], dim=-1)
    y = mamba_conv1d_scan_ref(
        xBC,
        conv1d_weight,
        conv1d_bias,
        dt,
        A,
        chunk_size,
        D=D,
        z=z if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        activation=activation,
        headdim=headdim,
        ngroups=ngroups,
    ).flatten(2)
    if rmsnorm_weight is not None:
        norm = {"group_size": dim // ngroups, "norm_before_gate": norm_before_gate}
        y = rms_norm_ref(y, rmsnorm_weight, None, z=z, eps=rmsnorm_eps, **norm)
    gate, up = zx0.chunk(2, dim=-1)
    y = torch.cat([F.silu(gate) * up, y], dim=-1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
