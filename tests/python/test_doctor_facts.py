"""How doctor reads libraries, packages, toolkits and architecture lists."""

import base64
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mamba_ssm
import pytest
from mamba_ssm.cli.doctor import arch_list, facts, fatbin, packages, toolchain
from mamba_ssm.native import loader

CMAKE = Path(__file__).resolve().parents[2] / "csrc" / "cmake" / "CudaArchitectures.cmake"


def fat_binary(*entries):
    """A fat binary of (kind, architecture); the sizes differ so that a wrong step is noticed."""
    body = b""
    for index, (kind, architecture) in enumerate(entries):
        payload = bytes(8 * (index + 1))
        body += struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(payload), architecture) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ([], [])),
        (b"a library without", ([], [])),
        (b"x" * 77 + fat_binary((2, 75), (2, 90), (1, 90)) + b"y", ([75, 90], [90])),
        (fat_binary((2, 120)) + bytes(16) + fat_binary((2, 80), (2, 120)), ([80, 120], [])),
        (fat_binary((2, 75), (2, 90))[:100], ([75], [])),  # cut off
        (fat_binary()[:12], ([], [])),
        (fat_binary((7, 75)), ([], [])),  # a kind to come
        (struct.pack("<IHHQ64x", 0xBA55ED50, 1, 16, 1 << 40), ([], [])),  # would not end
    ],
)
def test_architectures_in_a_file(tmp_path, data, expected):
    path = tmp_path / "library"
    path.write_bytes(data)
    assert fatbin.architectures(path) == expected


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_architectures_that_nvcc_writes(tmp_path):
    (tmp_path / "k.cu").write_text("__global__ void k(float* x) { *x += 1; }\n")
    command = ["nvcc", "--fatbin", "k.cu", "-o", "k.fatbin"]
    command += ["-gencode", "arch=compute_80,code=sm_80"]
    command += ["-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert fatbin.architectures(tmp_path / "k.fatbin") == ([80, 90], [90])


def test_architectures_of_our_library():
    from mamba_ssm.native.ops import native_info

    sass, ptx = fatbin.architectures(loader.load())
    compiled = json.loads(native_info())["architectures"]
    assert {*sass, *ptx} == set(compiled)


@pytest.mark.parametrize(
    ("capability", "sass", "ptx", "runs"),
    [
        ((8, 6), [80], [], True),
        ((8, 0), [86], [], False),
        ((9, 0), [80, 86], [], False),
        ((9, 0), [80], [86], True),
        ((12, 1), [120], [], True),
        ((12, 0), [], [120], True),
        ((10, 0), [90], [120], False),
        ((7, 5), [], [], False),
    ],
)
def test_what_runs_where(capability, sass, ptx, runs):
    assert fatbin.runs_on(capability, sass, ptx) == runs


def install(site, **files):
    """A package as pip leaves it: the files and a RECORD of them."""
    info = site / "mamba_ssm-2.3.2+native.1.dist-info"
    info.mkdir(parents=True)
    (site / "mamba_ssm").mkdir()
    record = ""
    for name, text in files.items():
        (site / "mamba_ssm" / f"{name}.py").write_text(text, encoding="utf-8")
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"mamba_ssm/{name}.py,sha256={digest.decode()},{len(text)}\n"
    (info / "RECORD").write_text(record)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: Mamba-SSM\nVersion: 2.3.2+native.1\n"
    )
    return site / "mamba_ssm"


def test_an_installation_that_is_whole(tmp_path):
    package = install(tmp_path, __init__="x", a="y")
    (one,) = packages.distributions([str(tmp_path), str(tmp_path)])
    assert one["name"] == "mamba_ssm" and one["ours"]
    assert one["missing"] == one["changed"] == packages.strangers(package) == []


def test_an_installation_that_was_tampered_with(tmp_path):
    package = install(tmp_path, __init__="x", a="y", b="z")
    (package / "a.py").unlink()
    (package / "b.py").write_text("upstream's")
    (package / "c.py").write_text("upstream's too")
    (package / "c.txt").write_text("notes")
    (one,) = packages.distributions([str(tmp_path)])
    assert [Path(name).name for name in one["missing"]] == ["a.py"]
    assert [Path(name).name for name in one["changed"]] == ["b.py"]
    assert packages.strangers(package) == [str(package / "c.py")]


def test_a_source_tree_has_no_strangers(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    assert packages.strangers(tmp_path / "mamba_ssm") is None


def test_whose_module_it_is(tmp_path):
    ours = str(Path(mamba_ssm.__file__).parents[1])
    for name in packages.NAMES:
        (tmp_path / f"{name}.py").write_text("from mamba_ssm.ops import something\n")
    found = packages.modules([str(tmp_path), ours])
    for name in packages.NAMES:
        assert [place["ours"] for place in found[name]] == [False, True], name


def test_nvcc_that_is_a_script(tmp_path):
    """Distributions put a script on PATH that calls the real one; it says where that is."""
    nvcc, top = tmp_path / "bin" / "nvcc", tmp_path / "toolkit"
    header = top / "include" / "crt" / "host_config.h"
    header.parent.mkdir(parents=True)
    header.write_text("#if __GNUC__ > 14\n#if _MSC_VER < 1920 || _MSC_VER >= 1950\n")
    text = toolchain.host_config(str(nvcc), lambda command: (0, f"#$ _HERE_=x\r\n#$ TOP={top}\r\n"))
    assert toolchain.accepted_gcc(text) == 14
    assert toolchain.accepted_msc(text) == range(1920, 1950)
    assert toolchain.host_config(str(nvcc), lambda command: (1, "no such file")) == ""


def test_a_header_that_says_nothing():
    assert toolchain.accepted_gcc("") is None and 1999 in toolchain.accepted_msc("")


def test_what_cannot_be_collected_is_an_error_of_its_own():
    assert facts.tried(lambda: {}["x"]) == {"error": "KeyError: 'x'"}
    assert facts.tried(lambda a: a, 7) == 7


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "g++"),
        ({"CXX": "g++-13"}, "g++-13"),
        ({"CXX": "/opt/bin/x86_64-linux-gnu-g++", "CUDAHOSTCXX": "g++-12.3"}, "g++-12.3"),
        ({"CXX": "clang++"}, "g++"),
        ({"CXX": "ccache g++ -m64"}, "g++"),
    ],
)
def test_which_gcc(monkeypatch, variables, expected):
    for name in ("CXX", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert facts._gcc() == expected


def test_memory():
    memory = facts._memory()
    assert 2**28 < memory["available"] <= memory["total"] < 2**45


LISTS = (
    *("7.5;8.6+PTX", "75, 86", "8.9 9.0", "sm_90", "compute_90", "86-real 86-virtual", "90a"),
    *("Ampere", "ampere+ptx", "Ada", "Blackwell", "Turing Hopper", "native", "auto", "Native+PTX"),
    *("all", "all-major", "wheel", "Common", "Ampere+Tegra", "86;8.6;86-real", "Volta;8.0"),
    *("10.0a", "12.0+PTX", '"8.0"'),
)
WRONG = ("Volta", "6.1", "8.7 5.3", "gfx90a", "1000", "9.9")
SUPPORTED = (50, 60, 70, 75, 80, 86, 87, 89, 90, 100, 120)


def resolved_by_cmake(folder, texts, native):
    script = folder / "resolve.cmake"
    numbers = [";".join(map(str, given)) for given in (SUPPORTED, native)]
    lines = ["cmake_minimum_required(VERSION 3.25)", f'include("{CMAKE.as_posix()}")']
    for text in texts:
        lines += [
            f'mamba_cuda_architectures(list [==[{text}]==] "{numbers[0]}" "{numbers[1]}")',
            'message(STATUS "RESULT ${list}")',
        ]
    script.write_text("\n".join(lines), encoding="utf-8")
    result = subprocess.run(["cmake", "-P", script], capture_output=True, text=True)
    rows = [line.split("RESULT ")[1] for line in result.stdout.splitlines() if "RESULT " in line]
    return result.returncode, [row.strip().split(";") for row in rows]


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
@pytest.mark.skipif(not CMAKE.is_file(), reason="no sources here")
@pytest.mark.parametrize("native", [(), (86,), (89, 120)], ids=str)
def test_architecture_lists_come_out_as_in_cmake(tmp_path, native):
    status, rows = resolved_by_cmake(tmp_path, LISTS, native)
    assert status == 0 and len(rows) == len(LISTS)
    for text, expected in zip(LISTS, rows, strict=True):
        result, wrong = arch_list.resolve(text, SUPPORTED, native)
        assert wrong is None and sorted(result) == sorted(expected), text


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
@pytest.mark.parametrize("text", WRONG)
def test_architecture_lists_that_are_refused_as_in_cmake(tmp_path, text):
    status, _ = resolved_by_cmake(tmp_path, [text], ())
    assert status != 0
    result, wrong = arch_list.resolve(text, SUPPORTED, ())
    assert result == [] and wrong


@pytest.mark.skipif(sys.platform != "win32", reason="asks vswhere only on Windows")
def test_windows_is_asked_for_visual_studio():
    assert isinstance(facts._build()["visual_studio"], list)


@pytest.mark.skipif(os.name == "nt", reason="makes shell scripts")
def test_the_driver(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\nif [ -n "$1" ]; then echo "NVIDIA H200, 580.95.05, 9.0"; '
        'echo "NVIDIA T4, 580.95.05, 7.5"; else echo "| CUDA Version: 13.0 |"; fi\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus = [
        {"name": "NVIDIA H200", "capability": [9, 0]},
        {"name": "NVIDIA T4", "capability": [7, 5]},
    ]
    expected = {"version": "580.95.05", "cuda": "13.0", "gpus": gpus, "error": None}
    assert facts._driver() == expected
    smi.write_text("#!/bin/sh\necho 'couldn''t communicate with the NVIDIA driver'; exit 9\n")
    assert "communicate" in facts._driver()["error"]
