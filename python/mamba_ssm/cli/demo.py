"""Train a small Mamba language model on text that ships with Python.

Learns the bytes of the language reference in `pydoc_data.topics` (or of --text FILE), and compares
its bits per byte on the last tenth, which it never saw, with an order-2 model with Witten-Bell
back-off. Losing to that is an error.
Leaves in --out: curve.png, curve.svg (with matplotlib), sample.txt, result.json, checkpoint.pt.

Ctrl-C stops after the current step; --resume goes on from there, on the CPU to the same numbers.

exit status: 0 Mamba won, 1 it lost, 2 the arguments do not fit, 130 interrupted
"""

import json
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from mamba_ssm.cli.errors import UsageError

CHECKPOINT_SECONDS = 30
EVALUATIONS = 10  # points of the held-out curve
SAMPLE_BYTES = 600

# option, type, default, help: the settings that decide the numbers; a checkpoint keeps its own.
SETTINGS = (
    ("--steps", int, 800, "optimizer steps"),
    ("--d-model", int, 192, "width of the model"),
    ("--layers", int, 4, "Mamba layers"),
    ("--length", int, 256, "bytes in a training row"),
    ("--batch", int, 8, "rows in a step"),
    ("--learning-rate", float, 3e-3, "peak of the schedule"),
    ("--seed", int, 0, "of weights, data order and sample"),
    ("--arch", str, "mamba1", "kind of layer: mamba1 or mamba2"),
)
CHOICES = {"--arch": ("mamba1", "mamba2")}


def add_arguments(parser):
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)"
    )
    parser.add_argument("--text", type=Path, help="learn this file instead")
    for option, kind, default, text in SETTINGS:
        parser.add_argument(
            option, type=kind, choices=CHOICES.get(option), help=f"{text} (default: {default})"
        )


def read_text(path):
    """The bytes to learn and to hold out."""
    if path is not None:
        return path.read_bytes()
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()


def start_training(options, text, split, checkpoint):
    """A new training, or the one in the checkpoint."""
    from mamba_ssm.cli.language_model import Settings, Training

    if options.resume and not checkpoint.is_file():
        raise UsageError(f"nothing to resume: {checkpoint} does not exist")
    given = {}
    for option, _, default, _ in SETTINGS:
        name = option[2:].replace("-", "_")
        given[name] = (getattr(options, name), default)
    if not options.resume:
        settings = Settings(**{k: default if v is None else v for k, (v, default) in given.items()})
        return Training(settings, text, split, options.device)
    training = Training.resume(checkpoint, text, split, options.device)
    for name, (value, _) in given.items():
        kept = getattr(training.settings, name)
        if value is not None and value != kept:
            raise UsageError(f"--resume keeps {name} = {kept} of {checkpoint}, got {value}")
    return training


@contextmanager
def interruption():
    """Yields a function: has Ctrl-C been pressed? The second press ends the program at once."""
    pressed = []

    def note(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def train(training, checkpoint):
    """Runs to the last step. Returns False if interrupted; the checkpoint is written either way."""
    from mamba_ssm.cli.progress import progress

    steps = training.settings.steps
    interval = max(1, steps // EVALUATIONS)
    saved = time.monotonic()
    with interruption() as interrupted, progress(steps, training.step_count) as report:
        while not training.finished() and not interrupted():
            bits = training.step()
            if training.step_count % interval == 0 or training.finished():
                training.evaluate()
            held_out = f"{training.held_out[-1][1]:.3f}" if training.held_out else "-"
            report(training.step_count, f"bits per byte: {bits:.3f}, held out {held_out}")
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                training.save(checkpoint)
                saved = time.monotonic()
        training.save(checkpoint)
    return training.finished()


def draw_curve(training, baseline, folder):
    """Writes curve.png and curve.svg. Returns False without matplotlib."""
    from mamba_ssm.cli import figures

    drawing = figures.new_figure()
    if drawing is None:
        return False
    figure, axes = drawing
    steps = range(1, len(training.losses) + 1)
    axes.plot(steps, training.losses, lw=0.8, alpha=0.6, label="training rows")
    axes.plot(*zip(*training.held_out, strict=True), "o-", label="held-out text")
    label = f"order 2, Witten-Bell: {baseline:.3f}"
    axes.axhline(baseline, color="black", ls="--", lw=1, label=label)
    final = training.held_out[-1][1]
    axes.set(
        title=f"Mamba on bytes of text: {final:.3f} bits per held-out byte",
        xlabel="step",
        ylabel="bits per byte",
        ylim=(0, 8),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figures.save(figure, folder, "curve")
    return True


def run(options):
    import torch

    from mamba_ssm.cli import device, figures
    from mamba_ssm.cli.witten_bell import WittenBell

    device.use(options.device)
    checkpoint = options.out / "checkpoint.pt"
    text = read_text(options.text)
    split = len(text) * 9 // 10
    training = start_training(options, text, split, checkpoint)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = training.settings
    print(
        f"text: {split:,} bytes to learn, {len(text) - split:,} held out\n"
        f"model: {settings.layers} {settings.arch} layers of width {settings.d_model}, "
        f"{training.parameter_count():,} parameters\n"
        f"training: {settings.steps} steps of {settings.batch} x {settings.length} bytes on "
        f"{options.device}, {torch.get_num_threads()} CPU threads",
        flush=True,
    )
    if training.step_count:
        print(f"resumed at step {training.step_count}", flush=True)
    baseline = WittenBell(text[:split]).bits_per_byte(text, split)
    if not train(training, checkpoint):
        print(f"\ninterrupted after step {training.step_count}; --resume continues")
        return 130

    bits = training.held_out[-1][1]
    sample = training.sample(text[split - 64 : split], SAMPLE_BYTES)
    text = sample.decode("utf-8", "replace")
    (options.out / "sample.txt").write_text(text, "utf-8", newline="\n")
    result = {
        "bits_per_byte": bits,
        "order_2_bits_per_byte": baseline,
        "training_seconds": training.seconds,
        "held_out": training.held_out,
        "losses": training.losses,
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    drawn = draw_curve(training, baseline, options.out)
    print(
        f"\nheld-out bits per byte: Mamba {bits:.3f}, order 2 with Witten-Bell {baseline:.3f}\n"
        f"training took {training.seconds:.0f} s\n"
        f"in {options.out}: sample.txt, result.json, checkpoint.pt"
        + (", curve.png, curve.svg" if drawn else f"; no curve: {figures.NO_MATPLOTLIB}")
    )
    print("\nthe model writes:\n" + sample.decode("ascii", "replace").replace("\ufffd", "?"))
    if bits >= baseline:
        print("\nMamba did not beat the order-2 model", file=sys.stderr)
        return 1
    return 0
