"""Say what is wrong with this machine, or with a pasted log, and what to do.

Examines system, Python, torch, GPU and driver, the native library and its kernels, packages that mix with or
hide ours, and the compilers of those who build. Needs neither torch nor a library that loads. The exit status is
1 if something does not work; what only concerns building never counts.

--explain takes a log, the name of a file with one, or - for standard input; it finds the first real error in it,
and exits with 1 if it knows none of its lines.
"""

import dataclasses
import json
import sys

from mamba_ssm.cli.doctor import build_checks, checks, explain, facts, report


def add_arguments(parser):
    parser.add_argument(
        "--json", action="store_true", help="print all of it as JSON, with the facts"
    )
    parser.add_argument(
        "--explain", metavar="TEXT", help="explain a log: the text, a file with it, or -"
    )


def run(options):
    if options.explain is not None:
        return _explain(options)
    found = facts.collect()
    to_run, to_build = checks.rows(found), build_checks.rows(found)
    status = int(any(row.verdict == "problem" for row in to_run))
    if options.json:
        rows = {"run": _plain(to_run), "build": _plain(to_build)}
        _print_json({"status": status, "rows": rows, "facts": found})
        return status
    report.table(f"To run models with mamba_ssm {found['package']['version']}", to_run)
    report.write()
    report.table("To build it, or upstream's packages (a wheel needs nothing of this)", to_build)
    report.write()
    report.write(_summary(to_run))
    return status


def _summary(rows):
    count = {name: sum(row.verdict == name for row in rows) for name in ("problem", "warning")}
    if not any(count.values()):
        return "Nothing is wrong. `python -m mamba_ssm --help` says what can be run."
    said = [f"{number} {name}{'s' * (number != 1)}" for name, number in count.items() if number]
    return " and ".join(said) + ". A log or message: python -m mamba_ssm doctor --explain FILE"


def _explain(options):
    source = options.explain
    text = explain.decode(sys.stdin.buffer.read()) if source == "-" else explain.read(source)
    found = explain.find(text, explain.knowledge())
    unknown = explain.first_error(text)
    if not found:
        if options.json:
            _print_json({"status": 1, "first_error": unknown})
        elif unknown:
            report.write(
                f"Nothing in it is known here. The first error: line {unknown[0]}:\n  {unknown[1]}"
            )
        else:
            report.write("Nothing in it is known here, and no line looks like an error.")
            if text == source:
                report.write("There is no file of that name, so it was read as the text itself.")
        return 1
    machine = facts.collect()
    rows = checks.rows(machine) + build_checks.rows(machine)
    said = explain.explanation(found[0], rows, machine["system"]["os"])
    others = [{"line": one.number, "id": one.message["id"], "text": one.line} for one in found[1:]]
    if options.json:
        said["machine"] = _plain(said["machine"])
        _print_json({"status": 0, **said, "others": others, "first_error": unknown})
        return 0
    report.write(f"line {said['line']}: {said['text']}\n")
    report.write(f"cause: {said['cause']}")
    for cure in said["cure"]:
        report.write(f"cure: {cure}")
    if said["machine"]:
        report.write()
        report.table("On this machine", said["machine"])
    if unknown and unknown[0] < said["line"]:
        report.write(f"\nBefore it, line {unknown[0]} looks like an error too: {unknown[1]}")
    if others:
        report.write(
            "\nKnown as well: " + ", ".join(f"{one['id']} (line {one['line']})" for one in others)
        )
    return 0


def _plain(rows):
    return [dataclasses.asdict(row) for row in rows]


def _print_json(document):
    print(json.dumps(document, indent=1))  # ASCII: any console takes it
