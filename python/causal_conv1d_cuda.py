"""The raw extension of upstream's convolution, for callers that go below `causal_conv1d_fn`. No autograd.

Arguments are positional; their number tells upstream's versions apart, and any of them is served:

    causal_conv1d_fwd     4  x, weight, bias, silu
                          5  x, weight, bias, seq_idx, silu
                          7  x, weight, bias, seq_idx, initial_states, final_states_out, silu
                          8  x, weight, bias, seq_idx, initial_states, out, final_states_out, silu
    causal_conv1d_bwd     6  x, weight, bias, dout, dx, silu
                          7  x, weight, bias, dout, seq_idx, dx, silu
                         10  x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                             return_dinitial_states, silu
                         12  x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
                             dinitial_states, silu
    causal_conv1d_update  5  x, conv_state, weight, bias, silu
                          6  x, conv_state, weight, bias, silu, cache_seqlens
                          7  x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices
                          8  x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices

Shapes, dtypes and meaning are those of `causal_conv1d.causal_conv1d_interface`; silu and return_dinitial_states are
bool. bias, seq_idx, states, cache_seqlens, conv_state_indices and dx may be None. What the caller gives to be filled
(out, final_states_out, dx, dweight, dbias, dinitial_states) has any strides and is written whole, whatever it held.
Tensors on the CPU work too. TypeError for a number of arguments that no version had and for what is no tensor,
RuntimeError naming an argument that does not fit; nothing is changed then.
"""

import torch
from mamba_ssm.native import causal_conv1d as native
from mamba_ssm.native.arguments import check_filled, check_tensor, to_int32
from mamba_ssm.ops import causal_conv1d as functions

_FWD = {
    4: "x weight bias silu",
    5: "x weight bias seq_idx silu",
    7: "x weight bias seq_idx initial_states final_states_out silu",
    8: "x weight bias seq_idx initial_states out final_states_out silu",
}
_BWD = {
    6: "x weight bias dout dx silu",
    7: "x weight bias dout seq_idx dx silu",
    10: "x weight bias dout seq_idx initial_states dfinal_states dx return_dinitial_states silu",
    12: "x weight bias dout seq_idx initial_states dfinal_states dx dweight dbias dinitial_states silu",
}
_UPDATE = {
    5: "x conv_state weight bias silu",
    6: "x conv_state weight bias silu cache_seqlens",
    7: "x conv_state weight bias silu cache_seqlens conv_state_indices",
    8: "x conv_state weight bias out silu cache_seqlens conv_state_indices",
}


def _named(op, forms, args):
    """{name: argument} for the version that has as many arguments."""
    if len(args) not in forms:
        *few, most = forms
        accepted = "; ".join(form.replace(" ", ", ") for form in forms.values())
        raise TypeError(
            f"{op} takes {', '.join(map(str, few))} or {most} positional arguments, got {len(args)}. "
            f"Accepted are: {accepted}"
        )
    named = dict(zip(forms[len(args)].split(), args, strict=True))
    for name in ("silu", "return_dinitial_states"):
        if not isinstance(named.get(name, False), bool):
            raise TypeError(f"{op}: {name} must be a bool, got {type(named[name]).__name__}")
    return named


def _states_shape(x, weight):
    return (*x.shape[:2], weight.shape[1] - 1)


def _check_input(op, x, weight):
    check_tensor(op, "x", x, "batch, dim, length")
    check_tensor(op, "weight", weight, "dim, width")


@torch.no_grad()
def causal_conv1d_fwd(*args):
    """out (B, D, L), in x's layout; None where out is an argument."""
    op = "causal_conv1d_fwd"
    named = _named(op, _FWD, args)
    x, weight = named["x"], named["weight"]
    _check_input(op, x, weight)
    if "out" in named:
        check_filled(op, "out", named["out"], x.shape, x)
    final_states_out = named.get("final_states_out")
    if final_states_out is not None:
        check_filled(op, "final_states_out", final_states_out, _states_shape(x, weight), x)
    out, final_states = native.causal_conv1d_forward(
        x,
        weight,
        named["bias"],
        to_int32(op, "seq_idx", named.get("seq_idx")),
        named.get("initial_states"),
        final_states_out is not None,
        named["silu"],
    )
    if final_states_out is not None:
        final_states_out.copy_(final_states)
    if "out" not in named:
        return out
    named["out"].copy_(out)
    return None


def _check_filled_gradients(op, x, weight, bias, dx, dweight, dbias):
    """dweight and dbias are sums: float32, or float64 for float64."""
    sums = torch.promote_types(x.dtype, torch.float32)
    check_filled(op, "dx", dx, x.shape, x)
    check_filled(op, "dweight", dweight, weight.shape, x, sums)
    if (dbias is None) != (bias is None):
        raise RuntimeError(f"{op}: dbias must be given exactly when bias is")
    if dbias is not None:
        check_filled(op, "dbias", dbias, weight.shape[:1], x, sums)


def _widen(weight, bias):
    """Half weights as float32, so that their gradients are not rounded; what does not fit stays as it is."""
    halves = (torch.float16, torch.bfloat16)
    if weight.dtype not in halves or (bias is not None and bias.dtype != weight.dtype):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


@torch.no_grad()
def causal_conv1d_bwd(*args):
    """[dx, dweight, dbias], with 10 arguments [dx, dweight, dbias, dinitial_states], with 12 None.

    dx given is written and returned. dweight and dbias have weight's dtype where they are results, and are float32
    where they are arguments (float64 for float64). dbias is None without bias, dinitial_states where it is not asked
    for; without initial_states it is the gradient at zeros.
    """
    op = "causal_conv1d_bwd"
    named = _named(op, _BWD, args)
    x, weight, bias, given = named["x"], named["weight"], named["bias"], named["dx"]
    _check_input(op, x, weight)
    if "dweight" in named:
        _check_filled_gradients(op, x, weight, bias, given, named["dweight"], named["dbias"])
        weight, bias = _widen(weight, bias)
    elif given is not None:
        check_filled(op, "dx", given, x.shape, x)
    initial_states, filled = named.get("initial_states"), named.get("dinitial_states")
    if filled is not None:
        check_filled(op, "dinitial_states", filled, _states_shape(x, weight), x)
    if initial_states is None and (filled is not None or named.get("return_dinitial_states")):
        initial_states = x.new_zeros(_states_shape(x, weight))
    dx, dweight, dbias, dinitial_states = native.causal_conv1d_backward(
        named["dout"],
        named.get("dfinal_states"),
        x,
        weight,
        bias,
        to_int32(op, "seq_idx", named.get("seq_idx")),
        initial_states,
        named["silu"],
    )
    dx = dx if given is None else given.copy_(dx)
    if "dweight" not in named:
        grads = [dx, dweight, None if bias is None else dbias]
        if "return_dinitial_states" in named:
            grads.append(dinitial_states if named["return_dinitial_states"] else None)
        return grads
    named["dweight"].copy_(dweight)
    if bias is not None:
        named["dbias"].copy_(dbias)
    if filled is not None:
        filled.copy_(dinitial_states)
    return None


@torch.no_grad()
def causal_conv1d_update(*args):
    """out, shaped as x, and conv_state is changed; None where out is an argument."""
    op = "causal_conv1d_update"
    named = _named(op, _UPDATE, args)
    activation = "silu" if named.pop("silu") else None
    if "out" not in named:
        return functions.causal_conv1d_update(**named, activation=activation)
    out, x = named.pop("out"), named["x"]
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    check_filled(op, "out", out, x.shape, x)
    out.copy_(functions.causal_conv1d_update(**named, activation=activation))
    return None
