"""C++ text as tokens, without a compiler: comments, raw strings and continued lines are understood,
preprocessor directives are kept apart, and branches that cl.exe never compiles are known."""

import re
from typing import NamedTuple

TOKEN = re.compile(
    r"""
    (?P<space>(?:\s|\\\r?\n)+)
  | (?P<comment>//(?:\\\r?\n|[^\n])*|/\*.*?(?:\*/|\Z))
  | (?P<string>(?:u8|[uUL])?(?:R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"?))
  | (?P<number>\.?\d(?:[eEpP][+-]|'?[\w.])*)
  | (?P<character>(?:u8|[uUL])?'(?:\\.|[^'\\\n])*'?)
  | (?P<word>[A-Za-z_$][\w$]*)
  | (?P<mark><<<|<<=|>>=|\.\.\.|->\*|::|->|&&|\|\||<<|[-+*/%&|^!=<>]=|\+\+|--|\#\#|.)
    """,
    re.S | re.X,
)
CONTINUED = re.compile(r"\\\r?\n")
PAIRS = {")": "(", "]": "[", "}": "{"}
CONDITIONS = {"if", "ifdef", "ifndef"}
ALTERNATIVES = {"else", "elif", "elifdef", "elifndef"}

# Macros whose value is certain under cl.exe.
UNDER_CL = dict.fromkeys(("_WIN32", "_WIN64", "_MSC_VER", "WIN32"), True) | dict.fromkeys(
    ("__GNUC__", "__clang__", "__MINGW32__", "__linux__", "__unix__", "__APPLE__"), False
)


class Token(NamedTuple):
    kind: str  # string, number, character, word or mark
    text: str
    at: int  # offset in the file


class Directive:
    """#name and the tokens behind it; `before` is the number of code tokens in front of it."""

    def __init__(self, at, before):
        self.at, self.before = at, before
        self.name, self.tokens = "", []

    def spelling(self):
        return "".join(token.text for token in self.tokens)

    def header(self):
        """What an #include names, without its quotes."""
        return self.spelling().strip('<>"') if self.name == "include" else ""

    def body(self):
        """The tokens that a #define leaves where it is used, and its parameters."""
        rest = self.tokens[1:]
        if not rest or rest[0].text != "(" or rest[0].at != self.tokens[0].at + len(self.name_text):
            return rest, None
        end = next((i for i, token in enumerate(rest) if token.text == ")"), len(rest))
        return rest[end + 1 :], {token.text for token in rest[1:end] if token.kind == "word"}

    @property
    def name_text(self):
        return self.tokens[0].text if self.tokens else ""


def lex(text):
    """Code tokens and directives, both with those of branches that cl.exe does not compile."""
    code, directives = [], []
    directive, line_start = None, True
    for match in TOKEN.finditer(text):
        kind, word = match.lastgroup, match.group()
        if kind == "tag":
            kind = "string"
        if kind == "comment":
            continue
        if kind == "space":
            if "\n" in CONTINUED.sub("", word):
                directive, line_start = None, True
            continue
        if word == "#" and line_start and directive is None:
            directive = Directive(match.start(), len(code))
            directives.append(directive)
        elif directive is None:
            code.append(Token(kind, word, match.start()))
        elif not directive.name:
            directive.name = word
        else:
            directive.tokens.append(Token(kind, word, match.start()))
        line_start = False
    return code, directives


def _holds(directive):
    """Whether cl.exe takes this condition: True, False, or None where that is not certain."""
    words = directive.spelling()
    if directive.name.endswith(("ifdef", "elifdef")):
        return UNDER_CL.get(words)
    if directive.name.endswith("ndef"):
        known = UNDER_CL.get(words)
        return None if known is None else not known
    for joint, decides in (("&&", False), ("||", True)):
        if joint in words and ("||" if joint == "&&" else "&&") not in words:
            parts = [_term(part) for part in words.split(joint)]
            return decides if decides in parts else None if None in parts else not decides
    return _term(words)


def _term(words):
    match = re.fullmatch(r"(!?)(?:defined\(?)?(\w+)\)?", words)
    if not match:
        return None
    known = {"0": False, "1": True}.get(match[2], UNDER_CL.get(match[2]))
    return None if known is None else known != bool(match[1])


def for_cl(code, directives):
    """What lex() found, without the branches that cl.exe does not compile."""
    live_code, live_directives = [], []
    outer = []  # per open condition: (dead outside, some branch before is certain)
    dead, done = False, 0
    for directive in directives:
        if not dead:
            live_code += code[done : directive.before]
        done = directive.before
        if directive.name in CONDITIONS:
            outer.append((dead, _holds(directive)))
            kept, dead = not dead, dead or outer[-1][1] is False
        elif directive.name in ALTERNATIVES and outer:
            outside, taken = outer[-1]
            holds = None if directive.name == "else" else _holds(directive)
            kept, dead = not outside, outside or taken is True or holds is False
            outer[-1] = (outside, taken is True or holds)
        elif directive.name == "endif" and outer:
            dead = outer.pop()[0]
            kept = not dead
        else:
            kept = not dead
        if kept:
            live = Directive(directive.at, len(live_code))
            live.name, live.tokens = directive.name, directive.tokens
            live_directives.append(live)
    if not dead:
        live_code += code[done:]
    return live_code, live_directives


def partners(tokens, directives=()):
    """The matching bracket of every bracket, by index. Each branch of an #if starts from the same
    open brackets."""
    found, stack, saved = {}, [], []
    pending = list(reversed(directives))
    for i, token in enumerate(tokens):
        while pending and pending[-1].before <= i:
            directive = pending.pop()
            if directive.name in CONDITIONS:
                saved.append(list(stack))
            elif directive.name in ALTERNATIVES and saved:
                stack = list(saved[-1])
            elif directive.name == "endif" and saved:
                saved.pop()
        if token.kind != "mark":
            continue
        if token.text in "([{":
            stack.append(i)
        elif token.text in PAIRS:
            while stack and tokens[stack[-1]].text != PAIRS[token.text]:
                stack.pop()
            if stack:
                found[i] = stack[-1]
                found[stack.pop()] = i
    return found
