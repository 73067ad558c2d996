"""The constructs that cl.exe, or nvcc with cl.exe behind it, rejects or reads otherwise.

A rule is its name, the reason, the cure, and what finds it: a function over a file's tokens,
warnings of clang, or both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .source import DEVICE_WORDS, HEADER_SUFFIXES, NO_FUNCTION, is_macro_name, kernel_templates


@dataclass
class Rule:
    name: str
    reason: str
    cure: str
    find: Callable = lambda source, tree: ()  # -> (offset, what was found)...
    clang: tuple = ()  # clang's -W options, or patterns of its messages


RULES = []


def rule(name, reason, cure, clang=()):
    def add(find):
        RULES.append(Rule(name, reason, cure, find, clang))
        return find

    return add


def _words(source, pattern, every=False):
    """(offset, text) of the words that match; `every`: also where cl.exe does not compile."""
    for word, places in (source.every_word if every else source.seen_word).items():
        if re.fullmatch(pattern, word):
            yield from ((at, word) for at in places)


def _includes(source, pattern):
    for directive in source.directives:
        if re.match(pattern, directive.header()):
            yield directive.at, f"#include {directive.spelling()}"


def _defined(source, tree, name):
    """Offset from which a macro is defined in this file: 0 if the build does it."""
    if tree.build_defines(name):
        return 0
    return source.first_define(name)


# Lambdas and macros


@rule(
    "constexpr-in-lambda",
    "cl.exe captures a block's constexpr variable when a lambda uses it, and it is no constant "
    "expression there: C2975",
    "static constexpr, std::integral_constant, or a template instead of the lambda",
)
def _(source, tree):
    for name, parameters, body in source.defines:
        for i in _block_constants(body, [(first, end) for first, _, end in body.lambdas]):
            if body.text(i) in (parameters or ()):
                yield body.tokens[i].at, f"constexpr {body.text(i)} in the lambda of macro {name}"
    code = source.code
    blocks = [(head, end) for head, _, _, end in code.functions]
    blocks += [(first, end) for first, _, end in code.lambdas]
    for i in _block_constants(code, blocks):
        end = min((end for opening, end in _braces(code) if opening < i < end), default=0)
        for _, opening, closing in code.lambdas:
            if not i < opening < end:
                continue
            for k in range(opening, closing):
                if code.text(k) == code.text(i) and _is_template_argument(code, k):
                    yield code.tokens[k].at, f"constexpr local {code.text(i)} in <> in a lambda"


def _braces(code):
    return [(i, k) for i, k in code.partner.items() if i < k and code.text(i) == "{"]


def _block_constants(code, blocks):
    """Indices of the names of constexpr variables without static inside these blocks."""
    for i in code.words("constexpr"):
        if "static" in (code.text(i - 1), code.text(i + 1)) or code.text(i - 1) == "if":
            continue
        if not any(first < i < end for first, end in blocks):
            continue
        for k in range(i + 1, min(i + 24, len(code.tokens))):
            if code.text(k) in ("=", "{") and code.kind(k - 1) == "word":
                yield k - 1
                break
            if code.text(k) in (";", "(", ")", "}", "="):
                break


def _is_template_argument(code, i):
    depth = 0
    for k in range(i - 1, max(i - 60, -1), -1):
        text = code.text(k)
        if text == ">":
            depth += 1
        elif text == "<" and depth:
            depth -= 1
        elif text == "<":
            end = code.angle(k)
            return code.kind(k - 1) == "word" and end is not None and end > i
        elif text in (";", "{", "}", "&&", "||"):
            return False
    return False


@rule(
    "lambda-around-launch",
    "nvcc turns a launch into a call of a host stub, whose template arguments cl.exe does not find "
    "constant inside lambdas (C2975); and every switch by lambda doubles the kernels",
    "a table of function pointers to launchers; no lambda in a file that launches",
)
def _(source, tree):
    launches = [i for i, t in enumerate(source.code.tokens) if _is_launch(t)]
    for first, opening, closing in source.code.lambdas if launches else ():
        around = any(opening < i < closing for i in launches)
        what = "a lambda around a launch" if around else "a lambda in a file that launches"
        yield source.code.tokens[first].at, what
    for name, _, body in source.defines:
        for first, opening, closing in body.lambdas:
            if any(_is_launch(token) for token in body.tokens[opening:closing]):
                yield body.tokens[first].at, f"a lambda around a launch in macro {name}"


def _is_launch(token):
    if token.kind == "word":
        return re.fullmatch(r"cu(da)?Launch\w*Kernel\w*", token.text) is not None
    return token.kind == "mark" and token.text == "<<<"


@rule(
    "directive-in-macro-arguments",
    "a preprocessor directive between the parentheses of a macro is undefined; cl.exe rejects it "
    "or drops what it guards",
    "put the #if around the whole call, or its content into a function",
)
def _(source, tree):
    code = source.code
    for directive in source.directives:
        inside = [
            i
            for i, end in code.partner.items()
            if i < directive.before <= end and code.text(i) == "(" and code.kind(i - 1) == "word"
        ]
        for i in inside:
            name = code.text(i - 1)
            if name in tree.macros or name == "assert" or is_macro_name(name):
                yield directive.at, f"#{directive.name} in the arguments of {name}"
                break


# Words


@rule(
    "math-constant",
    "M_PI and its like are POSIX: cl.exe's <cmath> has them only behind _USE_MATH_DEFINES",
    "write the number as a constexpr, or -D_USE_MATH_DEFINES for the whole build",
)
def _(source, tree):
    since = _defined(source, tree, "_USE_MATH_DEFINES")
    pattern = r"M_(E|LOG2E|LOG10E|LN2|LN10|PI|PI_2|PI_4|1_PI|2_PI|2_SQRTPI|SQRT2|SQRT1_2)(f|l)?"
    first_include = next((d.at for d in source.directives if d.name == "include"), 0)
    for at, word in _words(source, pattern):
        if word not in tree.constants and not (since is not None and since <= first_include):
            yield at, word


@rule(
    "alternative-token",
    "not keywords in cl.exe without /permissive-, nor in a project that sets it back",
    "the operator: && || ! ^ & | ~",
)
def _(source, tree):
    if not source.is_c:
        yield from _words(source, r"(and|or|xor|not)(_eq)?|bitand|bitor|compl")


@rule(
    "ciso646-include",
    "the header that gave C the alternative tokens; C++20 removed it",
    "drop the include and write the operators",
)
def _(source, tree):
    yield from _includes(source, r"(ciso646|iso646\.h)$")


@rule(
    "long",
    "32 bits on Windows, and not int64_t's mangled name: values are cut, symbols not found",
    "std::int64_t, std::ptrdiff_t or std::size_t; 1LL or std::int64_t{1} for 1L",
)
def _(source, tree):
    beside = {"long", "int", "unsigned", "signed", "double", "const"}
    for code in source.codes:
        for i in code.words("long"):
            left = right = i
            while code.text(left - 1) in beside:
                left -= 1
            while code.text(right + 1) in beside:
                right += 1
            run = [code.text(k) for k in range(left, right + 1)]
            if run.count("long") == 1 and "double" not in run:
                yield code.tokens[i].at, " ".join(run)
        for token in code.tokens:
            hexadecimal = r"0[xXbB][\da-fA-F']+"
            if token.kind == "number" and re.fullmatch(
                rf"(?:{hexadecimal}|\d[\d']*)(?:[uU]?[lL]|[lL][uU])", token.text
            ):
                yield token.at, token.text


@rule(
    "posix-type",
    "types of POSIX and the BSDs that cl.exe's headers lack",
    "std::ptrdiff_t for ssize_t, unsigned for uint, <cstdint> for the rest",
)
def _(source, tree):
    pattern = r"ssize_t|off64_t|uint|ushort|ulong|u_?(char|short|int|long)|u_int\d+_t|useconds_t"
    pattern = rf"({pattern})(?<!uchar)|pid_t|mode_t"
    for code in source.codes:
        for i, token in enumerate(code.tokens):
            if token.kind != "word" or not re.fullmatch(pattern, token.text):
                continue
            if code.text(i - 1) not in (".", "->") and token.text not in tree.aliases:
                yield token.at, token.text


@rule(
    "posix-header",
    "a header that Windows does not have",
    "the standard library, or #if defined(_WIN32) with Windows' own header",
)
def _(source, tree):
    names = "alloca byteswap cxxabi dirent dlfcn endian execinfo fnmatch ftw getopt glob langinfo"
    names += " libgen poll pthread pwd regex sched semaphore strings syslog termios unistd wordexp"
    pattern = rf"(({'|'.join(names.split())})\.h$|(arpa|net|netinet)/"
    pattern += r"|sys/(?!(types|stat|timeb|utime|locking)\.h))"
    yield from _includes(source, pattern)


@rule(
    "gnu-attribute",
    "GCC's and Clang's spelling; cl.exe has __declspec",
    "a standard [[attribute]], or a macro in core/compiler.h",
)
def _(source, tree):
    if not source.is_compiler_header:
        yield from _words(source, r"__attribute(__)?", every=True)


@rule(
    "gnu-builtin",
    "functions that GCC and Clang alone know",
    "the standard library, an intrinsic that all have, or a macro in core/compiler.h",
)
def _(source, tree):
    if not source.is_compiler_header:
        yield from _words(source, r"__builtin_\w+|__sync_[a-z]\w+|__atomic_[a-z]\w+", every=True)


@rule(
    "int128",
    "cl.exe has no 128-bit integer",
    "two 64-bit halves, _umul128, or a macro in core/compiler.h",
)
def _(source, tree):
    if not source.is_compiler_header:
        yield from _words(source, r"__u?int128(_t)?", every=True)


@rule(
    "statement-expression",
    "({ ... }) as a value is GNU C",
    "an inline function",
    clang=("gnu-statement-expression", "gnu-statement-expression-from-macro-expansion"),
)
def _(source, tree):
    for code in source.codes:
        for i in range(len(code.tokens) - 1):
            if code.text(i) != "(" or code.text(i + 1) != "{" or code.kind(i) != "mark":
                continue
            end = code.close(i + 1)
            call = code.kind(i - 1) == "word" and code.text(i - 1) != "return"
            if code.text(end + 1) == ")" and not call and code.text(end - 1) in (";", "}"):
                yield code.tokens[i].at, "({"


@rule(
    "inline-asm",
    "cl.exe for x64 has no inline assembler; PTX in device code is nvcc's own",
    "intrinsics",
)
def _(source, tree):
    for code in source.codes:
        for i in code.words("asm", "__asm", "__asm__", "_asm"):
            follows = code.text(i + 1) in ("(", "volatile", "__volatile__", "goto", "{")
            if not follows or source.is_compiler_header:
                continue
            if code is source.code and tree.is_device(code, i):
                continue
            if code is not source.code and source.is_cuda:
                continue  # a macro: who uses it decides
            yield code.tokens[i].at, code.text(i)


@rule(
    "restrict-in-host-header",
    "cl.exe knows __restrict alone; __restrict__ compiles only where CUDA's headers came first",
    "__restrict, or the macro of core/compiler.h",
)
def _(source, tree):
    if not source.is_cuda and not source.is_compiler_header:
        yield from _words(source, "__restrict__", every=True)


@rule(
    "non-ascii",
    "without /utf-8 cl.exe reads sources in the machine's code page: C4819, broken literals",
    "ASCII; \\u escapes in literals",
)
def _(source, tree):
    content = source.content
    foreign = [] if content.isascii() else [i for i, byte in enumerate(content) if byte > 127]
    if foreign:
        before = content[: foreign[0]].decode("ascii")
        yield len(before), f"{len(foreign)} bytes beyond ASCII, first 0x{content[foreign[0]]:02x}"


@rule(
    "warning-directive",
    "#warning is not standard before C++23; cl.exe stops at it: C1021",
    '#pragma message("...")',
)
def _(source, tree):
    for directive in source.directives:
        if directive.name == "warning":
            yield directive.at, "#warning"


@rule(
    "min-max-macro",
    "windows.h makes min and max macros, which end in C2589 behind :: and in wrong code elsewhere",
    "NOMINMAX for the whole build, (std::min)(a, b) in headers others include",
)
def _(source, tree):
    since = _defined(source, tree, "NOMINMAX")
    for code in source.codes:
        for i in code.words("min", "max"):
            unprotected = since is None or since > code.tokens[i].at
            if unprotected and code.text(i + 1) == "(" and code.text(i - 1) in ("::", "."):
                yield code.tokens[i].at, f"{code.text(i - 2)}{code.text(i - 1)}{code.text(i)}("
    for at, what in _includes(source, r"(?i)(windows|windef|minwindef)\.h$"):
        if since is None or since > at:
            yield at, f"{what} without NOMINMAX"


@rule(
    "printf-length",
    "%ld reads 32 bits on Windows, and %zd has no standard type on the other side",
    "PRId64 for int64_t, %zu for size_t, %td for ptrdiff_t",
)
def _(source, tree):
    for code in source.codes:
        for i, token in enumerate(code.tokens):
            if token.kind != "word" or "printf" not in token.text or code.text(i + 1) != "(":
                continue
            for k in range(i + 2, code.close(i + 1)):
                if code.kind(k) != "string":
                    continue
                for match in re.finditer(r"%[-+ #0-9.*]*(?:l[diouxX]|z[di])", code.text(k)):
                    yield code.tokens[k].at + match.start(), match.group()


# Declarations


RULES.append(
    Rule(
        "variable-length-array",
        "cl.exe wants a constant as array size: C2131",
        "std::vector, or a constexpr size",
        clang=("vla", "vla-extension", "vla-cxx-extension", "variable length array"),
    )
)


@rule(
    "zero-length-array",
    "an array without elements is GNU C: C2466, and C4200 where cl.exe lets it end a struct",
    "a pointer, or an array of at least one element",
    clang=("zero-length-array",),
)
def _(source, tree):
    for i, k in _arrays(source.code):
        declared = source.code.kind(i - 2) == "word" and source.code.text(k + 1) in (";", "=", ",")
        if declared and source.code.inside(i) == ["0"]:
            yield source.code.tokens[i].at, f"{source.code.text(i - 1)}[0]"


@rule(
    "empty-initialiser",
    "an array that takes its size from {} has none (C2466), and {} initialises nothing in C before "
    "C23 (C2059)",
    "write the size: T x[N] = {}; in C, = {0}",
    clang=("gnu-empty-initializer",),
)
def _(source, tree):
    code = source.code
    for i, k in _arrays(code):
        at = k + 2 if code.text(k + 1) == "=" else k + 1
        empty = code.text(at) == "{" and code.text(at + 1) == "}"
        if any(directive.before == at + 1 for directive in source.directives):
            continue  # {} around an #include
        if empty and (source.is_c or (not code.inside(i) and code.text(k + 1) != "[")):
            yield code.tokens[i].at, f"{code.text(i - 1)}[...] = {{}}"


def _arrays(code):
    """(index of '[', index of ']') of what looks like the declaration of an array."""
    for i, token in enumerate(code.tokens):
        if token.text != "[" or i not in code.partner or code.kind(i - 1) != "word":
            continue
        before = code.kind(i - 2) == "word" and code.text(i - 2) not in (
            *("return", "delete", "case", "throw", "else", "new", "goto", "operator"),
        )
        if before or code.text(i - 2) in (">", "*", "&"):
            yield i, code.close(i)


@rule(
    "designated-initialiser",
    "{.member = value} is C++20; cl.exe rejects it in C++17: C7555",
    "set the members by name after the declaration",
    clang=("c++20-designator", "c99-designator"),
)
def _(source, tree):
    for code in source.codes if not source.is_c else ():
        for i, token in enumerate(code.tokens):
            if token.text != "." or code.kind(i + 1) != "word" or code.text(i - 1) not in "{,":
                continue
            if code.text(i + 2) == "{" or code.text(i + 2) == "=":
                yield token.at, f".{code.text(i + 1)} {code.text(i + 2)}"


@rule(
    "missing-typename",
    "a type out of a template parameter needs typename under /permissive-: C7510, C2760",
    "typename T::Name",
    clang=("missing 'typename'", "typename-missing"),
)
def _(source, tree):
    code = source.code
    for i, token in enumerate(code.tokens):
        if token.kind != "word" or token.text not in source.template_parameters:
            continue
        if code.text(i + 1) != "::" or code.text(i + 2) not in tree.aliases:
            continue
        if code.text(i - 1) in ("typename", "::", "using", "class") or code.text(i + 3) == "::":
            continue
        if re.fullmatch(r"[A-Z_]+TYPENAME", code.text(i - 1)):
            continue
        if code.text(i - 1) in (":", ",") and _in_class_head(code, i):
            continue
        yield token.at, f"{token.text}::{code.text(i + 2)}"


def _in_class_head(code, i):
    head = code._head(i)
    return bool({"class", "struct"} & {code.text(k) for k in range(head, i)})


@rule(
    "missing-return",
    "a function that promises a value and returns none: cl.exe stops, C4716",
    "return the value",
    clang=("return-type",),
)
def _(source, tree):
    code = source.code
    for head, name, opening, closing in code.functions:
        if _promises_value(code, head, name, opening) and not _leaves(code, opening, closing, tree):
            yield code.tokens[name].at, f"{code.text(name)}() without return"


SPECIFIERS = {
    "static",
    "inline",
    "constexpr",
    "consteval",
    "virtual",
    "explicit",
    "friend",
    "const",
}
SPECIFIERS |= {"extern", "__host__", "__forceinline__", "__noinline__", "__forceinline", "__inline"}
SPECIFIERS |= {"volatile", "typename", "__inline__"} | DEVICE_WORDS


def _promises_value(code, head, name, opening):
    """Whether the declaration names a return type other than void."""
    if code.text(name) == "main" or code.text(name) in NO_FUNCTION or code.text(name - 1) == "~":
        return False
    first = head
    while code.text(first) == "template" and code.text(first + 1) == "<":
        first = (code.angle(first + 1) or name) + 1
    last = name - 1  # the end of the type: before the name and what qualifies it
    while code.text(last) == "::":
        last -= 1
        depth = 0
        while last > first and (code.text(last) == ">" or depth):
            depth += {">": 1, "<": -1}.get(code.text(last), 0)
            last -= 1
        last -= 1
    kept, i = [], first
    while i <= last:
        text = code.text(i)
        if text in ("(", "[", "{"):
            i = code.close(i)
        elif code.kind(i) == "word" and (text in NOT_A_TYPE or text in SPECIFIERS):
            pass
        elif code.kind(i) in ("word", "mark") and not re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", text):
            kept.append(text)
        i += 1
    for k in range(code.close(name + 1) + 1, opening):
        if code.text(k) == ":":
            break
        if code.text(k) == "->":
            kept = [code.text(n) for n in range(k + 1, opening)]
    if not any(re.match(r"\w", text) for text in kept) or kept == ["auto"] or "operator" in kept:
        return False
    if any("enable_if" in text for text in kept):
        return False
    voids = [k for k, text in enumerate(kept) if text == "void"]
    return all(k + 1 < len(kept) and kept[k + 1] == "*" for k in voids)


NOT_A_TYPE = {"__attribute__", "__declspec", "alignas", "__launch_bounds__", "noexcept"}


def _leaves(code, opening, closing, tree):
    """Whether a body returns, throws, ends the program or never ends."""
    i = opening + 1
    inner = {first: end for first, _, end in code.lambdas}

    def begins(i):
        return code.text(i - 1) in (";", "{", "}", ")", ":", "else")

    while i < closing:
        text = code.text(i)
        if i in inner:
            i = inner[i]
        elif code.kind(i) == "word" and (text in tree.leaving or "unreachable" in text.lower()):
            return True
        elif is_macro_name(text) and text not in tree.macros and begins(i):
            return True  # a macro from elsewhere as a statement: it may
        elif text == "while" and code.text(i + 1) == "(":
            if code.inside(i + 1) in (["true"], ["1"]):
                return True
        elif text == "for" and code.inside(i + 1) == [";", ";"]:
            return True
        i += 1
    return False


# CUDA


@rule(
    "torch-in-cu",
    "torch's headers under nvcc and cl.exe: C2872 'std': ambiguous symbol, and windows.h's macros",
    "pointers, sizes and strides in the .cu file; torch in a .cpp file",
)
def _(source, tree):
    torch = r"(torch|ATen|c10|pybind11)/|Python\.h$"
    if source.is_cuda:
        yield from _includes(source, torch)
    elif source.suffix in HEADER_SUFFIXES and source.path in _headers_of_cuda(tree):
        for at, what in _includes(source, torch):
            yield at, f"{what}, which a .cu file includes through this header"


def _headers_of_cuda(tree):
    """Paths of the headers that .cu files include, directly or not."""
    if not hasattr(tree, "headers_of_cuda"):
        by_path = {source.path: source for source in tree.sources}
        waiting, seen = [s for s in tree.sources if s.is_cuda], set()
        while waiting:
            source = waiting.pop()
            for directive in source.directives:
                for folder in (source.path.parent, *tree.roots):
                    path = (folder / directive.header()).resolve() if directive.header() else None
                    if path in by_path and path not in seen:
                        seen.add(path)
                        waiting.append(by_path[path])
        tree.headers_of_cuda = seen
    return tree.headers_of_cuda


@rule(
    "constexpr-dim3",
    "dim3 is a literal type only where the toolkit's header says so; some ask __cplusplus, which "
    "cl.exe leaves at 199711L without /Zc:__cplusplus",
    "const dim3",
)
def _(source, tree):
    for code in source.codes:
        for i in code.words("dim3"):
            before = [code.text(k) for k in range(max(0, i - 3), i)]
            if "constexpr" in before and not {";", "{", "}", "(", "<"} & set(
                before[before.index("constexpr") :]
            ):
                yield code.tokens[i].at, "constexpr dim3"


@rule(
    "std-array-in-device",
    "std::array's operators are host functions; device code may call them only with "
    "--expt-relaxed-constexpr",
    "a plain array, or a struct with its own operator[]",
    clang=(r"no viable overloaded operator\[\] for type '(const )?std::array<",),
)
def _(source, tree):
    code = source.code
    for i in code.words("array"):
        end = code.angle(i + 1) if code.text(i + 1) == "<" else None
        if code.text(i - 1) != "::" or code.text(i - 2) != "std" or end is None:
            continue
        at = end + 1
        while code.text(at) in ("&", "&&", "const"):
            at += 1
        for head, _, opening, closing in code.functions:
            if not head < i < closing or not tree.is_device(code, opening + 1):
                continue
            for k in range(max(i, opening), closing):
                if code.text(k) == code.text(at) and code.text(k + 1) == "[":
                    yield code.tokens[k].at, f"{code.text(at)}[...] of a std::array"


@rule(
    "global-template-across-units",
    "CUDA 13 makes the host stub of a __global__ template static: another unit does not link",
    "instantiate a host function that launches",
)
def _(source, tree):
    code = source.code
    for i in code.words("template"):
        if code.text(i + 1) == "<" or code.text(i - 1) in ("::", ".", "->"):
            continue
        end = next((k for k in range(i, len(code.tokens)) if code.text(k) in (";", "{")), i)
        names = {code.text(k) for k in range(i, end)}
        if "__global__" in names or names & tree.kernel_templates:
            name = next(iter(names & tree.kernel_templates), "a __global__ template")
            yield code.tokens[i].at, f"explicit instantiation of {name}"
    here = {name for name, _, defined in kernel_templates(code) if defined}
    for name, i, defined in kernel_templates(code):
        if not defined and name not in here:
            yield code.tokens[i].at, f"{name} is declared here and defined elsewhere"
