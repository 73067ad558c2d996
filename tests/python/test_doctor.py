"""`python -m mamba_ssm doctor` on machines that are made here: what it says, and its exit status.

Each runs in a process of its own that finds a copy of the package first, so that nothing beside it counts.
"""

import importlib.machinery
import io
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import mamba_ssm
import pytest
import torch
from mamba_ssm.cli.doctor import report
from mamba_ssm.cli.doctor.checks import Row
from mamba_ssm.native import loader

OURS = ("MAMBA_", "CUDA", "NVCC", "PYTHON", "TORCH_CUDA", "MAX_JOBS", "CXX")
DUMMY_TORCH = """
__version__ = {version!r}
class version:
    cuda = {cuda!r}
    hip = None
class cuda:
    def is_available():
        return {gpus!r} != []
    def init():
        raise RuntimeError("No CUDA GPUs are available")
    def device_count():
        return len({gpus!r})
    def get_device_properties(index):
        class properties:
            name, major, minor = {gpus!r}[index]
            total_memory = 2**33
        return properties
    def get_arch_list():
        return ["sm_70", "sm_90"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package, without its library."""
    folder = tmp_path_factory.mktemp("site")
    left_out = shutil.ignore_patterns("__pycache__", "mamba_native_*")
    shutil.copytree(Path(mamba_ssm.__file__).parent, folder / "mamba_ssm", ignore=left_out)
    return folder


@pytest.fixture
def doctor(site, tmp_path):
    """Runs the command; `first` are folders before the package on the search path."""

    def run(*arguments, first=(), python=sys.executable, **environment):
        env = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
        env["PYTHONPATH"] = os.pathsep.join(map(str, [*first, site]))
        env["PYTHONDONTWRITEBYTECODE"] = "1"
        return subprocess.run(
            [python, "-m", "mamba_ssm", "doctor", *arguments],
            env=env | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def examined(doctor):
    """(exit status, {check: row}) of --json."""

    def run(*arguments, **keywords):
        result = doctor("--json", *arguments, **keywords)
        assert result.stderr == "", result.stderr
        document = json.loads(result.stdout)
        assert document["status"] == result.returncode
        rows = [*document["rows"]["run"], *document["rows"]["build"]]
        return result.returncode, {row["check"]: row for row in rows}

    return run


def dummy_torch(folder, text=None, **values):
    """A folder with a package torch."""
    (folder / "torch").mkdir(parents=True)
    values = {"version": "2.11.0", "cuda": None, "gpus": []} | values
    text = DUMMY_TORCH.format(**values) if text is None else text
    (folder / "torch" / "__init__.py").write_text(text, encoding="utf-8")
    return folder


def program(folder, name, output):
    """A program for PATH that prints this, whatever it is asked."""
    if sys.platform == "win32":
        pytest.skip("makes a shell script")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_this_machine(examined):
    status, rows = examined(MAMBA_NATIVE_LIBRARY=str(loader.load()))
    assert rows["torch"]["verdict"] == "ok" and torch.__version__ in rows["torch"]["found"]
    assert rows["native library"]["verdict"] == "ok", rows["native library"]
    assert str(loader.load()) in rows["native library"]["found"]
    assert "for torch 2.10 and later" in rows["native library"]["found"]
    assert rows["Triton"]["verdict"] == "ok"
    assert status == any(row["verdict"] == "problem" for row in rows.values())


@pytest.mark.gpu
def test_the_gpu_of_this_machine_has_kernels(examined):
    _, rows = examined(MAMBA_NATIVE_LIBRARY=str(loader.load()))
    major, minor = torch.cuda.get_device_capability()
    for check in ("GPU", "kernels", "torch's kernels"):
        assert rows[check]["verdict"] == "ok", rows[check]
    assert f"sm_{major}{minor}" in rows["GPU"]["found"]
    assert torch.cuda.get_device_name() in rows["kernels"]["found"]


def test_a_venv_without_torch(examined, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    windows = sys.platform == "win32"
    python = tmp_path / "venv" / ("Scripts/python.exe" if windows else "bin/python")
    status, rows = examined(python=python)
    assert status == 1
    assert rows["torch"]["verdict"] == "problem" and rows["torch"]["found"] == "not installed"
    assert "pip install" in rows["torch"]["cure"]
    assert rows["native library"]["verdict"] == "problem"
    assert "missing" in rows["native library"]["cause"]


@pytest.mark.parametrize("content", [None, b"no library", b""], ids=["missing", "text", "empty"])
def test_a_broken_library(examined, tmp_path, content):
    path = tmp_path / "mamba_native_cpu.so"
    if content is not None:
        path.write_bytes(content)
    status, rows = examined(MAMBA_NATIVE_LIBRARY=str(path))
    row = rows["native library"]
    assert status == 1 and row["verdict"] == "problem"
    assert "could not load its native library" in row["cause"] and str(path) in row["cause"]
    assert "reinstall" in row["cure"]


def test_no_library_for_a_working_torch(examined):
    status, rows = examined()
    assert status == 1
    assert "no native library for this torch" in rows["native library"]["cause"]
    assert "wheel" in rows["native library"]["cure"]


def test_an_old_torch(examined, tmp_path):
    status, rows = examined(first=[dummy_torch(tmp_path / "old", "__version__ = '1.13.1'")])
    assert status == 1 and rows["torch"]["verdict"] == "problem"
    assert "1.13.1" in rows["torch"]["found"]
    assert 'pip install --upgrade "torch>=2.10"' in rows["torch"]["cure"]


OLD_TORCH = os.environ.get("MAMBA_TEST_OLD_TORCH")


@pytest.mark.skipif(not OLD_TORCH, reason="MAMBA_TEST_OLD_TORCH: test.py --windows brings one")
def test_a_real_old_torch(examined):
    status, rows = examined(first=[OLD_TORCH])
    assert status == 1 and rows["torch"]["verdict"] == "problem"
    assert OLD_TORCH in rows["torch"]["found"] and "--upgrade" in rows["torch"]["cure"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('[WinError 126] The specified module could not be found')", "WinError 126"),
        ("import a_module_that_is_not_there", "a_module_that_is_not_there"),
        ("import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(3)", "words"),
        ("import os; os.abort()", "the process"),
    ],
    ids=["dll", "import", "exit", "crash"],
)
def test_a_broken_torch(examined, tmp_path, code, said):
    status, rows = examined(first=[dummy_torch(tmp_path / "broken", code)])
    assert status == 1
    assert rows["torch"]["verdict"] == "problem" and rows["torch"]["found"] == "broken"
    assert said in rows["torch"]["cause"]
    assert rows["packages"] and rows["modules"] and rows["build tools"]  # the rest is there


def test_torch_without_cuda_beside_a_gpu(examined, tmp_path):
    smi = "NVIDIA GeForce RTX 4070, 581.29, 8.9\nCUDA Version: 13.0"
    path = program(tmp_path / "bin", "nvidia-smi", smi)
    status, rows = examined(first=[dummy_torch(tmp_path / "cpu")], **path)
    assert status == 1 and rows["GPU"]["verdict"] == "problem"
    assert "RTX 4070 (sm_89), driver 581.29 for CUDA up to 13.0" in rows["GPU"]["found"]
    assert "without CUDA" in rows["GPU"]["cause"] and "index-url" in rows["GPU"]["cure"]


def test_torch_with_cuda_without_a_gpu(examined, tmp_path):
    path = {} if sys.platform == "win32" else {"PATH": str(tmp_path)}
    _, rows = examined(first=[dummy_torch(tmp_path / "cuda", cuda="13.0")], **path)
    assert rows["GPU"]["verdict"] == "note"
    assert "No CUDA GPUs are available" in rows["GPU"]["cause"]


def test_a_gpu_that_is_too_old(examined, tmp_path):
    pascal = dummy_torch(tmp_path / "pascal", cuda="12.6", gpus=[("GTX 1080", 6, 1)])
    status, rows = examined(first=[pascal])
    assert status == 1
    assert "GTX 1080 is sm_61; there are kernels from sm_75" in rows["kernels"]["cause"]
    assert rows["torch's kernels"]["verdict"] == "problem"


@pytest.mark.parametrize("name", ["selective_scan_cuda", "causal_conv1d_cuda"])
def test_a_foreign_extension_first_on_the_path(examined, tmp_path, name):
    file = tmp_path / "foreign" / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    file.parent.mkdir()
    file.touch()
    status, rows = examined(first=[file.parent, dummy_torch(tmp_path / "torch_here")])
    assert status == 1 and rows["modules"]["verdict"] == "problem"
    assert rows["modules"]["found"] == name and str(file) in rows["modules"]["cause"]


def test_packages_of_upstreams_names(examined, tmp_path):
    folder = dummy_torch(tmp_path / "upstream")
    (folder / "causal_conv1d").mkdir()
    (folder / "causal_conv1d" / "__init__.py").write_text("__version__ = '1.6.1'\n")
    for name, version in (("mamba_ssm", "2.3.2.post1"), ("causal_conv1d", "1.6.1")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        header = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(header)
    status, rows = examined(first=[folder])
    assert status == 1
    assert rows["packages"]["verdict"] == "problem"
    assert "is upstream's: pip install -U replaces ours" in rows["packages"]["cause"]
    assert "pip uninstall -y causal_conv1d mamba_ssm" in rows["packages"]["cure"]
    assert rows["modules"]["verdict"] == "problem"
    assert "causal_conv1d" in rows["modules"]["cause"]


def test_a_compiler_that_is_too_new(examined, tmp_path):
    header = tmp_path / "cuda" / "include" / "crt" / "host_config.h"
    header.parent.mkdir(parents=True)
    header.write_text("#if __GNUC__ > 15\n#error -- unsupported GNU version!\n#endif\n")
    program(tmp_path / "cuda" / "bin", "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    path = program(tmp_path / "cuda" / "bin", "g++", "99.1.0")
    first = [dummy_torch(tmp_path / "torch_here")]
    _, rows = examined(first=first, **path)
    row = rows["compiler for CUDA"]
    assert row["verdict"] == "warning"
    assert row["found"] == "g++ 99; CUDA 13.0 accepts up to 15" and "g++-15" in row["cure"]
    assert "CUDA_HOME unset" in rows["CUDA toolkit"]["found"]
    assert "set CUDA_HOME" in rows["CUDA toolkit"]["cure"]
    _, rows = examined(first=first, CUDA_HOME=str(tmp_path / "cuda"), **path)
    assert rows["CUDA toolkit"]["verdict"] == "ok"


def test_redirected_output_is_plain_text(doctor, tmp_path):
    pascal = dummy_torch(tmp_path / "J\u00fcrgen", cuda="12.6", gpus=[("GTX 1080", 6, 1)])
    result = doctor(first=[pascal], PYTHONUTF8="0", PYTHONIOENCODING="cp932")
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("To run models with mamba_ssm")
    assert any(line.startswith("PROBLEM  kernels: GTX 1080 (sm_61)") for line in lines)
    assert any(line.startswith("         cause: ") for line in lines)
    assert "problems" in lines[-1] and result.stdout.isascii()


class Terminal(io.StringIO):
    def __init__(self, encoding):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return True


def test_the_table_in_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "dumb")  # no colours
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys, "stdout", Terminal("utf-8"))
    report.table("Title", [Row("GPU", "problem", "[bold]none[/bold]", "no card", "buy one")])
    text = sys.stdout.getvalue()
    assert "found, cause, cure" in text and "cure: buy one" in text
    assert "[bold]none[/bold]" in text and "\u2502" in text  # a box


def test_a_terminal_without_rich_gets_plain_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal("ascii"))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.table("Title", [Row("system", "ok", "J\u00fcrgens PC")])
    assert sys.stdout.getvalue() == "Title\nok       system: J?rgens PC\n"
