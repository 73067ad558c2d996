"""What doctor makes of recorded machines: each row changes one fact of a machine with nothing wrong."""

import copy
import json

import pytest
from mamba_ssm.cli.doctor import build_checks, checks

MACHINE = {
    "package": {"version": "2.3.2+native.1", "folder": "C:\\env\\mamba_ssm"},
    "system": {"name": "Windows-11", "os": "windows", "machine": "AMD64", "wsl": None},
    "python": {"version": "3.13.1", "executable": "C:\\p\\python.exe", "bits": 64, "store": False},
    "torch": {"version": "2.12.0+cu130", "file": "C:\\t.py", "cuda": "13.0", "hip": None},
    "devices": {
        "gpus": [{"name": "RTX 4070", "capability": [8, 9], "memory": 2**33}],
        "reason": None,
        "architectures": ["sm_75", "sm_86", "sm_120"],
    },
    "library": {
        "path": "C:\\env\\cu13.dll",
        "version": "2.3.2+native.1",
        "torch_abi": "2.10",
        "cpu_isa": "avx2",
    },
    "minimum_torch": "2.10",
    "driver": {
        "version": "581.29",
        "cuda": "13.0",
        "gpus": [{"name": "RTX 4070", "capability": [8, 9]}],
        "error": None,
    },
    "libraries": [
        {"kind": "cu13", "path": "C:\\env\\cu13.dll", "sass": [75, 80, 86, 89], "ptx": [89]},
        {"kind": "cu12", "path": "C:\\env\\cu12.dll", "sass": [75], "ptx": []},
    ],
    "packages": {
        "modules": {"mamba_ssm": [{"file": "C:\\env\\mamba_ssm\\__init__.py", "ours": True}]},
        "distributions": [
            {
                "name": "mamba_ssm",
                "version": "2.3.2+native.1",
                "folder": "C:\\env",
                "ours": True,
                "missing": [],
                "changed": [],
            }
        ],
        "strangers": [],
        "triton": None,
    },
    "variables": {},
    "build": {
        "cl": {"path": "C:\\cl.exe", "version": "19.44.35207"},
        "visual_studio": [
            {"name": "VS 2026", "folder": "C:\\18", "toolsets": ["14.50"]},
            {"name": "VS 2022", "folder": "C:\\17", "toolsets": ["14.44"]},
        ],
        "vswhere": "",
        "gcc": None,
        "cuda_home": "C:\\CUDA\\v13.0",
        "nvcc": {
            "path": "C:\\CUDA\\v13.0\\bin\\nvcc.exe",
            "version": "13.0",
            "architectures": [75, 80, 86, 89, 90, 100, 120],
            "msc": [1920, 1950],
            "gcc": 15,
        },
        "cmake": {"path": "cmake", "version": "4.1.0"},
        "ninja": {"path": "ninja", "version": "1.12.1"},
        "memory": {"total": 32 * 2**30, "available": 24 * 2**30},
        "cpus": 16,
    },
}
LINUX = {"name": "Linux", "os": "linux", "machine": "x86_64", "wsl": None}
GPP16 = {"system": LINUX, "build": {"cl": None, "gcc": {"path": "g++", "version": "16.1.0"}}}
NO_GPU = {"gpus": [], "reason": "No CUDA GPUs are available", "architectures": []}


def changed(machine, changes):
    """A copy with these facts replaced; dicts are merged."""
    result = copy.deepcopy(machine)
    for name, value in changes.items():
        merge = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = changed(result[name], value) if merge else value
    return result


def verdicts(facts):
    json.dumps(facts)
    rows = checks.rows(facts) + build_checks.rows(facts)
    assert len({row.check for row in rows}) == len(rows)
    for row in rows:
        assert row.verdict in checks.VERDICTS and row.found
        assert bool(row.cause) or row.verdict in ("ok", "note")
        assert row.cure or row.verdict in ("ok", "note")
    return {row.check: row for row in rows}


def test_nothing_is_wrong():
    rows = verdicts(MACHINE)
    assert {row.verdict for row in rows.values()} <= {"ok", "note"}
    assert "cu13: sm_75, sm_80, sm_86, sm_89 and PTX compute_89" in rows["kernels"].found


def only_package(**facts):
    return {"packages": {"distributions": [MACHINE["packages"]["distributions"][0] | facts]}}


# changes -> check, verdict, words of what is said
CASES = {
    "wsl2": ({"system": LINUX | {"wsl": 2}}, "system", "ok", "WSL2"),
    "wsl1": ({"system": LINUX | {"wsl": 1}}, "system", "warning", "--set-version"),
    "arm": ({"system": {"machine": "ARM64"}}, "system", "problem", "x86-64"),
    "32 bits": ({"python": {"bits": 32}}, "Python", "problem", "64-bit"),
    "store": ({"python": {"store": True}}, "Python", "warning", "python.org"),
    "old torch": ({"torch": {"version": "2.9.1+cu128"}}, "torch", "problem", "--upgrade"),
    "a torch to come": ({"torch": {"version": "10.0.0a0+git1"}}, "torch", "ok", "10.0.0a0"),
    "torch without CUDA": (
        {"torch": {"cuda": None}, "devices": NO_GPU},
        *("GPU", "problem", "without CUDA"),
    ),
    "hidden GPU": (
        {"devices": NO_GPU, "variables": {"CUDA_VISIBLE_DEVICES": "-1"}},
        *("GPU", "problem", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "old driver": (
        {"devices": NO_GPU, "driver": {"version": "535.98", "cuda": "12.2"}},
        *("GPU", "problem", "driver is older than torch's CUDA 13.0"),
    ),
    "GPU out of reach": ({"devices": NO_GPU}, "GPU", "problem", "No CUDA GPUs are available"),
    "no GPU": ({"devices": NO_GPU, "driver": {"gpus": []}}, "GPU", "note", "the CPU works"),
    "ROCm": ({"torch": {"cuda": None, "hip": "7.0"}}, "GPU", "note", "AMD's GPUs"),
    "GPU below sm_75": (
        {"devices": {"gpus": [{"name": "V100", "capability": [7, 0], "memory": 1}]}},
        *("kernels", "problem", "V100 is sm_70"),
    ),
    "GPU that PTX reaches": (
        {"devices": {"gpus": [{"name": "new", "capability": [13, 0], "memory": 1}]}},
        *("kernels", "ok", "runs on new (sm_130)"),
    ),
    "GPU without a kernel": (
        {
            "devices": {"gpus": [{"name": "RTX 5090", "capability": [12, 0], "memory": 1}]},
            "libraries": [{"kind": "cu13", "path": "C:\\env\\cu13.dll", "sass": [89], "ptx": []}],
        },
        *("kernels", "problem", "TORCH_CUDA_ARCH_LIST=120"),
    ),
    "only the other library has one": (
        {"library": {"path": "C:\\env\\cu12.dll"}},
        *("kernels", "problem", "nothing in it runs on RTX 4070 (sm_89)"),
    ),
    "torch without a kernel": (
        {"devices": {"architectures": ["sm_90", "compute_90"]}},
        *("torch's kernels", "problem", "torch itself has no kernels for RTX 4070"),
    ),
    "library refused": (
        {"library": {"error": "NativeError: Found: x. To do: reinstall it."}},
        *("native library", "problem", "reinstall it."),
    ),
    "library of another version": (
        {"library": {"version": "2.3.2+native.0"}},
        *("native library", "problem", "the Python files are of 2.3.2+native.1"),
    ),
    "library crashed": (
        {"library": {"error": "the process died by signal 4"}},
        *("native library", "problem", "signal 4"),
    ),
    "upstream": (
        only_package(version="2.3.2.post1", ours=False),
        *("packages", "problem", "--force-reinstall"),
    ),
    "file missing": (only_package(missing=["a.py", "b.py"]), "packages", "problem", "and 1 more"),
    "file changed": (only_package(changed=["a.py"]), "packages", "problem", "not what pip"),
    "strangers": ({"packages": {"strangers": ["x.py"]}}, "packages", "problem", "x.py"),
    "twice": (
        {"packages": {"distributions": 2 * MACHINE["packages"]["distributions"]}},
        *("packages", "problem", "is there twice"),
    ),
    "source tree": ({"packages": {"distributions": []}}, "packages", "note", "source tree"),
    "foreign module": (
        {"packages": {"modules": {"selective_scan_cuda": [{"file": "s.pyd", "ours": False}]}}},
        *("modules", "problem", "s.pyd"),
    ),
    "a second one behind": (
        {
            "packages": {
                "modules": {
                    "mamba_ssm": [{"file": "a", "ours": True}, {"file": "b", "ours": False}]
                }
            }
        },
        *("modules", "warning", "behind ours: b"),
    ),
    "triton": ({"packages": {"triton": "3.5.0"}}, "Triton", "ok", "3.5.0, not used"),
    "variable": ({"variables": {"MAMBA_CPU_ISA": "sse2"}}, "variables", "note", "sse2"),
    "x86 prompt": (
        {"variables": {"VSCMD_ARG_TGT_ARCH": "x86"}},
        *("compiler", "warning", "x64 Native Tools"),
    ),
    "plain prompt": ({"build": {"cl": None}}, "compiler", "note", "not on PATH"),
    "no Visual Studio": (
        {"build": {"cl": None, "visual_studio": [], "vswhere": "vswhere.exe: not found"}},
        *("compiler", "note", "vswhere.exe: not found"),
    ),
    "Visual Studio 2026 for CUDA 13.0": (
        {"build": {"cl": {"path": "cl", "version": "19.50.35717"}}},
        *("compiler for CUDA", "warning", "14.44 of Visual Studio 2022"),
    ),
    "the older of two for CUDA 13.0": (
        {"build": {"cl": None}},
        *("compiler for CUDA", "ok", "14.20 to below 14.50"),
    ),
    "g++ too new": (GPP16, "compiler for CUDA", "warning", "g++-15"),
    "no nvcc": ({"build": {"nvcc": None}}, "CUDA toolkit", "note", "needed only to build"),
    "CUDA_HOME without nvcc": (
        {"build": {"nvcc": None, "cuda_home": None}, "variables": {"CUDA_HOME": "/opt/cuda"}},
        *("CUDA toolkit", "note", "is /opt/cuda, and no bin/nvcc"),
    ),
    "CUDA_HOME unset": ({"build": {"cuda_home": None}}, "CUDA toolkit", "note", "set CUDA_HOME"),
    "another CUDA major": (
        {"torch": {"cuda": "12.8"}},
        *("CUDA toolkit", "warning", "does not load into it"),
    ),
    "no ninja": ({"build": {"ninja": None}}, "build tools", "note", "pip install ninja"),
    "old CMake": (
        {"build": {"cmake": {"path": "cmake", "version": "3.22.1"}}},
        *("build tools", "warning", "older than 3.25"),
    ),
    "architectures": (
        {"variables": {"TORCH_CUDA_ARCH_LIST": "native;9.0+PTX"}},
        *("TORCH_CUDA_ARCH_LIST", "ok", "89-real;90"),
    ),
    "architecture that is gone": (
        {"variables": {"TORCH_CUDA_ARCH_LIST": "6.1 8.6"}},
        *("TORCH_CUDA_ARCH_LIST", "warning", "6.1: the kernels need 75"),
    ),
    "flags": (
        {"variables": {"NVCC_APPEND_FLAGS": "-v"}},
        *("build variables", "note", "NVCC_APPEND_FLAGS=-v"),
    ),
    "little memory": (
        {"build": {"memory": {"total": 2**34, "available": 6 * 2**30}}},
        *("memory to compile", "warning", "MAX_JOBS=6"),
    ),
    "little memory, few jobs": (
        {
            "build": {"memory": {"total": 2**34, "available": 6 * 2**30}},
            "variables": {"MAX_JOBS": "4"},
        },
        *("memory to compile", "ok", "4 jobs"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_fact_changed(name):
    changes, check, verdict, words = CASES[name]
    row = verdicts(changed(MACHINE, changes))[check]
    assert row.verdict == verdict and row.found != checks.UNEXAMINED, row
    assert words in f"{row.found} {row.cause} {row.cure}"


@pytest.mark.parametrize(
    "topic", ["torch", "driver", "libraries", "packages", "build", "python", "library"]
)
def test_a_topic_that_could_not_be_collected(topic):
    """Its rows say so or do without; the others are those of the whole machine."""
    whole = verdicts(MACHINE)
    rows = verdicts({**MACHINE, topic: {"error": "OSError: strange"}})
    assert any(row.verdict in ("warning", "problem") for row in rows.values())
    untouched = [check for check, row in rows.items() if row == whole.get(check)]
    assert len(untouched) >= 6


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_process_that_ended_early(stages):
    """The stages after the crash are absent."""
    facts = copy.deepcopy(MACHINE)
    for stage in ("torch", "devices", "library")[stages:]:
        del facts[stage]
    facts[("torch", "devices", "library")[stages]] = {"error": "the process died by signal 11"}
    rows = verdicts(facts)
    assert "problem" in {row.verdict for row in rows.values()}
    assert "signal 11" in " ".join(row.cause for row in rows.values())


def test_every_check_was_seen_to_complain():
    complained = {check for _, check, verdict, _ in CASES.values() if verdict != "ok"}
    every = set(verdicts(changed(MACHINE, {"variables": {"CXX": "g++", "PYTHONPATH": "p"}})))
    assert every - complained == {"Triton"}
