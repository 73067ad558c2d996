"""Every .cpp file through clang++ as for Windows, by the standard's letter."""

import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

GCC = "x86_64-w64-mingw32-g++-posix"  # its standard library and Windows headers
FLAGS = (
    *("-fsyntax-only", "--target=x86_64-w64-windows-gnu", "-pedantic-errors", "-Wall", "-Wextra"),
    *("-Wvla", "-Wgnu", "-Wshorten-64-to-32", "-Wundef", "-Werror"),
    *("-DNOMINMAX", "-DWIN32_LEAN_AND_MEAN"),
)
DEBIAN = "apt-get install clang g++-mingw-w64-x86-64-posix libgtest-dev libbenchmark-dev"


class NotReady(Exception):
    """What is missing, and where it comes from."""


def check(root, build, folders):
    """Compiles the .cpp files below `folders`; `build` is a configured folder with a
    compile_commands.json, which knows the flags. Returns how many files failed."""
    clang = _newest_clang()
    database = build / "compile_commands.json"
    if clang is None or shutil.which(GCC) is None:
        raise NotReady(f"no clang++ or no {GCC} here; on Debian: {DEBIAN}")
    if not database.is_file():
        raise NotReady(f"no {database}; configure first, as in: cmake --preset {build.name}")
    entries = {
        Path(entry["file"]).resolve(): _portable(shlex.split(entry["command"]))
        for entry in json.loads(database.read_text("utf-8"))
    }
    # a file that this build leaves out gets what the op library gets: it includes torch
    general = entries.get(root / "csrc" / "torch" / "library.cpp")
    if general is None:
        raise NotReady(f"{database} has no csrc/torch/library.cpp: configure with MAMBA_TORCH=ON")
    system = _system_includes(build)
    sources = [path for folder in folders for path in sorted((root / folder).rglob("*.cpp"))]
    # LibTorch's headers compile for Windows by cl.exe only: a thread_local that is imported
    sources = [path for path in sources if path.parent.name != "libtorch"]

    def compile_one(path):
        flags = entries.get(path, [*general, f"-I{root / 'tests'}"])
        command = [clang, *FLAGS, *flags, *system, str(path)]
        return path, subprocess.run(command, cwd=build, capture_output=True, text=True)

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, result in pool.map(compile_one, sources):
            if result.returncode:
                failed += 1
                print(f"{path.relative_to(root).as_posix()}:\n{result.stderr}")
    print(f"{Path(clang).name} for Windows: {len(sources)} files, {failed} failed")
    return failed


def _newest_clang():
    names = [f"clang++-{version}" for version in range(30, 13, -1)]
    return next(filter(None, map(shutil.which, [*names, "clang++"])), None)


def _portable(command):
    """Of a command for Linux what holds for Windows too: definitions, folders, instruction sets."""
    kept = []
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "-isystem":
            kept += [word, following]
        elif word.startswith(("-D", "-I", "-std=", "-m")):
            kept.append(word)
    return kept


def _system_includes(build):
    """GCC's folders for Windows, and a folder of links to GoogleTest and Google Benchmark: beside
    them in /usr/include lie the headers of Linux."""
    links = build / "clang-windows"
    links.mkdir(exist_ok=True)
    for name in ("gtest", "benchmark"):
        headers = Path("/usr/include") / name
        if not headers.is_dir():
            raise NotReady(f"no {headers}; on Debian: {DEBIAN}")
        if not (links / name).exists():
            (links / name).symlink_to(headers)
    asked = subprocess.run(
        [GCC, "-xc++", "-E", "-v", os.devnull], capture_output=True, text=True, check=True
    )
    listed = re.search(r"^#include <\.\.\.>.*?\n(.*?)^End of search", asked.stderr, re.S | re.M)[1]
    # not GCC's own intrinsics, which lie in include and include-fixed: clang has its own
    folders = [f for f in listed.split() if not re.search(r"/gcc/.*/include(-fixed)?$", f)]
    return [word for folder in [*folders, str(links)] for word in ("-isystem", folder)]
