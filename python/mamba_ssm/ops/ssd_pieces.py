"""The chunked scan below its function: forward and backward as two calls, with tensors between that clients look at."""

from mamba_ssm.ops.chunks import store, wide
from mamba_ssm.ops.recompute import gradients_of
from mamba_ssm.ops.triton.ssd_chunk_scan import _from_steps, _skip
from mamba_ssm.ops.triton.ssd_chunk_state import (
    _chunk_cumsum_fwd,
    _chunk_state_fwd,
    chunk_state_varlen,
)
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, ssd_selective_scan
from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd


def _mamba_chunk_scan_combined_fwd(
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
    state_dtype=None,
):
    """(out, out_x, dt, dA_cumsum, states, final_states), with cu_seqlens also varlen_states. No gradient.

    out_x: before the gate z, None without one; dt, dA_cumsum: (B, H, chunks, chunk_size) float32; states: those that
    enter the chunks (B, chunks, H, P, N) in state_dtype (C's when None). Outputs and final states are the kernels',
    the rest is computed beside them in PyTorch.
    """
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    arguments = {"dt_bias": dt_bias, "initial_states": initial_states, "seq_idx": seq_idx}
    out, final_states = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, **arguments, **options, return_final_states=True
    )
    out_x = None
    if z is not None:
        out_x = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, **arguments, **options)
    dA_cumsum, delta = _chunk_cumsum_fwd(dt, A, chunk_size, dt_bias, **options)
    added = _chunk_state_fwd(B, x, delta, dA_cumsum, seq_idx)
    states, _ = _state_passing_fwd(
        added.flatten(-2),
        dA_cumsum[..., -1],
        None if initial_states is None else initial_states.flatten(-2),
        seq_idx,
        chunk_size,
        C.dtype if state_dtype is None else state_dtype,
    )
    states = states.unflatten(-1, added.shape[-2:])
    results = (out, out_x, delta, dA_cumsum, states, final_states)
    if cu_seqlens is None:
        return results
    one = (B[0], x[0], delta[0], dA_cumsum[0])
    return *results, chunk_state_varlen(*one, cu_seqlens, states[0])


def _mamba_chunk_scan_combined_bwd(
    dout,
    x,
    dt,
    A,
    B,
    C,
    out,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    dfinal_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    dx=None,
    ddt=None,
    dB=None,
    dC=None,
    dz=None,
    recompute_output=False,
    state_dtype=None,
):
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states), with recompute_output and z also the gated output.

    dx, ddt, dB, dC, dz are filled where given; a gradient is None where its argument is. `out` is not read, the
    kernels compute it again.
    """
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    tensors = dict(zip(names, (x, dt, A, B, C, D, z, dt_bias, initial_states), strict=True))
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "seq_idx": seq_idx}
    outz = None

    def function(**tensors):
        nonlocal outz
        result = mamba_chunk_scan_combined(
            **tensors, chunk_size=chunk_size, **options, return_final_states=True
        )
        outz = result[0].detach()
        return result

    grads = list(gradients_of(function, tensors, names, (dout, dfinal_states)))
    for buffer, name in ((dx, "x"), (ddt, "dt"), (dB, "B"), (dC, "C"), (dz, "z")):
        index = names.index(name)
        grads[index] = store(grads[index], buffer)
    return (*grads, outz) if recompute_output and z is not None else tuple(grads)


def _chunk_scan_chunk_state_bwd_dx(
    x, dt, dA_cumsum, B, CB, dout, dstates, D=None, seq_idx=None, dx=None
):
    """(dx, ddt, dD): gradients of x, delta and D by the steps of the same chunk and by the state that it leaves.

    dstates: gradient of what each chunk adds to the state (B, chunks, H, P, N); dx is filled if given; dD is None
    without D.
    """

    def function(x, dt, D):
        out = _from_steps(CB, x, dt, dA_cumsum)
        out = out if D is None else out + wide(x) * _skip(D)
        return out, _chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx)

    tensors = {"x": x, "dt": dt, "D": D}
    douts = (wide(dout), dstates.to(wide(x).dtype))
    grad, *rest = gradients_of(function, tensors, ("x", "dt", "D"), douts)
    return store(grad, dx), *rest


def selective_scan_bwd(dout, x, dt, A, B, C, D=None, z=None):
    """(dx, ddt, dA, dB, dC, dD, dz) of `ssd_selective_scan`, None for an argument that is None."""
    names = ("x", "dt", "A", "B", "C", "D", "z")
    tensors = dict(zip(names, (x, dt, A, B, C, D, z), strict=True))
    return gradients_of(ssd_selective_scan, tensors, names, (dout,))


def ensure_stride(inp):
    """inp (B, L, C), copied if the stride between steps is no multiple of 8. The convolution here takes any."""
    return inp if inp.stride(1) % 8 == 0 else inp.contiguous()
