"""The house rules that a compiler does not check: who may include whom, and what no source may hold."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("selective_scan", "causal_conv1d", "state_update", "layer_norm")
TOP_LEVEL = {
    *("CMakeLists.txt", "CMakePresets.json", "README.md", "pyproject.toml", "LICENSE"),
    *("CHANGELOG.md", ".ci", ".github", "csrc", "python", "tests", "scripts", "patches"),
    *(".clang-format", ".clang-tidy", ".gitattributes", ".gitignore"),
}
CPP = {".h", ".cpp", ".cu", ".cuh", ".inc"}
TEXT = CPP | {".py", ".md", ".txt", ".toml", ".json", ".cmake", ".yml", ".in", ""}

# What cl.exe, or nvcc with cl.exe, rejects or reads otherwise; and what the numbers forbid.
BANNED_IN_CPP = {
    r"\b(and|or|not|xor|bitand|bitor|compl|and_eq|or_eq|not_eq)\b": "alternative token",
    r"\blong\b": "32 bits on Windows: int64_t",
    r"\bM_[A-Z0-9_]+\b(?<!_T)": "POSIX constant, needs _USE_MATH_DEFINES",
    r"\b(BOOL_SWITCH|ssize_t|__int128|__builtin_\w+)\b": "not in MSVC",
    r"__attribute__": "spelt in core/compiler.h",
    r"[{,]\s*\.\w+\s*=[^=]": "designated initialiser, C++20 in MSVC",
    r"\b(cub|thrust)::": "no CUB in the kernels",
    r"#\s*pragma\s+unroll\b.*#": "directive inside a directive",
}


def files(*folders):
    """Sources below the folders, without what a run leaves behind."""
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not any(part == "__pycache__" or part.endswith("_cache") for part in path.parts)
    ]
    assert found
    return sorted(found)


def code(path):
    """The text of a C++ source without comments and string literals."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), flags=re.M)


def cpp_files(*folders):
    return [path for path in files(*folders) if path.suffix in CPP]


def name(path):
    return path.relative_to(ROOT).as_posix()


def complaints(paths, find):
    return [f"{name(path)}: {word}" for path in paths for word in find(path)]


def is_torch(header):
    return header.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))


def is_cuda(header):
    return re.match(r"cuda(_runtime\w*|_\w*16)?\.h|(cuda|cub|thrust)/|mma\.h", header) is not None


def test_only_the_binding_sees_torch():
    paths = [p for p in cpp_files("csrc") if "torch" not in p.relative_to(ROOT).parts]
    assert not complaints(paths, lambda path: filter(is_torch, includes(path)))


def test_host_code_meets_cuda_only_in_core():
    paths = [p for p in cpp_files("csrc", "tests") if p.suffix not in {".cu", ".cuh"}]
    paths = [p for p in paths if not name(p).startswith("csrc/core/cuda/")]
    assert not complaints(paths, lambda path: filter(is_cuda, includes(path)))


def test_no_room_enters_another():
    """An operation sees core and itself; the binding sees core and the public headers."""

    def foreign(path):
        home = path.relative_to(ROOT / "csrc").parts[0]
        for header in includes(path):
            room, _, file = header.partition("/")
            public = file == f"{room}.h"
            inside = room == home and home != "core"
            if room in ROOMS and not inside and not (home == "torch" and public):
                yield header
            if room == "torch" and home != "torch" and not is_torch(header):
                yield header

    assert not complaints(cpp_files("csrc"), foreign)


def test_every_room_has_its_furniture():
    for room in ROOMS:
        there = {path.name for path in (ROOT / "csrc" / room).iterdir()}
        wanted = {"README.md", f"{room}.h", f"{room}.cpp", "reference.cpp", "CMakeLists.txt"}
        assert wanted <= there, room
        for test in (f"cpp/{room}_test.cpp", f"bench/{room}_bench.cpp"):
            assert (ROOT / "tests" / test).is_file()


@pytest.mark.parametrize(("pattern", "reason"), BANNED_IN_CPP.items(), ids=BANNED_IN_CPP.values())
def test_constructs_that_msvc_trips_over(pattern, reason):
    paths = [p for p in cpp_files("csrc", "tests") if name(p) != "csrc/core/compiler.h"]
    assert not complaints(paths, lambda path: (m.group() for m in re.finditer(pattern, code(path))))


def test_the_bans_would_be_noticed(tmp_path):
    bad = tmp_path / "bad.cpp"
    bad.write_text(
        "// long and or\n"
        'long x = a and b; const char* s = "long";\n'
        "double e = M_LOG2E; BOOL_SWITCH(x); cub::Scan s2;\n"
        "void f() __attribute__((noinline)); P p{.a = 1};\n"
    )
    found = {reason for p, reason in BANNED_IN_CPP.items() if re.search(p, code(bad))}
    assert found == set(BANNED_IN_CPP.values()) - {"directive inside a directive"}
    assert re.findall(r"\blong\b", code(bad)) == ["long"]


def test_no_directive_inside_macro_arguments():
    """Undefined before C++ and rejected by cl.exe: MAMBA_CHECK( ... #if ... )."""

    def split_calls(path):
        text = code(path)
        for call in re.finditer(r"^(?!\s*#).*\b[A-Z][A-Z0-9_]{3,}\(", text, flags=re.M):
            depth, end = 1, call.end()
            while depth and end < len(text):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            if re.search(r"^\s*#", text[call.end() : end], flags=re.M):
                yield call.group().strip()

    assert not complaints(cpp_files("csrc", "tests"), split_calls)


def test_no_lambda_where_kernels_are_launched():
    def lambdas(path):
        text = code(path)
        if "<<<" in text:
            yield from re.findall(r"\[[&=\w, ]*\]\s*\([^)]*\)\s*(?:mutable\s*)?{", text)

    assert not complaints(cpp_files("csrc"), lambdas)


def test_no_fast_math():
    pattern = r"use_fast_math|-ffast-math|/fp:fast|extended-lambda|expt-relaxed-constexpr"
    paths = [p for p in files("csrc") if p.name == "CMakeLists.txt" or p.suffix == ".cmake"]
    paths += [ROOT / "CMakeLists.txt", ROOT / "CMakePresets.json"]
    text = {path: re.sub(r"#.*", "", path.read_text("utf-8")) for path in paths}
    assert not complaints(paths, lambda path: re.findall(pattern, text[path]))


def test_python_needs_neither_triton_nor_einops():
    pattern = r"^\s*(?:import|from)\s+(triton|einops)\b"
    paths = [p for p in files("python") if p.suffix == ".py"]
    assert not complaints(paths, lambda p: re.findall(pattern, p.read_text("utf-8"), flags=re.M))


def test_sources_are_ascii():
    paths = [p for p in files("csrc", "python", "tests", "scripts", ".ci") if p.suffix in TEXT]
    paths += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT]

    def strangers(path):
        text = path.read_bytes()
        return [] if text.isascii() else [f"byte {next(i for i, b in enumerate(text) if b > 127)}"]

    assert not complaints(paths, strangers)


def test_nothing_is_left_for_later():
    pattern = r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b"
    paths = [p for p in files("csrc", "python", "tests", "scripts") if p.suffix in TEXT]
    assert not complaints(paths, lambda p: re.findall(pattern, p.read_text("utf-8")))


def test_top_level_holds_only_what_the_design_names():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: nothing tells sources from what a build leaves")
    assert {line.split("/")[0] for line in listing.stdout.splitlines()} <= TOP_LEVEL
