"""The house rules that a compiler does not check: who may include whom, and what no source may hold.
What cl.exe rejects is scripts/msvc_lint.py's, tested in test_msvc_lint.py."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("selective_scan", "causal_conv1d", "state_update", "layer_norm", "gated_norm", "ssd")
TOP_LEVEL = {
    *("CMakeLists.txt", "CMakePresets.json", "README.md", "pyproject.toml", "LICENSE"),
    *("CHANGELOG.md", ".ci", ".github", "csrc", "python", "tests", "scripts", "patches"),
    *(".clang-format", ".clang-tidy", ".gitattributes", ".gitignore"),
}
CPP = {".h", ".cpp", ".cu", ".cuh", ".inc"}
TEXT = CPP | {".py", ".md", ".txt", ".toml", ".json", ".cmake", ".yml", ".in", ""}


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
    users = ("csrc/core/cuda/", "tests/package/")  # the second is a program of our users
    paths = [p for p in paths if not name(p).startswith(users)]
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


def test_no_cub_in_the_kernels():
    def cub(path):
        return re.findall(r"\b(?:cub|thrust)::", code(path))

    assert not complaints(cpp_files("csrc", "tests"), cub)


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
    paths = [
        p
        for p in files("csrc", "python", "tests", "scripts", "patches", ".ci", ".github")
        if p.suffix in TEXT
    ]
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
