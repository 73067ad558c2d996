"""What the native libraries of the wheel import: torch's C shims of 2.10 and the system's own, nothing else.

One C++ symbol of torch would tie the library to one torch version.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wheels import native_libraries

TARGET = (2, 10)
SYSTEM_ELF = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d+|ld-linux-x86-64\.so\.2"
SYSTEM_PE = r"kernel32|ucrtbase|msvcp140\w*|vcruntime140\w*|api-ms-win-crt-[\w-]+"


def shims():
    """{name: torch version that introduced it}, as the headers of this torch declare them."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    names = {}
    for header in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"):
        since = [(2, 0)]
        for line in (include / header).read_text(encoding="utf-8").splitlines():
            if re.match(r"#\s*if", line):
                version = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
                since.append(tuple(map(int, version.groups())) if version else since[-1])
            elif re.match(r"#\s*endif", line):
                since.pop()
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                names.setdefault(name, since[-1])
    return names


def read(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not on PATH")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def imports_of_elf(library):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read("readelf", "-dW", library))
    symbols = read("readelf", "--dyn-syms", "-W", library)
    # a system symbol carries its library's version; a weak one may stay undefined
    names = re.findall(r"\sGLOBAL\s+\w+\s+UND (\S+)$", symbols, re.MULTILINE)
    return needed, {name for name in names if "@" not in name}


def imports_of_pe(library):
    pefile = pytest.importorskip("pefile")
    table = {
        entry.dll.decode().lower(): {symbol.name.decode() for symbol in entry.imports}
        for entry in pefile.PE(str(library)).DIRECTORY_ENTRY_IMPORT
    }
    return list(table), table["torch_cpu.dll"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    for name, data in native_libraries():
        (folder / name).write_bytes(data)
    found = sorted(folder.iterdir())
    assert found
    return found


def imports(library):
    return imports_of_pe(library) if sys.platform == "win32" else imports_of_elf(library)


def test_symbols_are_shims_of_the_target_version(libraries):
    known = shims()
    for library in libraries:
        _, names = imports(library)
        assert "torch_library_impl" in names
        assert not sorted(names - set(known)), f"{library.name}: not among torch's C shims"
        late = {name: known[name] for name in names if known[name] > TARGET}
        assert not late, f"{library.name}: newer than the torch that the wheel asks for"


def test_libraries_are_torch_cpu_and_the_systems(libraries):
    system = SYSTEM_PE if sys.platform == "win32" else SYSTEM_ELF
    ours = {"torch_cpu"} if sys.platform == "win32" else {"libtorch_cpu.so"}
    for library in libraries:
        needed = [name.lower().removesuffix(".dll") for name in imports(library)[0]]
        assert {name for name in needed if not re.fullmatch(system, name)} == ours


@pytest.mark.skipif(sys.platform != "linux", reason="ELF only")
def test_stripped_without_search_path_and_showing_no_symbol_of_ours_or_cudas(libraries):
    for library in libraries:
        assert ".symtab" not in read("readelf", "-SW", library)
        assert not re.search(r"\((RPATH|RUNPATH)\)", read("readelf", "-dW", library))
        symbols = read("readelf", "--dyn-syms", "-W", library)
        exported = re.findall(r"\s(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+ (\S+)$", symbols, re.MULTILINE)
        assert not [symbol for symbol in exported if re.search("mamba|cuda|^cu[A-Z]", symbol)]
