"""The raw extension of upstream's selective scan, for callers that go below `selective_scan_fn`. No autograd.

u, delta, z: (B, D, L), one dtype; A: (D, N) float32 or complex64; B, C: (D, N) in A's dtype, or (B, G, N, L) in u's,
(B, G, N, 2L) for complex A with real and imaginary part of a step beside each other; D, delta_bias: (D) float32.
D, z and delta_bias may be None. Tensors on the CPU work too. Arguments are positional, RuntimeError names
one that does not fit.
"""

import torch
import torch.nn.functional as F
from mamba_ssm.native import selective_scan as native
from mamba_ssm.utils.determinism import use_deterministic_mode

_CHUNK = 2048  # steps between two entries of x


def _gate(y, z):
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)


def _decay(delta, A, delta_bias, delta_softplus):
    """The product of exp(delta A) from step 0 to the end of each chunk: (B, D, chunks, N)."""
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta, threshold=20.0)
    chunks = F.pad(delta, (0, -delta.shape[-1] % _CHUNK)).unflatten(-1, (-1, _CHUNK))
    return torch.exp(chunks.sum(-1).cumsum(-1).unsqueeze(-1) * A.unsqueeze(1))


def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
    A, B, C, _ = native.as_parts(A, B, C)
    return native.selective_scan_forward(
        u, delta, A, B, C, D, None, delta_bias, None, delta_softplus
    )


@torch.no_grad()
def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, /):
    """[out, x], or [out, x, out_z] with z: out before the gate, out_z after it.

    x: (B, D, ceil(L / 2048), 2N) in A's dtype, for the end of each chunk of 2048 steps and each state in
    turn the product of exp(delta A) since step 0, and the state.
    """
    out, last_state, checkpoints = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    decay = _decay(delta, A, delta_bias, delta_softplus)
    step = _CHUNK // native.CHECKPOINT_INTERVAL
    states = torch.cat([checkpoints[:, :, step::step], last_state.unsqueeze(2)], dim=2)
    states = torch.view_as_complex(states) if A.is_complex() else states
    x = torch.stack([decay, states[:, :, : decay.shape[2]]], dim=-1).flatten(-2)
    x.checkpoints = checkpoints  # spares bwd a scan when it gets this very tensor
    return [out, x] if z is None else [out, x, _gate(out, z)]


@torch.no_grad()
def bwd(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    dout,
    x,
    out,
    dz,
    delta_softplus,
    recompute_out_z,
    /,
):
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], then dz with z, then out_z with recompute_out_z.

    dout: (B, D, L), gradient of out, or of out_z with z. x: what fwd returned; may be None up to 2048 steps.
    out: fwd's, needed with z. dz: written in place where given, and returned. dD and ddelta_bias are None where D
    and delta_bias are.
    """
    if x is None and u.shape[-1] > _CHUNK:
        raise RuntimeError(
            f"selective_scan_cuda.bwd: x must be what fwd returned beyond {_CHUNK} steps, got None "
            f"for {u.shape[-1]}"
        )
    if z is not None and out is None:
        raise RuntimeError(
            "selective_scan_cuda.bwd: with z, out must be what fwd returned, got None"
        )
    if recompute_out_z and z is None:
        raise RuntimeError("selective_scan_cuda.bwd: recompute_out_z must come with z, got None")
    checkpoints = getattr(x, "checkpoints", None)
    if checkpoints is None:
        _, _, checkpoints = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    parts = native.as_parts(A, B, C)[:3]
    tensors = (dout, None, u, delta, *parts, D, z, delta_bias, None, checkpoints)
    du, ddelta, dA, dB, dC, dD, dz_, ddelta_bias, _ = native.selective_scan_backward(
        *tensors, delta_softplus, deterministic=use_deterministic_mode()
    )
    grads = [du, ddelta, *native.from_parts(A, dA, dB, dC)]
    grads += [None if D is None else dD, None if delta_bias is None else ddelta_bias]
    if z is not None:
        grads.append(dz_ if dz is None else dz.copy_(dz_))
    if recompute_out_z:
        grads.append(_gate(out, z))
    return grads
