"""Measures how exact the operations are, as a Markdown table.

python tests/bench/accuracy.py                    # CPU
python tests/bench/accuracy.py --device cuda

The error of a result is its largest deviation from the PyTorch formula in float64, evaluated on the same inputs
rounded to the dtype, over the largest value; the table has the worst of an operation's outputs, or gradients.
"Formula" is the same for the PyTorch formula evaluated in that dtype, which computes in float32 where it upcasts.
"""

import argparse
import os
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
if os.environ.get("MAMBA_NATIVE_LIBRARY"):
    sys.path.insert(0, str(ROOT / "python"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from compare import convert, evaluate, one_thread  # noqa: E402
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_ref  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import (  # noqa: E402
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref  # noqa: E402
from mamba_ssm.ops.triton.layernorm_gated import (  # noqa: E402
    layernorm_fn,
    rms_norm_ref,
    rmsnorm_fn,
)
from mamba_ssm.ops.triton.selective_state_update import (  # noqa: E402
    selective_state_update,
    selective_state_update_ref,
)
from mamba_ssm.ops.triton.ssd_combined import (  # noqa: E402
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
)

BATCH, CHANNELS, STATES, LENGTH = 2, 256, 16, 512


def one(function, **fixed):
    """The function with fixed arguments, its result as a tuple of one."""
    return lambda **tensors: (function(**tensors, **fixed),)


def scan(draw):
    tensors = {
        "u": draw(BATCH, CHANNELS, LENGTH),
        "delta": draw(BATCH, CHANNELS, LENGTH) - 1,
        "A": -torch.rand(CHANNELS, STATES) * 8 - 0.5,
        "B": draw(BATCH, STATES, LENGTH),
        "C": draw(BATCH, STATES, LENGTH),
        "D": torch.randn(CHANNELS),
        "z": draw(BATCH, CHANNELS, LENGTH),
        "delta_bias": torch.randn(CHANNELS),
    }
    fixed = {"delta_softplus": True}
    return tensors, one(selective_scan_fn, **fixed), one(selective_scan_ref, **fixed), True


def complex_scan(draw):
    tensors, *rest = scan(draw)
    tensors |= {name: draw(BATCH, STATES, 2 * LENGTH) for name in ("B", "C")}
    tensors["A"] = torch.complex(tensors["A"], 3 * torch.randn(CHANNELS, STATES))
    return tensors, *rest


def chunked_scan(draw):
    heads, headdim, states = 4, 64, 64
    steps = (BATCH, LENGTH)
    tensors = {
        "x": draw(*steps, heads, headdim),
        "dt": draw(*steps, heads) - 1,
        "A": -torch.rand(heads) * 8 - 0.5,
        "B": draw(*steps, 1, states),
        "C": draw(*steps, 1, states),
        "D": torch.randn(heads),
        "z": draw(*steps, heads, headdim),
        "dt_bias": torch.randn(heads),
    }
    fixed = {"chunk_size": 64, "dt_softplus": True}
    return tensors, one(mamba_chunk_scan_combined, **fixed), one(mamba_chunk_scan, **fixed), True


def convolution(draw):
    tensors = {"x": draw(BATCH, CHANNELS, LENGTH), "weight": draw(CHANNELS, 4)}
    tensors["bias"] = draw(CHANNELS)
    fixed = {"activation": "silu"}
    return tensors, one(causal_conv1d_fn, **fixed), one(causal_conv1d_ref, **fixed), True


def norm(draw):
    tensors = {"x": draw(LENGTH, CHANNELS), "weight": torch.rand(CHANNELS) + 0.5}
    tensors |= {"bias": torch.randn(CHANNELS), "residual": draw(LENGTH, CHANNELS)}
    return tensors, one(layer_norm_fn), one(layer_norm_ref, upcast=True), True


def gated(draw):
    tensors = {"x": draw(LENGTH, CHANNELS), "weight": torch.rand(CHANNELS) + 0.5}
    return tensors | {"bias": torch.randn(CHANNELS), "z": draw(LENGTH, CHANNELS)}


def gated_rms_norm(draw):
    fixed = {"group_size": CHANNELS // 4, "norm_before_gate": False}  # as in Mamba-2
    return gated(draw), one(rmsnorm_fn, **fixed), one(rms_norm_ref, **fixed), True


def gated_layer_norm(draw):
    def formula(x, weight, bias, z):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps=1e-6)
        return (norm * F.silu(z.to(wide))).to(x.dtype)

    return gated(draw), one(layernorm_fn), one(formula), True


def state_update(draw):
    tensors = {
        "state": torch.randn(BATCH, CHANNELS, STATES),
        "x": draw(BATCH, CHANNELS),
        "dt": draw(BATCH, CHANNELS) - 1,
        "A": -torch.rand(CHANNELS, STATES) * 8 - 0.5,
        "B": draw(BATCH, STATES),
        "C": draw(BATCH, STATES),
        "D": torch.randn(CHANNELS),
        "z": draw(BATCH, CHANNELS),
        "dt_bias": torch.randn(CHANNELS),
    }

    def both(function):
        def call(state, **rest):
            state = state.clone()
            return function(state, **rest, dt_softplus=True), state

        return call

    return tensors, both(selective_state_update), both(selective_state_update_ref), False


OPERATIONS = {
    "selective scan": scan,
    "selective scan, complex A": complex_scan,
    "chunked scan": chunked_scan,
    "causal convolution": convolution,
    "LayerNorm": norm,
    "gated RMSNorm": gated_rms_norm,
    "gated LayerNorm": gated_layer_norm,
    "state update": state_update,
}


def error(results, truth):
    return max(
        (
            (results[name].cpu().to(truth[name].dtype) - truth[name]).abs().max()
            / truth[name].abs().max()
        ).item()
        for name in truth
    )


def measure(make, dtype, device):
    """[(direction, error of the operation, error of the formula)]"""
    torch.manual_seed(0)
    tensors, operation, formula, has_gradients = make(lambda *sizes: torch.randn(*sizes).to(dtype))
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    if not has_gradients:
        with torch.no_grad():
            truth = formula(**convert(tensors, torch.float64))
            results = [dict(enumerate(run)) for run in (operation(**there), formula(**tensors))]
        return [("update", *(error(result, dict(enumerate(truth))) for result in results))]
    *ours, cotangents = evaluate(operation, there)
    *truth, _ = evaluate(
        formula, convert(tensors, torch.float64), convert(cotangents, torch.float64)
    )
    *naive, _ = evaluate(formula, tensors, [c.cpu() for c in cotangents])
    names = ("forward", "backward")
    return [
        (n, error(a, t), error(b, t)) for n, a, t, b in zip(names, ours, truth, naive, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    options = parser.parse_args()
    name = "CPU"
    if options.device != "cpu":
        name = torch.cuda.get_device_name(options.device)
    print(f"{name}, torch {torch.__version__}, {date.today()}, seed 0\n")
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    print("| | " + " | ".join(f"{dtype} | formula" for dtype in dtypes) + " |")
    print("|---" * (1 + 2 * len(dtypes)) + "|")
    for operation, make in OPERATIONS.items():
        with one_thread():
            columns = [measure(make, dtype, options.device) for dtype in dtypes.values()]
        for rows in zip(*columns, strict=True):
            cells = [f"{value:.1e}" for _, *errors in rows for value in errors]
            print(f"| {operation}, {rows[0][0]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
