"""A progress bar from tqdm or rich if one is installed, plain lines otherwise."""

import sys
from contextlib import contextmanager

NO_BAR = (
    "tqdm and rich are not installed, so there are lines instead of a progress bar; "
    'pip install "mamba_ssm[cli]" brings them'
)


@contextmanager
def progress(total, done=0, unit="step"):
    """Yields report(step, note), to be called once a step; `done` steps lie behind already."""
    bar = None
    if sys.stderr.isatty():
        bar = _tqdm(total, done, unit) or _rich(total, done, unit)
        if bar is None:
            print(NO_BAR, file=sys.stderr)
    report, close = bar or _lines(total, unit)
    try:
        yield report
    finally:
        close()


def _tqdm(total, done, unit):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True)

    def report(step, note):
        bar.set_postfix_str(note, refresh=False)
        bar.update(step - bar.n)

    return report, bar.close


def _rich(total, done, unit):
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    bar = Progress(
        *Progress.get_default_columns(), "{task.fields[note]}", console=Console(stderr=True)
    )
    task = bar.add_task(unit, total=total, completed=done, note="")
    bar.start()
    return lambda step, note: bar.update(task, completed=step, note=note), bar.stop


def _lines(total, unit):
    """About twenty lines in all: what a log file wants."""
    interval = max(1, total // 20)

    def report(step, note):
        if step % interval == 0 or step == total:
            print(f"{unit} {step}/{total}  {note}", file=sys.stderr, flush=True)

    return report, lambda: None
