"""Doctor's findings for people: rich's table in a terminal, plain lines everywhere else."""

import sys

COLOURS = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}
_INDENT = " " * 9


def write(text=""):
    """Prints what the console's code page has, and ? for the rest."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _console():
    """rich's, in a terminal where it is installed, else None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def table(title, rows):
    console = _console()
    if console is None:
        write("\n".join([title, *map(plain, rows)]))
    else:
        console.print(_rich(title, rows))


def plain(row):
    """A row as lines. None is wrapped: paths and commands stay whole, to be copied."""
    verdict = "PROBLEM" if row.verdict == "problem" else row.verdict
    lines = [f"{verdict:9}{row.check}: {row.found}"]
    lines += [f"{_INDENT}{name}: {text}" for name, text in _more(row)]
    return "\n".join(lines)


def _more(row):
    return [(name, getattr(row, name)) for name in ("cause", "cure") if getattr(row, name)]


def _rich(title, rows):
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", show_lines=True)
    for name in ("verdict", "check", "found, cause, cure"):
        drawn.add_column(name, overflow="fold")
    for row in rows:
        text = Text(row.found)
        for name, said in _more(row):
            text.append(f"\n{name}: ", style="bold")
            text.append(said)
        drawn.add_row(Text(row.verdict, style=COLOURS[row.verdict]), Text(row.check), text)
    return drawn
