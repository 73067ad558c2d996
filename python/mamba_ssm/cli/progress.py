"""A progress bar from tqdm or rich if one is installed, plain lines otherwise."""

import sys
from contextlib import contextmanager


@contextmanager
def progress(total, done):
    """Yields report(step, note), to be called once a step; `done` steps lie behind already."""
    bar = (_tqdm(total, done) or _rich(total, done)) if sys.stderr.isatty() else None
    report, close = bar or _lines(total)
    try:
        yield report
    finally:
        close()


def _tqdm(total, done):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def report(step, note):
        bar.set_postfix_str(note, refresh=False)
        bar.update(step - bar.n)

    return report, bar.close


def _rich(total, done):
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    bar = Progress(
        *Progress.get_default_columns(), "{task.fields[note]}", console=Console(stderr=True)
    )
    task = bar.add_task("training", total=total, completed=done, note="")
    bar.start()
    return lambda step, note: bar.update(task, completed=step, note=note), bar.stop


def _lines(total):
    """About twenty lines in all: what a log file wants."""
    interval = max(1, total // 20)

    def report(step, note):
        if step % interval == 0 or step == total:
            print(f"step {step}/{total}  {note}", file=sys.stderr, flush=True)

    return report, lambda: None
