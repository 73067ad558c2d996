"""A file, and a tree of files, in the terms that the rules speak: functions, lambdas, macros."""

import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from . import tokens as cpp

CUDA_SUFFIXES = {".cu", ".cuh"}
HEADER_SUFFIXES = {".h", ".hh", ".hpp", ".hxx", ".cuh", ".inc", ".inl", ".ipp"}
SUFFIXES = CUDA_SUFFIXES | HEADER_SUFFIXES | {".c", ".cc", ".cpp", ".cxx"}
DEVICE_WORDS = {"__device__", "__global__"}
COMPILER_HEADER = "core/compiler.h"  # the one place for words that a compiler alone knows
BUILD_FILES = ("CMakeLists.txt", "CMakePresets.json", "setup.py", "meson.build", "pyproject.toml")
BUILD_SUFFIXES = (".cmake", ".vcxproj", ".props", ".bazel")

NO_FUNCTION = {"if", "for", "while", "switch", "catch", "else", "do", "namespace", "return"}
NO_FUNCTION |= {"class", "struct", "union", "enum", "typedef"}
NOT_THE_NAME = {"decltype", "noexcept", "alignas", "__attribute__", "__declspec", "requires"}
NOT_THE_NAME |= {"__launch_bounds__", "__cluster_dims__", "__block_size__", "explicit"}
LEAVE = {"return", "throw", "co_return", "co_yield", "goto", "abort", "exit", "terminate", "asm"}
LEAVE |= {"_Exit", "quick_exit", "__trap", "unreachable", "__builtin_unreachable", "__assume"}
AFTER_PARAMETERS = {
    "const",
    "volatile",
    "noexcept",
    "override",
    "final",
    "try",
    "throw",
    "requires",
}
AFTER_PARAMETERS |= {"&", "&&", "->", ":", "[", "(", "__attribute__"}
BEFORE_LAMBDA = {"return", "co_return", "case", "else", "do", "throw", "co_await", "co_yield"}


def is_macro_name(word):
    return re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", word) is not None


class Code:
    """A run of tokens with its brackets."""

    def __init__(self, tokens, directives=()):
        self.tokens = tokens
        self.partner = cpp.partners(tokens, directives)

    def text(self, i):
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def kind(self, i):
        return self.tokens[i].kind if 0 <= i < len(self.tokens) else ""

    @cached_property
    def index(self):
        """The indices of every word."""
        found = defaultdict(list)
        for i, token in enumerate(self.tokens):
            if token.kind == "word":
                found[token.text].append(i)
        return found

    def words(self, *wanted):
        """Indices of these words."""
        return [i for word in wanted for i in self.index.get(word, ())]

    def close(self, i):
        """Index of the bracket that closes this one, or of the last token."""
        return self.partner.get(i, len(self.tokens) - 1)

    def inside(self, i):
        """The texts between a bracket and its partner."""
        return [token.text for token in self.tokens[i + 1 : self.close(i)]]

    def angle(self, i):
        """Index of the '>' for the '<' at i, or None where that is a comparison."""
        depth, at = 0, i
        while at < len(self.tokens):
            text = self.text(at)
            if text in ("(", "[", "{"):
                at = self.close(at)
            elif text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if not depth:
                    return at
            elif text in (";", ")", "]", "}", "&&", "||"):
                return None
            at += 1
        return None

    @cached_property
    def lambdas(self):
        """(first, open, close) of every lambda: its '[' and the braces of its body."""
        found = []
        for i, token in enumerate(self.tokens):
            if token.text != "[" or token.kind != "mark" or self.text(i + 1) == "[":
                continue
            before = i - 1
            if self.kind(before) in ("word", "number", "string"):
                if self.text(before) not in BEFORE_LAMBDA:
                    continue
            elif self.text(before) in (")", "]", "["):
                continue
            at = self.close(i) + 1
            if self.text(at) == "<":
                at = (self.angle(at) or at) + 1
            while self.kind(at) == "word":  # mutable, __device__, a macro
                at += 1
            if self.text(at) == "(":
                at = self.close(at) + 1
            elif self.text(at) not in ("{", "->"):
                continue
            while at < len(self.tokens) and self.text(at) not in ("{", ";", ")", "}", "="):
                at += 1
            if self.text(at) == "{":
                found.append((i, at, self.close(at)))
        return found

    @cached_property
    def functions(self):
        """(head, name, open, close) of every function: its first token, the name, its braces."""
        bodies = {opening for _, opening, _ in self.lambdas}
        found = []
        for i, token in enumerate(self.tokens):
            if token.text == "{" and token.kind == "mark" and i not in bodies and i in self.partner:
                head = self._head(i)
                name = self._name(head, i)
                if name is not None and self._may_follow(self.close(name + 1) + 1, i):
                    found.append((head, name, i, self.close(i)))
        return found

    def _head(self, opening):
        """Where the declaration begins whose body opens here."""
        at = opening - 1
        while at >= 0:
            text = self.text(at)
            if text in (")", "]") and at in self.partner:
                at = self.partner[at]
            elif text in (";", "{", "}", "(", "["):
                break
            elif text == ":" and self.text(at - 1) in ("public", "private", "protected"):
                break
            at -= 1
        return at + 1

    def _may_follow(self, i, opening):
        """Whether what stands at i, behind a parameter list, leads to a body."""
        text = self.text(i)
        return i == opening or text in AFTER_PARAMETERS or re.fullmatch(r"[A-Z_]{4,}", text)

    def _name(self, head, opening):
        """Index of the function's name in its head; None if this is no function."""
        at = head
        while self.text(at) == "template" and self.text(at + 1) == "<":
            at = (self.angle(at + 1) or at + 1) + 1
        if self.text(at) in NO_FUNCTION:
            return None
        while at < opening:
            text = self.text(at)
            if text == "=" and self.text(at - 1) != "operator":
                return None
            elif text == "(":
                before = at - 1
                if self.kind(before) == "word" and self.text(before) not in NOT_THE_NAME:
                    return before
                if "operator" in [self.text(k) for k in range(max(head, at - 3), at)]:
                    return before
                at = self.close(at)
            elif text == "[":
                at = self.close(at)
            at += 1
        return None

    def around(self, i):
        """The functions that hold token i, outermost first."""
        return [f for f in self.functions if f[2] < i < f[3]]


class Source:
    """One file. `code` and `directives` are what cl.exe compiles, `seen_word` where the words
    of both are, without messages and includes, `every_word` the same with what only others see."""

    def __init__(self, path, name, content):
        self.path, self.name, self.content = path, name, content
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        self.text = content.decode("utf-16" if wide else "utf-8", errors="replace")
        code, directives = cpp.lex(self.text)
        silent = {"error", "warning", "pragma", "include"}

        def words(code, directives):
            found = defaultdict(list)
            for tokens in (code, *(d.tokens for d in directives if d.name not in silent)):
                for token in tokens:
                    if token.kind == "word":
                        found[token.text].append(token.at)
            return found

        self.every_word = words(code, directives)
        code, self.directives = cpp.for_cl(code, directives)
        self.seen_word = words(code, self.directives)
        self.code = Code(code, self.directives)

    suffix = property(lambda self: self.path.suffix.lower())
    is_cuda = property(lambda self: self.suffix in CUDA_SUFFIXES)
    is_c = property(lambda self: self.suffix == ".c")

    @property
    def is_compiler_header(self):
        return self.path.as_posix().endswith(COMPILER_HEADER)

    @cached_property
    def defines(self):
        """Name, parameters (None: none taken) and body of every #define."""
        found = []
        for directive in self.directives:
            if directive.name == "define" and directive.tokens:
                body, parameters = directive.body()
                found.append((directive.name_text, parameters, Code(body)))
        return found

    @cached_property
    def codes(self):
        """The code, and the body of every macro."""
        return [self.code, *(body for _, _, body in self.defines)]

    @cached_property
    def template_parameters(self):
        """Names of the type parameters of all templates here."""
        pattern = r"\b(?:typename|class)\s+(\w+)\s*(?=[,>=])"
        return set(re.findall(pattern, " ".join(token.text for token in self.code.tokens)))

    def first_define(self, name):
        """Offset of #define name, or None."""
        places = (d.at for d in self.directives if d.name == "define" and d.name_text == name)
        return next(places, None)

    def place(self, at):
        line = self.text.count("\n", 0, at) + 1
        return line, at - (self.text.rfind("\n", 0, at) + 1) + 1


class Tree:
    """All files below some paths, and what only all of them together tell."""

    def __init__(self, paths):
        self.roots = [Path(path).resolve() for path in paths]
        self.sources = [
            Source(path, _shown(path), path.read_bytes())
            for root in self.roots
            for path in ([root] if root.is_file() else sorted(root.rglob("*")))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]

    @cached_property
    def build_text(self):
        """The text of the build files of these paths and of the repository that holds them."""
        folders = {root if root.is_dir() else root.parent for root in self.roots}
        for folder in list(folders):
            up = [folder, *folder.parents]
            top = next((i for i, f in enumerate(up) if (f / ".git").exists()), 1)
            folders.update(up[: top + 1])
        near = {f for folder in folders for f in folder.iterdir() if f.name in BUILD_FILES}
        for root in self.roots:
            if root.is_dir():
                near.update(f for f in root.rglob("*") if f.name in BUILD_FILES)
                near.update(f for f in root.rglob("*") if f.suffix in BUILD_SUFFIXES)
        texts = (f.read_text("utf-8", errors="replace") for f in sorted(near) if f.is_file())
        return "\n".join(texts)

    def build_defines(self, name):
        return re.search(rf"(\b|[-/]D){name}\b", self.build_text) is not None

    @cached_property
    def macros(self):
        """Names of the macros that take arguments."""
        return {n for s in self.sources for n, parameters, _ in s.defines if parameters is not None}

    @cached_property
    def constants(self):
        """Names of the macros that take none."""
        return {n for s in self.sources for n, parameters, _ in s.defines if parameters is None}

    def macros_with(self, words):
        """Names of the macros whose body holds one of these words."""
        defines = (define for source in self.sources for define in source.defines)
        return {name for name, _, body in defines if not words.isdisjoint(body.index)}

    @cached_property
    def device_words(self):
        """What marks a function as one for the device: CUDA's words and macros that hold them."""
        return DEVICE_WORDS | self.macros_with(DEVICE_WORDS)

    def is_device(self, code, i):
        """Whether a function that holds token i runs on the device."""
        return any(
            self.device_words & {code.text(k) for k in range(head, opening)}
            for head, _, opening, _ in code.around(i)
        )

    @cached_property
    def aliases(self):
        """Names that somewhere stand for a type, as using or typedef made them."""
        types, values = set(), set()
        for source in self.sources:
            code = source.code
            for i in code.words("using"):
                if code.text(i + 2) == "=":
                    types.add(code.text(i + 1))
            for i in code.words("typedef"):
                end = next((k for k in range(i, len(code.tokens)) if code.text(k) == ";"), i)
                types.add(code.text(end - 1))
            for i in code.words("constexpr"):
                end = next((k for k in range(i, i + 8) if code.text(k) in ("=", "{")), i + 1)
                values.add(code.text(end - 1))
            values.update(
                code.text(i + 1) for i, t in enumerate(code.tokens) if t.text in (".", "->")
            )
        return types - values

    @cached_property
    def noreturn(self):
        """Names of the functions that never return."""
        pattern = r"\[ \[ noreturn \] \][^(;{}]*?(\w+) \("
        return {
            name
            for source in self.sources
            for name in re.findall(pattern, " ".join(t.text for t in source.code.tokens))
        }

    @cached_property
    def leaving(self):
        """Words that end a function: the language's, functions that never return, macros of both,
        and macros of macros from elsewhere, which may."""
        words = LEAVE | self.noreturn
        defines = [define for source in self.sources for define in source.defines]
        elsewhere = {word for _, _, body in defines for word in body.index if is_macro_name(word)}
        return words | self.macros_with(words | elsewhere - self.macros - self.constants)

    @cached_property
    def kernel_templates(self):
        return {name for s in self.sources for name, _, _ in kernel_templates(s.code)}


def kernel_templates(code):
    """(name, its index, whether a body follows) of every __global__ template in this code."""
    for i in code.words("__global__"):
        head = code._head(i)
        if code.text(head) != "template" or code.text(head + 1) != "<":
            continue
        for k in range(i, len(code.tokens)):
            text = code.text(k)
            if text in (";", "{"):
                break
            if text == "(" and code.text(k - 1) not in NOT_THE_NAME:
                yield code.text(k - 1), k - 1, code.text(code.close(k) + 1) != ";"
                break


def _shown(path):
    """A path as a reader would type it."""
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()
