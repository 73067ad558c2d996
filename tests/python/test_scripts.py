"""The scripts: what can be told without installing anything."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _bootstrap as bootstrap  # noqa: E402
import _wine as wine  # noqa: E402


@pytest.fixture
def pip_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        bootstrap, "pip_install", lambda python, *arguments: calls.append(arguments)
    )
    return calls


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("[a-z]*.py")))
def test_help(script):
    result = subprocess.run(
        [sys.executable, SCRIPTS / script, "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"python scripts/{script}" in result.stdout


@pytest.mark.parametrize(
    ("wanted", "cuda", "requirement", "index"),
    [
        ("2.13.0", None, "torch==2.13.0", "cpu"),
        (">=2.10", 13, "torch>=2.10", "cu130"),
        ("2.11.0", 12, "torch==2.11.0", "cu126"),
    ],
)
def test_torch_that_is_asked_for(pip_calls, wanted, cuda, requirement, index):
    bootstrap.install_torch("python", wanted, cuda)
    assert all(requirement in arguments for arguments in pip_calls)
    assert any(argument.endswith(f"/whl/{index}") for argument in pip_calls[0])


@pytest.mark.parametrize(
    ("found", "cmake", "installed"),
    [
        ({"ninja"}, (3, 30), ("scikit-build-core",)),
        (set(), (3, 30), ("scikit-build-core", "ninja")),
        ({"ninja"}, (3, 22), ("scikit-build-core", "cmake")),
        (set(), (0,), ("scikit-build-core", "ninja", "cmake")),
    ],
)
def test_tools_come_from_pypi_only_where_missing(monkeypatch, pip_calls, found, cmake, installed):
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(bootstrap, "_cmake_version", lambda: cmake)
    bootstrap.install_build_tools("python")
    assert pip_calls == [installed]


@pytest.mark.parametrize(
    ("windows", "cuda", "preset"),
    [
        (True, None, "x64-cpu"),
        (True, 13, "x64-release"),
        (False, None, "linux-cpu"),
        (False, 12, "linux-release"),
    ],
)
def test_preset(monkeypatch, windows, cuda, preset):
    monkeypatch.setattr(bootstrap, "WINDOWS", windows)
    assert bootstrap.default_preset(cuda) == preset


def test_presets_exist():
    import json

    presets = json.loads((bootstrap.ROOT / "CMakePresets.json").read_text())["configurePresets"]
    names = {preset["name"] for preset in presets}
    assert {"x64-cpu", "x64-release", "linux-cpu", "linux-release", "linux-release-sm_90"} <= names


def test_a_failing_command_ends_the_script():
    with pytest.raises(SystemExit) as ended:
        bootstrap.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what runs Wine runs on Linux")
def test_addresses_under_wine_are_fixed():
    if subprocess.run(["setarch", "--addr-no-randomize", "true"]).returncode:
        pytest.skip("this machine does not let a process choose")

    def stack():
        return subprocess.check_output(["grep", "stack", "/proc/self/maps"])

    with wine.fixed_addresses():
        assert stack() == stack()
    randomized = Path("/proc/sys/kernel/randomize_va_space").read_text().strip() != "0"
    assert not randomized or stack() != stack()
