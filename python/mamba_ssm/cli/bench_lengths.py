"""`bench --lengths`: time of a layer against the length of its sequence, as tables and a picture."""

import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

from mamba_ssm.cli.errors import UsageError

LENGTHS = [512 << i for i in range(8)]  # to 65536
D_MODEL, D_STATE = 512, 16
SECONDS = 10.0  # a call
FOLDER = Path("runs/lengths")


def add_arguments(parser):
    group = parser.add_argument_group("with --lengths")
    group.add_argument(
        "--lengths",
        nargs="*",
        type=int,
        metavar="L",
        help="measure the layer at these lengths (default: 512, 1024 ... 65536)",
    )
    group.add_argument("--out", type=Path, help=f"folder (default: {FOLDER.as_posix()})")
    group.add_argument(
        "--seconds",
        type=float,
        help=f"leave out lengths at which a call would take longer (default: {SECONDS:g})",
    )
    group.add_argument(
        "--upstream",
        type=Path,
        metavar="FOLDER",
        help="measure the mamba_ssm in FOLDER too (pip install --no-deps --target FOLDER mamba-ssm)",
    )


def check(options):
    """UsageError where other options do not go with --lengths."""
    for name, value in (("an operation", options.op), ("--json", options.json)):
        if value:
            raise UsageError(
                f"--lengths measures a layer and writes its files into --out; leave out {name}"
            )
    if options.dtype and len(options.dtype) > 1:
        raise UsageError(f"--lengths takes one --dtype, got {', '.join(options.dtype)}")
    if any(length < 1 for length in options.lengths):
        raise UsageError(f"--lengths must be positive, got {min(options.lengths)}")


def sweep(contender, lengths, hidden_of, device, limit, report):
    """{"name", "points": [[length, seconds], ...], "stopped": why the next length was left out, or None}."""
    import torch

    from mamba_ssm.cli import bench_timing

    points, stopped = [], None
    for done, length in enumerate(lengths):
        report(done, f"{contender.name}, {length} steps")
        stopped = why_not(contender, points, length, device, limit)
        if stopped:
            break
        hidden = hidden_of(length)
        try:
            with torch.no_grad():
                seconds = bench_timing.time_layer(partial(contender.run, hidden), device)
        except RuntimeError as error:  # memory above all, of the GPU or of an index
            stopped = str(error).splitlines()[0]
            break
        points.append([length, seconds])
    return {"name": contender.name, "points": points, "stopped": stopped}


def why_not(contender, points, length, device, limit):
    """Why a length is too long for the contender, None if it is not."""
    from mamba_ssm.cli import machine

    if points:
        last, seconds = points[-1]
        expected = seconds * length / last
        if expected > limit:
            return f"about {expected:.0f} s expected, the limit is {limit:g} s"
    states = 4 * contender.states * length * 2 * D_MODEL * D_STATE
    free = machine.free_memory(device)
    if states > free:
        return f"needs about {states / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def measure(options):
    """The document that lengths.json holds."""
    import torch

    from mamba_ssm.cli import contenders, machine
    from mamba_ssm.cli.progress import progress
    from mamba_ssm.modules.mamba_simple import Mamba

    dtype = (options.dtype or ["float32"])[0]
    torch.manual_seed(0)
    factory = {"device": options.device, "dtype": getattr(torch, dtype)}
    layer = Mamba(D_MODEL, D_STATE, **factory).eval()
    found, left_out = contenders.gather(layer, options.upstream)
    for name, why in left_out.items():
        print(f"without {name}: {why}", file=sys.stderr)
    lengths = sorted(set(options.lengths)) or LENGTHS
    limit = SECONDS if options.seconds is None else options.seconds

    def hidden_of(length):
        return torch.randn(1, length, D_MODEL, **factory)

    results = []
    with progress(len(found) * len(lengths), unit="point") as bar:
        for contender in found:
            before = len(results) * len(lengths)

            def report(done, note, before=before):
                bar(before + done, note)

            results.append(sweep(contender, lengths, hidden_of, options.device, limit, report))
        bar(len(found) * len(lengths), "done")
    return {
        "date": str(date.today()),
        "machine": machine.describe(options.device),
        "what": f"Mamba(d_model={D_MODEL}), forward, batch 1, {dtype}",
        "lengths": lengths,
        "contenders": results,
        "left_out": left_out,
    }


def to_markdown(document):
    from mamba_ssm.cli import machine

    results = document["contenders"]
    times = [dict(map(tuple, result["points"])) for result in results]
    lines = [
        f"# {document['what']}: time against length",
        "",
        f"{document['date']}; {machine.in_a_line(document['machine'])}.",
        "Milliseconds of the shortest call, in brackets how many times ours.",
        "",
        "| length | " + " | ".join(result["name"] for result in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for length in document["lengths"]:
        ours = times[0].get(length)
        cells = []
        for i, own in enumerate(times):
            seconds = own.get(length)
            cell = "-" if seconds is None else f"{seconds * 1e3:.4g}"
            if i and ours and seconds:
                cell += f" ({seconds / ours:.1f}x)"
            cells.append(cell)
        lines.append(f"| {length} | " + " | ".join(cells) + " |")
    notes = [
        f"- {result['name']} stops before {document['lengths'][len(result['points'])]}: "
        f"{result['stopped']}"
        for result in results
        if result["stopped"]
    ]
    notes += [f"- without {name}: {why}" for name, why in document["left_out"].items()]
    return "\n".join(lines + ([""] + notes if notes else [])) + "\n"


def draw(document, folder):
    """Writes lengths.png and lengths.svg. Returns False without matplotlib."""
    from mamba_ssm.cli import figures, machine

    drawing = figures.new_figure()
    if drawing is None:
        return False
    figure, axes = drawing
    for result in document["contenders"]:
        if result["points"]:
            lengths, seconds = zip(*result["points"], strict=True)
            axes.plot(lengths, [s * 1e3 for s in seconds], "o-", label=result["name"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(title=document["what"], xlabel="length", ylabel="milliseconds")
    axes.set_xticks(document["lengths"], list(map(str, document["lengths"])))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    caption = f"{machine.chip(document['machine'])}; {document['date']}"
    figure.supxlabel(caption, fontsize="small", color="gray")
    figures.save(figure, folder, "lengths")
    return True


def run(options):
    from mamba_ssm.cli import figures

    document = measure(options)
    folder = options.out or Path("runs/lengths")
    folder.mkdir(parents=True, exist_ok=True)
    markdown = to_markdown(document)
    (folder / "lengths.md").write_text(markdown, "utf-8", newline="\n")
    (folder / "lengths.json").write_text(json.dumps(document, indent=1), "utf-8")
    print(markdown)
    drawn = draw(document, folder)
    print(f"in {folder}: lengths.md, lengths.json" + (", lengths.png, lengths.svg" * drawn))
    if not drawn:
        print(figures.NO_MATPLOTLIB, file=sys.stderr)
    return 0
