"""Makes upstream's own mamba or causal-conv1d build with Visual C++, in place.

python scripts/patch_upstream.py ../mamba            # a checkout or an unpacked sdist
python scripts/patch_upstream.py ../mamba --check    # what it would do; 1 if there is something
python scripts/patch_upstream.py ../mamba --diff     # the same as a diff
python scripts/patch_upstream.py ../mamba --reverse  # the files as they were
python scripts/patch_upstream.py --list              # the topics: reason, versions, until when

The edits are patches/*.toml. Either all of them fit, or nothing is written and the message names
file and topic. What is there already, from an earlier run or from a fork, stays as it is.
Originals are kept beside the files as FILE.orig; with --git, git has them.
"""

import argparse
import difflib
import re
import stat
import subprocess
import sys
from pathlib import Path

import _patches as patches
from _patches import PatchError, Plan

NO_END = b"\n\\ No newline at end of file\n"
FOLDER = Path(__file__).resolve().parent.parent / "patches"


class Copies:
    """The originals beside the files, as FILE.orig."""

    name, option = "FILE.orig", ""

    def __init__(self, root):
        self.root = root

    def path(self, name):
        return self.root / f"{name}.orig"

    def refuse(self, names):
        """Lines that say what keeps these files from being changed."""
        for name in names:
            if self.path(name).exists():
                yield f"{name}.orig exists: --reverse first, or move it away"

    def keep(self, name, content):
        with open(self.path(name), "xb") as file:
            file.write(content)

    def original(self, name):
        return self.path(name).read_bytes() if self.path(name).is_file() else None

    def forget(self, name):
        self.path(name).unlink(missing_ok=True)


class Git:
    """The originals in the tree's last commit."""

    name, option = "the last commit", " --git"

    def __init__(self, root):
        self.root = root
        self._git("rev-parse", "--verify", "HEAD")

    def _git(self, *arguments):
        try:
            return subprocess.run(
                ["git", "-C", self.root, *arguments], capture_output=True, check=True
            ).stdout
        except FileNotFoundError:
            raise PatchError("--git: there is no git on PATH") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()
            raise PatchError(f"--git: {reason}") from None

    def refuse(self, names):
        for name in names:
            if self.original(name) is None:
                yield f"{name} is not in git's last commit: commit it, or leave out --git"
            elif self._git("status", "--porcelain", "--", name):
                yield f"{name} has changes that are not committed: commit them, or leave out --git"

    def keep(self, name, content):
        """Nothing to do: git has it."""

    def original(self, name):
        if not self._git("ls-tree", "HEAD", "--", name):
            return None
        return self._git("cat-file", "--filters", f"HEAD:./{name}")

    def forget(self, name):
        """Nothing to do: git keeps it."""


def write(root, contents, before, originals=None):
    """All of the files or none of them."""
    locked = [name for name in contents if not (root / name).stat().st_mode & stat.S_IWUSR]
    problems = [f"{name} is read-only" for name in locked]
    problems += originals.refuse(contents) if originals else []
    if problems:
        raise PatchError("\n".join(problems))
    kept, written = [], []
    try:
        for name in contents if originals else ():
            originals.keep(name, before[name])
            kept.append(name)
        for name, content in contents.items():
            written.append(name)
            (root / name).write_bytes(content)
    except BaseException as error:  # Ctrl-C is no reason to leave half of it either
        for name in written:
            (root / name).write_bytes(before[name])
        for name in kept:
            originals.forget(name)
        if isinstance(error, OSError):
            raise PatchError(str(error)) from None
        raise


def report(topics, plan):
    """A line for each topic that this tree is about."""
    for topic in topics:
        outcomes = [outcome for outcome in plan.outcomes if outcome.edit.topic == topic.name]
        if not outcomes:
            continue
        said = []
        for state, word in (("todo", "patch"), ("done", "already")):
            there = [outcome for outcome in outcomes if outcome.state == state]
            if there:
                files = sorted({Path(outcome.file).name for outcome in there})
                count = sum(outcome.count for outcome in there)
                said.append(f"{word} {count}x in {', '.join(files)}")
        print(f"  {topic.name:30} {'; '.join(said) or 'not in this version'}")
    if plan.unknown:
        print(f"  of no release known here, so that their text decided: {', '.join(plan.unknown)}")


def show_diff(plan):
    """A unified diff in bytes, as git and patch read it."""

    def lines(content):
        found = re.findall(rb"[^\n]*\n|[^\n]+$", content)
        return [line if line.endswith(b"\n") else line + NO_END for line in found]

    for name, after in plan.changes.items():
        names = (f"a/{name}".encode(), f"b/{name}".encode())
        before = lines(plan.before[name])
        for line in difflib.diff_bytes(difflib.unified_diff, before, lines(after), *names):
            sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def show_topics(topics):
    for topic in topics:
        print(f"{topic.name}: {topic.title}")
        for label, text in (("why", topic.reason), ("in", topic.affects), ("until", topic.until)):
            print(f"    {label + ':':7}" + text.replace("\n", "\n" + " " * 11))


def reverse(root, plan, replan, originals):
    """Puts back what was there, if the files are what the patches make of it."""
    found = {name: originals.original(name) for name in plan.before}
    found = {name: content for name, content in found.items() if content is not None}
    back = {name: content for name, content in found.items() if content != plan.before[name]}
    if not back:
        print(f"nothing to take back: no file differs from {originals.name}")
    else:
        again = replan(found)
        for name in back:
            if again.texts[name].content() != plan.texts[name].content():
                raise PatchError(
                    f"{name} is not what these patches make of {originals.name}: it was changed "
                    "since. Compare the two and put it back by hand"
                )
        write(root, back, plan.before)
        print(f"{len(back)} files as they were: {', '.join(sorted(back))}")
    for name in found:
        originals.forget(name)


def run(options):
    topics, blobs = patches.load(options.patches)
    if options.list:
        show_topics(topics)
        return 0
    root = options.tree.resolve()
    upstream = patches.upstream_of(root)
    originals = Git(root) if options.git else Copies(root)

    def plan(contents=None):
        def original(name):
            return originals.original(name) or (now.before.get(name) if contents else None)

        return Plan(root, upstream, topics, blobs, original, contents)

    now = plan()
    if options.reverse:
        reverse(root, now, plan, originals)
        return 0
    if options.diff:
        show_diff(now)
        return 0
    print(f"{' '.join(upstream)} in {root}", flush=True)
    if plan(now.before | now.changes).changes:
        raise PatchError("a second run would not say that all is there: not patched")
    report(topics, now)
    if not now.changes:
        print("nothing to do: all that this version needs is there already")
        return 0
    if options.check:
        print(f"{len(now.changes)} files to change; nothing was written")
        return 1
    write(root, now.changes, now.before, originals)
    print(f"{len(now.changes)} files changed; --reverse{originals.option} takes it back")
    print(f"what else Visual C++ might reject: python scripts/msvc_lint.py {root / 'csrc'}")
    return 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", metavar="TREE", nargs="?", type=Path, help="has setup.py and csrc")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="say what would be done and stop")
    instead.add_argument("--diff", action="store_true", help="print it as a diff and stop")
    instead.add_argument("--reverse", action="store_true", help="put the originals back")
    instead.add_argument("--list", action="store_true", help="print the topics and stop")
    parser.add_argument(
        "--git", action="store_true", help="no .orig files: TREE is a git checkout, files committed"
    )
    parser.add_argument(
        "--patches", type=Path, default=FOLDER, help="folder of topics (default: patches)"
    )
    options = parser.parse_args()
    if not options.list and options.tree is None:
        parser.error("name the folder that holds upstream's setup.py and csrc")
    try:
        return run(options)
    except PatchError as error:
        print(f"{error}\nnothing was written", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
