"""Edits of other people's sources as data: the topics in patches/*.toml, applied to a tree.

Everything here happens in memory; patch_upstream.py writes. patches/README.md explains the keys.
"""

import ast
import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property

from _msvc_lint.rules import RULES
from _msvc_lint.source import Source, Tree

BOM = b"\xef\xbb\xbf"
BLOBS = "blobs.toml"  # beside the topics: which release has which file
TOLD = ("title", "reason", "affects", "until")
EDIT_KEYS = {"projects", "files", "optional", "anchor", "replace", "top", "count", "blobs", "lint"}
EDIT_KEYS |= {"place", "insert", "applied", "needs", "trace", "since", "before"}


def _top(text):
    """Below #pragma once, or above the first directive, which is under no #if."""
    once = re.search(r"^[ \t]*#[ \t]*pragma[ \t]+once\b.*\n", text, re.MULTILINE)
    first = re.search(r"^[ \t]*#", text, re.MULTILINE)
    return [once.end()] if once else [first.start()] if first else []


def _lines(text, wanted):
    """Where the statements of a Python file begin that are wanted."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return []
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    return [starts[statement.lineno - 1] for statement in body if wanted(statement)]


def _imports(text):
    """Above a Python file's first import."""
    return _lines(
        text,
        lambda statement: (
            isinstance(statement, ast.Import)
            or (isinstance(statement, ast.ImportFrom) and statement.module != "__future__")
        ),
    )[:1]


def _setup(text):
    """Above the call that ends a setup.py."""
    return _lines(
        text,
        lambda statement: (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and isinstance(statement.value.func, ast.Name)
            and statement.value.func.id == "setup"
        ),
    )


PLACES = {"top": _top, "imports": _imports, "setup": _setup}


class PatchError(Exception):
    """Something that keeps the whole tree as it is; the message has a line for each reason."""


def parse_toml(text):
    """tomllib came with Python 3.11; before, pip carries the same module."""
    try:
        import tomllib as toml
    except ImportError:
        try:
            import tomli as toml
        except ImportError:
            try:
                from pip._vendor import tomli as toml
            except ImportError:
                raise PatchError("this Python reads no TOML: pip install tomli") from None
    return toml.loads(text)


@dataclass(frozen=True)
class Edit:
    """An anchor that is replaced wherever it stands, or a text that is inserted in one place."""

    topic: str
    projects: tuple  # of upstream_of()
    files: tuple  # glob patterns below the tree
    anchor: re.Pattern | None = None  # is replaced
    replace: str = ""  # with \1 for the anchor's groups; or
    place: str = ""  # one of PLACES
    insert: str = ""  # as it is, there
    top: str = ""  # what the replacement needs at the top of a C++ file
    applied: re.Pattern | None = None  # what stands there afterwards, or in forks
    needs: re.Pattern | None = None  # insert only where the file has this
    count: tuple = (1,)  # the numbers of anchors that may be there; () for any
    blobs: dict = field(default_factory=dict)  # the number in a release's own file
    lint: str = ""  # msvc_lint's rule for what is replaced, or
    trace: re.Pattern | None = None  # a looser pattern of it
    since: tuple = ()  # the versions that are known to have it: none before this,
    before: tuple = (float("inf"),)  # and none from this on
    optional: bool = False  # the file is not in every version


@dataclass(frozen=True)
class Topic:
    name: str
    title: str
    reason: str
    affects: str
    until: str
    edits: tuple


def load(folder):
    """The topics in order, and {blob: releases that have this file}."""
    paths = [path for path in sorted(folder.glob("*.toml")) if path.name != BLOBS]
    if not paths:
        raise PatchError(f"{folder}: no *.toml there")
    blobs = _read(folder / BLOBS)
    return [_topic(path) for path in paths], blobs


def _read(path):
    try:
        return parse_toml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PatchError(f"{path.name}: {error}") from None


def _topic(path):
    def check(holds, what):
        if not holds:
            raise PatchError(f"{path.name}: {what}")

    data = _read(path)
    missing = set(TOLD) - data.keys()
    check(not missing, f"lacks {', '.join(sorted(missing))}")
    shared = {key: value for key, value in data.items() if key not in (*TOLD, "edit")}
    edits = []
    for own in data.get("edit", [{}]):
        given = shared | own
        unknown = given.keys() - EDIT_KEYS
        check(not unknown, f"does not know {', '.join(sorted(unknown))}")
        forms = ({"anchor", "replace"}, {"place", "insert", "applied"})
        check(
            sum(form <= given.keys() for form in forms) == 1,
            "either anchor and replace, or place, insert and applied",
        )
        rules = {rule.name for rule in RULES}
        check(given.get("lint", "") in rules | {""}, f"msvc_lint has no rule {given.get('lint')}")
        check(given.get("place", "top") in PLACES, f"place is one of {', '.join(PLACES)}")
        count = given.get("count", 1)
        counts = count if isinstance(count, list) else [] if count == "any" else [count]
        for key in ("anchor", "applied", "needs", "trace"):
            if key in given:
                try:
                    given[key] = re.compile(given[key], re.MULTILINE | re.ASCII)
                except re.error as error:
                    raise PatchError(f"{path.name}: {key}: {error}") from None
        given |= {key: numbers(given[key]) for key in ("since", "before") if key in given}
        given |= {"topic": path.stem, "count": tuple(counts)}
        given |= {key: tuple(given[key]) for key in ("projects", "files")}
        edits.append(Edit(**given))
    return Topic(path.stem, edits=tuple(edits), **{key: data[key].strip() for key in TOLD})


def numbers(version):
    """(2, 2, 6) of 2.2.6.post3; () where it does not begin with a number."""
    begin = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, begin[0].split("."))) if begin else ()


def blob_of(content):
    """The first digits of git's hash of a file, whatever its line ends are in this checkout."""
    content = content.replace(b"\r\n", b"\n")
    data = b"blob %d\0" % len(content) + content
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()[:7]


class Text:
    """A file with a character per byte and LF line ends; what is not replaced keeps its bytes."""

    def __init__(self, content):
        self.bom = BOM if content.startswith(BOM) else b""
        text = content[len(self.bom) :].decode("latin-1")
        self.ends = re.findall(r"\r?\n", text)
        self.text = self.original = text.replace("\r\n", "\n")
        self.end = "\r\n" if self.ends.count("\r\n") * 2 > len(self.ends) else "\n"

    def replace(self, start, stop, new):
        first, after = (self.text.count("\n", 0, at) for at in (start, stop))
        lines = new.count("\n")
        self.ends[first:after] = (self.ends[first:after] + [self.end] * lines)[:lines]
        self.text = self.text[:start] + new + self.text[stop:]

    def content(self):
        lines = zip(self.text.split("\n"), [*self.ends, ""], strict=True)
        return self.bom + "".join(line + end for line, end in lines).encode("latin-1")


@dataclass(frozen=True)
class Outcome:
    """What one edit found in one file: todo, done (before this run) or none."""

    edit: Edit
    file: str
    state: str
    count: int


class Plan:
    """What the topics make of a tree. `contents` stands in for files on disk: {name: bytes};
    `upstream` is what upstream_of() told, `original` gives the bytes of a name as it came, None
    where that is what is there."""

    def __init__(self, root, upstream, topics, blobs, original, contents=None):
        project, self.version = upstream
        self.root, self.blobs, self.original = root, blobs, original
        self.before, self.came, self.texts = dict(contents or {}), {}, {}
        self.outcomes = []
        errors = []
        for edit in (edit for topic in topics for edit in topic.edits):
            if project not in edit.projects:
                continue
            for pattern in edit.files:
                names = [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]
                if not names and not edit.optional:
                    errors.append(f"{edit.topic}: {root / pattern} is not there")
                for name in names:
                    try:
                        self.outcomes.append(self._apply(edit, name))
                    except PatchError as error:
                        errors.append(f"{edit.topic}: {error}")
        if errors:
            raise PatchError("\n".join(errors))

    @property
    def changes(self):
        """{name: new bytes} of the files that differ from what is there."""
        contents = {name: text.content() for name, text in self.texts.items()}
        return {name: new for name, new in contents.items() if new != self.before[name]}

    @property
    def unknown(self):
        """The changed files whose releases are known, and that are of none of them."""
        listed = {outcome.file for outcome in self.outcomes if outcome.edit.blobs}
        return [
            n for n in self.changes if n in listed and blob_of(self.before[n]) not in self.blobs
        ]

    def describe(self, name):
        """A file with the release that it is from."""
        blob = blob_of(self.before[name])
        return f"{name} ({self.blobs.get(blob, f'blob {blob}, of no release known here')})"

    @cached_property
    def _tree(self):
        return Tree([self.root / "csrc"])

    def _left(self, edit, name):
        """[(line, what)] of the construct in a shape that the anchor is not."""
        version, text = numbers(self.version), self.texts[name]
        if version and not edit.since <= version < edit.before:
            return []
        if edit.trace:
            found = ((match.start(), match[0]) for match in edit.trace.finditer(text.text))
            return [(text.text.count("\n", 0, at) + 1, what) for at, what in found]
        if not edit.lint:
            return []
        source = Source(self.root / name, name, text.content())
        find = next(rule.find for rule in RULES if rule.name == edit.lint)
        return sorted((source.place(at)[0], what) for at, what in find(source, self._tree))

    def _apply(self, edit, name):
        if name not in self.texts:
            self.before.setdefault(name, (self.root / name).read_bytes())
            self.came[name] = self.original(name) or self.before[name]
            self.texts[name] = Text(self.before[name])
        apply = self._insert if edit.insert else self._replace
        state, count = apply(edit, name, self.texts[name])
        return Outcome(edit, name, state, count)

    def _insert(self, edit, name, text):
        if edit.applied.search(text.original):
            return "done", 1
        if edit.needs and not edit.needs.search(text.text):
            return "none", 0
        found = PLACES[edit.place](text.text)
        if len(found) != 1:
            raise self._wrong(edit, name, [1], found)
        text.replace(found[0], found[0], edit.insert)
        return "todo", 1

    def _replace(self, edit, name, text):
        release = edit.blobs.get(blob_of(self.came[name]))
        if release == 0:
            return "none", 0
        found = list(edit.anchor.finditer(text.text))
        applied = len(edit.applied.findall(text.original)) if edit.applied else 0
        if release is not None and self.came[name] == self.before[name]:
            if len(found) != release:
                raise self._wrong(edit, name, [release], [match.start() for match in found])
        elif not found:
            if left := self._left(edit, name):
                line, what = left[0]
                raise PatchError(
                    f"{self.describe(name)}, line {line}: {what}, in a shape that "
                    f"patches/{edit.topic}.toml does not know"
                )
            return ("done", applied) if applied else ("none", 0)
        elif edit.count and not {len(found), len(found) + applied} & set(edit.count):
            raise self._wrong(edit, name, edit.count, [match.start() for match in found])
        for match in reversed(found):
            text.replace(match.start(), match.end(), match.expand(edit.replace))
        if edit.top and edit.top not in text.text:
            (at,) = _top(text.text)
            text.replace(at, at, edit.top)
        return "todo", len(found)

    def _wrong(self, edit, name, counts, found):
        places = [str(self.texts[name].text.count("\n", 0, at) + 1) for at in found]
        where = f" in line {', '.join(places)}" if places else ""
        return PatchError(
            f"{self.describe(name)}: {len(found)} matches{where}, expected "
            f"{' or '.join(map(str, counts))}, of "
            + (edit.anchor.pattern.strip() if edit.anchor else f"the place '{edit.place}'")
        )


def upstream_of(root):
    """mamba or causal-conv1d, and the version that the tree says of itself."""
    if not root.is_dir():
        raise PatchError(f"{root} is no folder")
    marks = {
        "mamba": ("mamba_ssm", "csrc/selective_scan"),
        "causal-conv1d": ("causal_conv1d", "csrc/causal_conv1d.cpp"),
    }
    for project, (package, sources) in marks.items():
        init = root / package / "__init__.py"
        if (root / "setup.py").is_file() and (init.is_file() or (root / sources).exists()):
            if not (root / sources).exists():
                raise PatchError(f"{root} has {package} but no {sources}: this sdist lacks them")
            text = init.read_text("utf-8", errors="replace") if init.is_file() else ""
            version = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", text, re.MULTILINE)
            return project, version[1] if version else "of unknown version"
    raise PatchError(
        f"{root} is neither upstream's mamba (setup.py, csrc/selective_scan) nor causal-conv1d "
        "(setup.py, csrc/causal_conv1d.cpp): name the folder that holds setup.py"
    )
