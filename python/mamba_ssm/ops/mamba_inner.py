"""The Mamba-1 layer between its input projection and its output, as one differentiable function.

x, z = halves of xz;  u = silu(conv(x));  (dt, B, C) = x_proj u;  delta = delta_proj dt;
y = selective_scan(u, delta, A, B, C, D, z);  out = out_proj y.
"""

import functools

import torch
import torch.nn.functional as F

from mamba_ssm.native import selective_scan as native
from mamba_ssm.native import vmap
from mamba_ssm.native.arguments import check_shapes
from mamba_ssm.ops.autocast import autocast_dtype, no_autocast
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm.ops.recompute import gradients, graph
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from mamba_ssm.utils.determinism import use_deterministic_mode


def rms_norm_forward(x, weight, bias, eps=1e-6, is_rms_norm=True):
    """RMSNorm (LayerNorm without is_rms_norm) of x (..., N) with weight and bias (N); bias may be None."""
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


class _Project(torch.autograd.Function):
    """weight (m, k) times x (B, k, L): (B, m, L), or with rows (B, L, m) plus bias (m). x is not copied."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, x, bias, rows):
        weights = weight.expand(x.shape[0], -1, -1)
        if not rows:
            return torch.bmm(weights, x)
        if bias is None:
            return torch.bmm(x.mT, weights.mT)
        return torch.baddbmm(bias, x.mT, weights.mT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, x, _, ctx.rows = inputs
        ctx.save_for_backward(weight, x)

    @staticmethod
    def backward(ctx, dy):
        weight, x = ctx.saved_tensors
        return *_project_backward(dy, weight, x, ctx.rows, ctx.needs_input_grad[:3]), None


def _project_backward(dy, weight, x, rows, needed):
    """Gradients of weight, x and bias, None for those not needed."""

    def by_feature(tensor):
        return tensor.transpose(0, 1).flatten(1)  # (B, features, L) -> (features, B L)

    dy = dy.mT if rows else dy
    return (
        by_feature(dy) @ by_feature(x).t() if needed[0] else None,
        torch.bmm(weight.t().expand(x.shape[0], -1, -1), dy) if needed[1] else None,
        dy.sum((0, 2)) if needed[2] else None,
    )


def _rms_norm(x, weight, eps):
    """RMSNorm over the features of (..., features, L)."""
    return rms_norm_fn(x.transpose(-1, -2), weight, None, eps=eps).transpose(-1, -2).contiguous()


def _unit_stride(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _convolve(x, weight, bias):
    return causal_conv1d_fn(x, weight.squeeze(1), bias, activation="silu")


def _interleave(rows):
    """(B, 2 N, L), real and imaginary part of each state -> (B, N, 2 L), the same of each step."""
    return rows.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2)


def _scan_inputs(A, eps, u, x_proj, delta_proj, B, C, B_bias, C_bias, b_rms, c_rms, dt_rms):
    """delta, B and C of the scan."""
    rank = delta_proj.shape[1]
    width = A.shape[1] * (2 if A.is_complex() else 1)
    b_width, c_width = (0 if given is not None else width for given in (B, C))
    unused = x_proj.shape[0] - rank - b_width - c_width
    dt, b, _, c = _Project.apply(x_proj, u, None, False).split(
        [rank, b_width, unused, c_width], dim=1
    )

    def projection(given, rows, bias, weight):
        if given is None:
            rows = rows if bias is None else rows + bias[:, None]
            given = (_interleave(rows) if A.is_complex() else rows).unsqueeze(1)
        return given if weight is None else _rms_norm(given, weight, eps)

    delta = _Project.apply(delta_proj, dt, None, False)
    delta = delta if dt_rms is None else _rms_norm(delta, dt_rms, eps)
    return delta, projection(B, b, B_bias, b_rms), projection(C, c, C_bias, c_rms)


def _scan(u, delta, A, B, C, D, z, delta_bias, softplus, reverse):
    """The gated scan, and the states that its backward pass starts from."""
    A, B, C, _ = native.as_parts(A, B, C)
    out, _, checkpoints = native.selective_scan_forward(
        u, delta, A, B, C, D, z, delta_bias, None, softplus, None, 0, reverse
    )
    return out, checkpoints


def _scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, checkpoints, softplus, reverse):
    """Gradients of u, delta, B, C, D, z, delta_bias and A."""
    parts = native.as_parts(A, B, C)[:3]
    tensors = (dout, None, u, delta, *parts, D, z, delta_bias, None, checkpoints)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, _ = native.selective_scan_backward(
        *tensors, softplus, None, 0, reverse, use_deterministic_mode()
    )
    dA, dB, dC = native.from_parts(A, dA, dB, dC)
    return du, ddelta, dB, dC, dD, dz, ddelta_bias, dA


class MambaInnerFn(torch.autograd.Function):
    """Keeps neither u, delta, B nor C for the backward pass, which computes them again.

    Takes prepared arguments in upstream's order. A second scan with A_b runs backwards in time, and y is the sum
    of both. Without out_proj_weight the result is y. checkpoint_lvl 0 is a plain graph: see `mamba_inner_fn`.
    """

    @staticmethod
    def forward(
        ctx,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B=None,
        C=None,
        D=None,
        delta_bias=None,
        B_proj_bias=None,
        C_proj_bias=None,
        delta_softplus=True,
        checkpoint_lvl=1,
        b_rms_weight=None,
        c_rms_weight=None,
        dt_rms_weight=None,
        b_c_dt_rms_eps=1e-6,
        A_b=None,
    ):
        ctx.softplus, ctx.eps = delta_softplus, b_c_dt_rms_eps
        x, z = xz.chunk(2, dim=1)
        convolution = (x, conv1d_weight, conv1d_bias)
        projections = (x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
        projections += (b_rms_weight, c_rms_weight, dt_rms_weight)
        u = _convolve(*convolution)
        delta, b, c = _scan_inputs(A, ctx.eps, u, *projections)
        y, checkpoints = _scan(u, delta, A, b, c, D, z, delta_bias, delta_softplus, False)
        checkpoints_b = None
        if A_b is not None:
            y_b, checkpoints_b = _scan(u, delta, A_b, b, c, D, z, delta_bias, delta_softplus, True)
            y += y_b
        scan = (A, A_b, D, z, delta_bias, checkpoints, checkpoints_b)
        kept = None if out_proj_weight is None else y
        ctx.save_for_backward(*convolution, *projections, *scan, out_proj_weight, kept)
        return y if kept is None else _Project.apply(out_proj_weight, y, out_proj_bias, True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        convolution, projections = saved[:3], saved[3:12]
        A, A_b, D, z, delta_bias, checkpoints, checkpoints_b, out_proj_weight, y = saved[12:]
        need = ctx.needs_input_grad
        dout_proj_weight = dout_proj_bias = dA_b = None
        # Tensors of u's size go as soon as they can: six beside xz and y, at the scan, are the most.
        with no_autocast(z):
            if out_proj_weight is not None:
                dout_proj_weight, dy, dout_proj_bias = _project_backward(
                    dy, out_proj_weight, y, True, (need[5], True, need[6])
                )
            u, convolution = graph(_convolve, convolution, need[:3])
            inputs, projections = graph(
                functools.partial(_scan_inputs, A, ctx.eps),
                (u, *projections),
                (True, *need[3:5], *need[8:10], *need[12:14], *need[16:19]),
            )
            delta, B, C = inputs
            rest = (B, C, D, z, delta_bias)
            *grads, dA = _scan_backward(dy, u, delta, A, *rest, checkpoints, ctx.softplus, False)
            if A_b is not None:
                *others, dA_b = _scan_backward(
                    dy, u, delta, A_b, *rest, checkpoints_b, ctx.softplus, True
                )
                for index in range(len(grads)):
                    grads[index] += others.pop(0)
            du, ddelta, dB, dC, dD, dz, ddelta_bias = grads
            del dy, delta, B, C, rest, grads
            du_projected, *dprojections = gradients(inputs, (ddelta, dB, dC), projections)
            du += du_projected
            del inputs, ddelta, du_projected
            dx, dconv1d_weight, dconv1d_bias = gradients((u,), (du,), convolution)
            del u, du
        dx_proj, ddelta_proj, dB, dC, dB_bias, dC_bias, db_rms, dc_rms, ddt_rms = dprojections
        return (
            torch.cat([dx, dz], dim=1) if need[0] else None,
            dconv1d_weight,
            dconv1d_bias,
            dx_proj,
            ddelta_proj,
            dout_proj_weight,
            dout_proj_bias,
            dA,
            dB,
            dC,
            None if D is None else dD,
            None if delta_bias is None else ddelta_bias,
            dB_bias,
            dC_bias,
            None,
            None,
            db_rms,
            dc_rms,
            ddt_rms,
            None,
            dA_b,
        )


def _plain_graph(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B,
    C,
    D,
    delta_bias,
    B_proj_bias,
    C_proj_bias,
    delta_softplus,
    checkpoint_lvl,
    b_rms_weight,
    c_rms_weight,
    dt_rms_weight,
    b_c_dt_rms_eps,
    A_b,
):
    """`MambaInnerFn` as its parts, of which autograd keeps what each needs."""
    x, z = xz.chunk(2, dim=1)
    u = _convolve(x, conv1d_weight, conv1d_bias)
    projections = (x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    projections += (b_rms_weight, c_rms_weight, dt_rms_weight)
    delta, B, C = _scan_inputs(A, b_c_dt_rms_eps, u, *projections)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if A_b is not None:
        tensors = (u, delta, A_b, B, C, D, z, delta_bias)
        y = y + selective_scan_fn(*tensors, delta_softplus, reverse=True)
    if out_proj_weight is None:
        return y
    return _Project.apply(out_proj_weight, y, out_proj_bias, True)


def _inner(
    function,
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B,
    C,
    D,
    delta_bias,
    B_proj_bias,
    C_proj_bias,
    delta_softplus,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
    A_b=None,
):
    """Checks and prepares the arguments, and chooses between `MambaInnerFn` and a plain graph."""
    assert checkpoint_lvl in (0, 1), f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}"
    check_shapes(function, [("A", A, "DN"), ("delta_proj_weight", delta_proj_weight, "Dr")])
    dim, d_state = A.shape
    width = d_state * (2 if A.is_complex() else 1)
    rows = delta_proj_weight.shape[1] + width * sum(given is None for given in (B, C))
    expected = [
        ("xz", xz, ("B", 2 * dim, "L")),
        ("conv1d_weight", conv1d_weight, (dim, 1, "W")),
        ("conv1d_bias", conv1d_bias, (dim,)),
        ("x_proj_weight", x_proj_weight, (max(rows, x_proj_weight.shape[0]), dim)),
        ("delta_proj_weight", delta_proj_weight, (dim, "r")),
        ("out_proj_weight", out_proj_weight, ("E", dim)),
        ("A_b", A_b, (dim, d_state)),
        ("B_proj_bias", B_proj_bias, (width,)),
        ("C_proj_bias", C_proj_bias, (width,)),
        ("b_rms_weight", b_rms_weight, (d_state,)),
        ("c_rms_weight", c_rms_weight, (d_state,)),
        ("dt_rms_weight", dt_rms_weight, (dim,)),
    ]
    for name, given, weight in (("B", B, b_rms_weight), ("C", C, c_rms_weight)):
        if given is None:
            continue
        varying = ("B", d_state, "L") if given.dim() == 3 else ("B", "G", d_state, "L")
        expected.append((name, given, (dim, d_state) if given.dim() == 2 else varying))
        if weight is not None and given.dim() == 2:
            raise RuntimeError(
                f"{function}: {name.lower()}_rms_weight needs a {name} that varies with time, "
                f"got a static one of shape {tuple(given.shape)}"
            )
    check_shapes(function, expected)
    if out_proj_bias is not None:
        check_shapes(function, [("out_proj_bias", out_proj_bias, (out_proj_weight.shape[0],))])

    dtype = autocast_dtype(xz)
    real_dtype, a_dtype = native.state_dtypes(dtype, A)

    def to(dtype, *tensors):
        return (None if tensor is None else tensor.to(dtype) for tensor in tensors)

    def projection(given):
        if given is None or given.dim() == 2:
            return None if given is None else given.to(a_dtype)
        return _unit_stride((given.unsqueeze(1) if given.dim() == 3 else given).to(dtype))

    arguments = (
        _unit_stride(xz.to(dtype)),
        conv1d_weight,
        conv1d_bias,
        *to(dtype, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias),
        A.to(a_dtype),
        projection(B),
        projection(C),
        *to(real_dtype, D, delta_bias),
        *to(dtype, B_proj_bias, C_proj_bias),
        bool(delta_softplus),
        checkpoint_lvl,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        b_c_dt_rms_eps,
        None if A_b is None else A_b.to(a_dtype),
    )
    if checkpoint_lvl == 0 or vmap.through_dispatcher():
        return _plain_graph(*arguments)
    return MambaInnerFn.apply(*arguments)


def mamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """Convolution, projections, selective scan with gate, and output projection: (B, 2D, L) -> (B, L, E).

    xz: (B, 2D, L), x's channels before z's. conv1d_weight: (D, 1, W); conv1d_bias: (D) or None.
    x_proj_weight: (r + 2N', D), rows of delta, B, C; N' is N, or 2N for complex A, where real and imaginary part
    of a state are neighbours. delta_proj_weight: (D, r). out_proj_weight: (E, D); out_proj_bias: (E) or None.
    A: (D, N). B, C: None to project them, else as `selective_scan_fn` takes them, without rows in x_proj_weight.
    D, delta_bias: (D). B_proj_bias, C_proj_bias: (N'), added to projected B and C.
    b_rms_weight, c_rms_weight: (N), RMSNorm of B and C over the states; dt_rms_weight: (D), of delta over the
    channels after its projection; b_c_dt_rms_eps is added to the mean squares.
    checkpoint_lvl: 1 computes u, delta, B and C again in the backward pass, 0 keeps them; the results are equal.

    xz is float32, float16 or bfloat16 (float64 on the CPU), or cast by autocast; the projections take its dtype,
    A, D and delta_bias float32. Every tensor is differentiable. Shapes that do not fit give a RuntimeError.
    """
    return _inner(
        "mamba_inner_fn",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        checkpoint_lvl,
        b_rms_weight,
        c_rms_weight,
        dt_rms_weight,
        b_c_dt_rms_eps,
    )


falcon_mamba_inner_fn = (
    mamba_inner_fn  # the name under which transformers looks for the RMS weights
)


def mamba_inner_fn_no_out_proj(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`mamba_inner_fn` before its output projection: (B, 2D, L) -> (B, D, L)."""
    return _inner(
        "mamba_inner_fn_no_out_proj",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        None,
        None,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )


def bimamba_inner_fn(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    A_b,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`mamba_inner_fn` whose scan is the sum of one with A and one with A_b (D, N) backwards in time."""
    return _inner(
        "bimamba_inner_fn",
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        A_b=A_b,
    )


def bimamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    A_b,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`bimamba_inner_fn` in plain PyTorch; without A_b (None) `mamba_inner_ref`."""
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_ref(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    x_dbl = F.linear(u.transpose(1, 2), x_proj_weight)
    rank = delta_proj_weight.shape[1]
    width = A.shape[1] * (2 if A.is_complex() else 1)
    delta = F.linear(x_dbl[..., :rank], delta_proj_weight).transpose(1, 2)

    def projection(given, columns, bias):
        if given is not None:
            return given
        rows = (columns if bias is None else columns + bias).transpose(1, 2)
        return _interleave(rows) if A.is_complex() else rows

    B = projection(B, x_dbl[..., rank : rank + width], B_proj_bias)
    C = projection(C, x_dbl[..., -width:], C_proj_bias)
    y = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if A_b is not None:
        tensors = (u, delta, A_b, B, C, D, z, delta_bias)
        y = y + selective_scan_ref(*tensors, delta_softplus, reverse=True)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """`mamba_inner_fn` in plain PyTorch, without RMS weights."""
    return bimamba_inner_ref(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        None,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
