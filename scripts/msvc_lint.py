"""Finds what cl.exe rejects, or reads otherwise than GCC, Clang and nvcc on Linux.

python scripts/msvc_lint.py                     # csrc and tests of this repository
python scripts/msvc_lint.py ../other/csrc       # any tree of C++ and CUDA sources
python scripts/msvc_lint.py --list              # the rules
python scripts/msvc_lint.py --rule long csrc    # one of them
python scripts/msvc_lint.py --clang             # instead: every .cpp through clang++ as for Windows

Exits with 1 if something was found, with 2 if not everything could be checked.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from _msvc_lint import clang, cross
from _msvc_lint.rules import RULES
from _msvc_lint.source import Tree

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "tests")


def lint(paths, rules, cindex):
    """{rule: sorted (shown path, line, column, what)}; cindex None leaves clang's part out."""
    tree = Tree(paths)
    found = defaultdict(dict)  # one finding for a rule and a line
    for source in tree.sources:
        for rule in rules:
            for at, what in rule.find(source, tree):
                line, column = source.place(at)
                found[rule.name].setdefault((source.name, line), (column, what))
    if cindex is not None:
        names = {source.path: source.name for source in tree.sources}
        wanted = [rule for rule in rules if rule.clang]
        for path, line, column, rule, what in clang.findings(cindex, tree, wanted):
            found[rule].setdefault((names[path], line), (column, what))
    return tree, {
        name: [(*place, *what) for place, what in sorted(places.items())]
        for name, places in found.items()
    }


def show(found, rules):
    for rule in rules:
        if found.get(rule.name):
            for path, line, column, what in found[rule.name]:
                print(f"{path}:{line}:{column}: {rule.name}: {what}")
            print(f"    why:  {rule.reason}\n    cure: {rule.cure}\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="files or folders")
    parser.add_argument("--list", action="store_true", help="print the rules and stop")
    parser.add_argument("--rule", action="append", metavar="NAME", help="check this rule only")
    parser.add_argument(
        "--text-only", action="store_true", help="leave out what needs the package libclang"
    )
    parser.add_argument(
        "--clang",
        nargs="?",
        const=ROOT / "build" / "linux-cpu",
        type=Path,
        metavar="BUILD",
        help="compile for Windows with clang++ and mingw-w64's headers; BUILD is a configured "
        "folder that has the flags (default: build/linux-cpu)",
    )
    options = parser.parse_args()
    unknown = set(options.rule or ()) - {rule.name for rule in RULES}
    if unknown:
        parser.error(f"no rule {', '.join(sorted(unknown))}; --list prints them")
    missing = [path for path in options.paths if not Path(path).exists()]
    if missing:
        parser.error(f"not there: {', '.join(missing)}")
    if options.clang:
        try:
            return 1 if cross.check(ROOT, options.clang.resolve(), FOLDERS) else 0
        except cross.NotReady as missing:
            print(missing, file=sys.stderr)
            return 2
    rules = [rule for rule in RULES if not options.rule or rule.name in options.rule]
    if options.list:
        for rule in rules:
            print(f"{rule.name}\n    why:  {rule.reason}\n    cure: {rule.cure}")
        return 0

    cindex = None if options.text_only else clang.load()
    tree, found = lint(options.paths or [ROOT / folder for folder in FOLDERS], rules, cindex)
    if not tree.sources:
        parser.error(f"no C++ or CUDA source in {', '.join(map(str, tree.roots))}")
    show(found, rules)
    count = sum(map(len, found.values()))
    print(f"{len(tree.sources)} files, {len(rules)} rules, {count} findings")
    unchecked = [rule.name for rule in rules if rule.clang]
    if cindex is None and unchecked:
        print(f"without libclang, only in part or not at all: {', '.join(unchecked)}")
        if not options.text_only:
            print(f"pip install {clang.PACKAGE}, or accept that with --text-only")
    if count:
        return 1
    return 2 if cindex is None and unchecked and not options.text_only else 0


if __name__ == "__main__":
    sys.exit(main())
