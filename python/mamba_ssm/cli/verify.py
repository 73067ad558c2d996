"""Check that the layers compute what their formulas say, on every device of this machine.

Runs each layer forward, backward and token by token, and compares with the oracle in float64 on the
CPU: the layer in plain PyTorch ("formula"), or the layer itself on the reference loops of the native
library ("loops"). A line tells time (of a step: one token) and the largest deviation over the largest
value, for backward the worst of all gradients, with what is allowed.

exit status: 0 everything agrees, 1 something does not or cannot run, 2 the arguments do not fit
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True)
class Check:
    """A layer with its arguments, the shape of its input, how its truth is computed, and what it can do."""

    module: str
    layer: str
    arguments: dict
    shape: tuple
    oracle: str = "formula"
    parts: tuple = ("forward", "backward", "step")

    @property
    def name(self):
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.layer}({arguments})"

    def find(self):
        """The layer's class, None where this version has none."""
        try:
            module = importlib.import_module(f"mamba_ssm.modules.{self.module}")
        except ModuleNotFoundError as error:
            if error.name != f"mamba_ssm.modules.{self.module}":
                raise
            return None
        return getattr(module, self.layer, None)


WHOLE = ("forward", "backward")  # layers that see the sequence as a whole have no step
CHECKS = (
    Check(
        "mamba_simple",
        "Mamba",
        {"d_model": 64, "d_state": 16, "d_conv": 4, "expand": 2},
        (2, 128, 64),
    ),
    Check("mamba_simple", "Mamba", {"d_model": 512}, (1, 100, 512)),
    Check("bimamba", "BiMamba", {"d_model": 64}, (2, 128, 64), parts=WHOLE),
    Check("mamba2", "Mamba2", {"d_model": 512}, (1, 1024, 512), "loops"),
    Check("bimamba", "BiMamba2", {"d_model": 64}, (1, 15360, 64), "loops", WHOLE),
)


def add_arguments(parser):
    parser.add_argument(
        "--device", action="append", help="may be repeated (default: cpu and every CUDA device)"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the results to FILE too; without FILE print them instead of the lines",
    )


def choose_devices(names):
    import torch

    from mamba_ssm.cli import device

    for name in names or ():
        device.use(name)
    return names or ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


HEADER = f"{'device':7} {'layer':49} {'input':10} {'part':8} {'ms':>9} {'error':>8} {'allowed':>8}  oracle"


def format_row(row, mark=True):
    """A line of the table; mark: whether its output can show a check mark."""
    good, bad = ("\u2713 ", "\u2717 ") if mark else ("ok", "no")
    verdict = good if row["passed"] else bad
    shape = "x".join(map(str, row["shape"]))
    where = f"{verdict} {row['device']:7} {row['layer']:49} {shape:10} {row['part']:8}"
    if "message" in row:
        return f"{where} {row['message']}"
    numbers = f"{row['seconds'] * 1e3:9.3f} {row['error']:8.1e} {row['allowed']:8.0e}"
    return f"{where} {numbers}  {row['oracle']}"


def can_mark(stream):
    """Whether its encoding has the two marks; consoles of Windows often do not."""
    try:
        "\u2713\u2717".encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def run(options):
    started = time.perf_counter()
    import torch

    from mamba_ssm.cli import machine, verify_layers
    from mamba_ssm.native import loader

    devices = choose_devices(options.device)
    loader.load()
    lines = options.json != "-"
    mark = can_mark(sys.stdout)
    machines = [machine.describe(device) for device in devices]
    rows = []
    if lines:
        for description in machines:
            print(f"{description['device']}: {machine.in_a_line(description)}")
        print(f"   {HEADER}", flush=True)
    for check in CHECKS:
        layer = check.find()
        if layer is None:
            continue
        for row in verify_layers.rows(check, layer, devices):
            rows.append(row)
            if lines:
                print(format_row(row, mark), flush=True)
    failed = sum(not row["passed"] for row in rows)
    seconds = time.perf_counter() - started
    document = {
        "date": str(date.today()),
        "machines": machines,
        "torch": torch.__version__,
        "rows": rows,
        "failed": failed,
        "seconds": seconds,
    }
    text = json.dumps(document, indent=1)
    if options.json not in (None, "-"):
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text)
    if lines:
        verdict = (
            f"{failed} of {len(rows)} checks failed" if failed else f"{len(rows)} checks passed"
        )
        print(f"{verdict}, {seconds:.1f} s")
    else:
        print(text)
    return 1 if failed else 0
