"""Time the kernels beside what the machine allows.

For each case: time, floor (what the machine needs for the operation's memory traffic, exponentials
or instructions, whichever takes longest: the term that binds), share of the floor reached, GB/s,
speed-up over the PyTorch formula (* on a cut shape: one sequence, at most 1536 channels and 2048
steps), and on CUDA the time of upstream's kernels on an H200 with the ratio to ours.

CPU: one core unless --threads; every instruction set of this machine and a plain scalar loop are
timed, and the ratios between them printed.
CUDA: medians of 20 replays of a CUDA graph over inputs that no cache holds.

--lengths: instead of the table, the time of Mamba(d_model=512) forward on one sequence against its
length, beside the PyTorch formula and, where they are installed, transformers without kernels and
mambapy, all with the same weights and checked to give the same output. Leaves in --out: lengths.md,
lengths.json, and with matplotlib lengths.png and lengths.svg.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from mamba_ssm.cli import bench_cases, bench_lengths
from mamba_ssm.cli.bench_cases import UPSTREAM, UPSTREAM_MACHINE
from mamba_ssm.cli.errors import UsageError

OPERATIONS = (
    "selective_scan",
    "causal_conv1d",
    "causal_conv1d_update",
    "state_update",
    "ssd",
    "split_conv",
    "layer_norm",
    "gated_norm",
)
ISAS = ("plain", "sse2", "avx2", "avx512")  # as MAMBA_CPU_ISA takes them
RATIO_SCAN = "selective_scan/float32/B1D1536L512N16"
REFERENCE_SCAN = "selective_scan/float32/B1D1536L2048N16/fwd"


def add_arguments(parser):
    parser.add_argument(
        "op", nargs="*", metavar="op", help=f"of {', '.join(OPERATIONS)} (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=sorted(bench_cases.BYTES),
        help="may be repeated (default: float32, on CUDA bfloat16 too)",
    )
    parser.add_argument("--isa", choices=ISAS, help="CPU: only this one (default: all of them)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    bench_lengths.add_arguments(parser)


def choose_cases(options):
    cuda = options.device.startswith("cuda")
    dtypes = options.dtype or (["float32", "bfloat16"] if cuda else ["float32"])
    cases = bench_cases.gpu_cases(dtypes) if cuda else bench_cases.cpu_cases(dtypes)
    wanted = options.op or OPERATIONS
    cases = [case for case in cases if case.op in wanted]
    if options.isa == "plain":  # the plain loop exists for what the ratios need
        cases = [case for case in cases if case.name == f"{RATIO_SCAN}/fwd"]
    return cases


def measure(case, machine, isa, options, reference_times):
    """One row of the table."""
    from mamba_ssm.cli import bench_timing

    moved = bench_cases.work(case)[0]
    seconds = bench_timing.time_native(case, options.device, moved)
    small = case.for_reference()
    if small.name not in reference_times:
        reference_times[small.name] = bench_timing.time_reference(small, options.device)
    same_shape = seconds
    if small != case:
        same_shape = bench_timing.time_native(small, options.device, bench_cases.work(small)[0])
    row = {
        "case": case.name,
        "isa": isa,
        "us": seconds * 1e6,
        "gb_per_s": moved / seconds / 1e9,
        "reference_us": reference_times[small.name] * 1e6,
        "reference_case": small.name,
        "speed_up": reference_times[small.name] / same_shape,
    }
    limit = bench_cases.floor(case, machine)
    if limit is not None:
        row.update(floor_us=limit[0] * 1e6, bound=limit[1], share=limit[0] / seconds)
    upstream = UPSTREAM.get(case.name) if options.device.startswith("cuda") else None
    if upstream is not None:
        row.update(upstream_us=upstream, upstream_ratio=upstream / row["us"])
    return row


HEADER = (
    f"{'case':52} {'isa':>7} {'us':>10} {'floor us':>9} {'bound':>10} {'share':>6} {'GB/s':>7} "
    f"{'vs torch':>9} {'upstream us':>11} {'ratio':>6}"
)


def format_row(row):
    def field(name, width, pattern):
        value = row.get(name)
        return f"{'-' if value is None else format(value, pattern):>{width}}"

    cut = "*" if row["reference_case"] != row["case"] else " "
    return " ".join(
        (
            f"{row['case']:52}",
            field("isa", 7, ""),
            field("us", 10, ".2f"),
            field("floor_us", 9, ".2f"),
            field("bound", 10, ""),
            field("share", 6, ".0%"),
            field("gb_per_s", 7, ".1f"),
            field("speed_up", 8, ".1f") + cut,
            field("upstream_us", 11, ".1f"),
            field("upstream_ratio", 6, ".2f"),
        )
    )


def run_isa(isa, options):
    """The scan's rows under another instruction set: a process chooses once, so in a new one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "mamba_ssm", "bench", "selective_scan", "--isa", isa]
        command += ["--threads", str(options.threads), "--json", str(path)]
        for dtype in options.dtype or ():
            command += ["--dtype", dtype]
        package = str(Path(__file__).parents[2])  # this very one, however it was found
        search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        env = dict(os.environ, PYTHONPATH=search)
        child = subprocess.run(command, capture_output=True, text=True, env=env)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{child.stderr}")
        return json.loads(path.read_text(encoding="utf-8"))["rows"]


def ratios(rows):
    """Whether the CPU kernels are worth their code, as far as the rows tell."""
    times = {(row["case"], row["isa"]): row["us"] for row in rows}
    plain = times.get((f"{RATIO_SCAN}/fwd", "plain"))
    result = {}
    if plain is not None:
        result["plain loop, G state elements/s"] = 1536 * 512 * 16 / plain / 1e3
    for isa in ISAS[1:]:
        forward, backward = (times.get((f"{RATIO_SCAN}/{d}", isa)) for d in ("fwd", "bwd"))
        if forward is not None and plain is not None:
            result[f"{isa}: scan forward over the plain loop"] = plain / forward
        if forward is not None and backward is not None:
            result[f"{isa}: scan backward / forward"] = backward / forward
    for row in rows:
        if row["case"] == REFERENCE_SCAN:
            result[f"{row['isa']}: scan forward over selective_scan_ref, L 2048"] = row["speed_up"]
    return result


def run(options):
    unknown = sorted(set(options.op) - set(OPERATIONS))
    if unknown:
        known = ", ".join(OPERATIONS)
        raise UsageError(f"no such operation: {', '.join(unknown)}; there are {known}")
    if options.lengths is not None:
        bench_lengths.check(options)
    if options.isa:
        os.environ["MAMBA_CPU_ISA"] = options.isa  # before the library is loaded
    import torch

    from mamba_ssm.cli import device

    device.use(options.device)
    cuda = options.device.startswith("cuda")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        if options.lengths is not None:
            return bench_lengths.run(options)
        document = measure_all(options, cuda)
    finally:
        torch.set_num_threads(threads)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0


def measure_all(options, cuda):
    """Prints the table and the ratios as they come. Returns what --json writes."""
    import torch

    from mamba_ssm.cli import bench_timing

    machine = bench_timing.machine(options.device)
    library = json.loads(bench_timing.ops.native_info())
    isa = None if cuda else library["cpu_isa"]
    print(f"{machine.name}; torch {torch.__version__}; {date.today()}")
    if machine.bandwidth is not None:
        special = f", {machine.exps / 1e9:.0f} G exp/s" if machine.exps else ""
        print(
            f"peaks ({machine.source}): {machine.bandwidth / 1e9:.1f} GB/s, "
            f"{machine.slots / 1e9:.0f} G lane instructions/s{special}"
        )
    if cuda:
        print(f"upstream's times are of {UPSTREAM_MACHINE}")
    print(HEADER)

    rows = []
    reference_times = {}

    def add(row):
        rows.append(row)
        print(format_row(row), flush=True)

    for case in choose_cases(options):
        add(measure(case, machine, isa, options, reference_times))
    if not cuda and options.isa is None and "selective_scan" in (options.op or OPERATIONS):
        for other in ISAS[: ISAS.index(isa)]:
            for row in run_isa(other, options):
                add(row)
    summary = {} if cuda else ratios(rows)
    if summary:
        print("\nratios:")
    for name, value in summary.items():
        print(f"  {name:52} {value:7.2f}")
    return {
        "date": str(date.today()),
        "machine": machine.name,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "library": library,
        "rows": rows,
        "ratios": summary,
    }
