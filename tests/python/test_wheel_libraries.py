"""One package with an op library per CUDA major: MAMBA_WHEEL_EXTRA_LIBS packs it, the loader picks from it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mamba_ssm
import pytest
from mamba_ssm.native import loader
from wheels import ROOT

SUFFIX = ".dll" if sys.platform == "win32" else ".so"
CPU, CU12, CU13 = (f"mamba_native_{kind}{SUFFIX}" for kind in ("cpu", "cu12", "cu13"))

needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")


def configured(folder, own, *paths):
    """What mamba_wheel_libraries says: (accepted, its words or the paths, on one line)."""
    file = folder / "script.cmake"
    quoted = " ".join(f'"{path}"' for path in paths)
    file.write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        f'include("{(ROOT / "csrc/cmake/WheelLibraries.cmake").as_posix()}")\n'
        f'mamba_wheel_libraries(out "{own}" {quoted})\n'
        'message("${out}")\n',
        encoding="utf-8",
    )
    command = ["cmake", "-P", file]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return result.returncode == 0, " ".join((result.stdout + result.stderr).split())


@needs_cmake
@pytest.mark.parametrize("suffix", [".so", ".dll"])
def test_libraries_of_other_builds_are_taken(tmp_path, suffix):
    paths = [tmp_path / f"mamba_native_{kind}{suffix}" for kind in ("cu12", "cpu")]
    for path in paths:
        path.touch()
    given = (paths[0].as_posix(), paths[1].name)  # relative paths too
    good, output = configured(tmp_path, f"mamba_native_cu13{suffix}", *given)
    assert good, output
    assert output == ";".join(path.as_posix() for path in paths)


@needs_cmake
def test_none_is_fine(tmp_path):
    assert configured(tmp_path, "mamba_native_cu13.so") == (True, "")


@needs_cmake
@pytest.mark.parametrize(
    "given, words",
    [
        ("mamba_native_cu13.so", "the name of the library that this build makes"),
        ("mamba_native_cu12.dll", "does not fit into this wheel"),
        ("mamba_native_cu11.so", "one each of mamba_native_cpu.so, mamba_native_cu12.so"),
        ("libmamba_native.a", "does not fit into this wheel"),
        ("missing/mamba_native_cu12.so", "does not exist; build it first"),
        ("folder/mamba_native_cu12.so", "does not exist; build it first"),
    ],
)
def test_what_the_loader_would_not_find_is_refused_at_configure(tmp_path, given, words):
    (tmp_path / "folder" / "mamba_native_cu12.so").mkdir(parents=True)
    (tmp_path / Path(given).name).touch()
    good, output = configured(tmp_path, "mamba_native_cu13.so", given)
    assert not good
    assert "MAMBA_WHEEL_EXTRA_LIBS" in output and given in output and words in output


@needs_cmake
def test_two_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mamba_native_cu12.so").touch()
    paths = ("a/mamba_native_cu12.so", "b/mamba_native_cu12.so")
    good, output = configured(tmp_path, "mamba_native_cu13.so", *paths)
    assert not good and "b/mamba_native_cu12.so does not fit" in output


def native_library():
    path = loader.load()
    assert path is not None, "another library had registered the operations already"
    return path


def xsimd_headers():
    """The folder that the tested build used, or that the user names."""
    if build := os.environ.get("MAMBA_TEST_BUILD"):
        cache = Path(build, "CMakeCache.txt").read_text(encoding="utf-8")
        return re.search(r"^MAMBA_XSIMD_DIR:\w+=(.*)$", cache, re.MULTILINE)[1]
    return os.environ.get("MAMBA_XSIMD_DIR", "")


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_cmake
@pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not on PATH")
@pytest.mark.skipif(
    sys.platform == "win32" and "VSCMD_ARG_TGT_ARCH" not in os.environ,
    reason="configuring needs a developer prompt",
)
def test_the_wheel_carries_both(tmp_path):
    """Configures for real, then does what target wheel does; the libraries come ready-made."""
    pytest.importorskip("scikit_build_core")
    build, stage = tmp_path / "build", tmp_path / "stage"
    other = tmp_path / CU12
    shutil.copy(native_library(), other)
    options = {"CUDA": "OFF", "TESTS": "OFF", "BENCH": "OFF", "WHEEL_EXTRA_LIBS": other}
    options["XSIMD_DIR"] = xsimd_headers()
    run(
        *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-DMAMBA_{name}={value}" for name, value in options.items()),
    )
    shutil.copy(native_library(), build / "csrc" / "torch" / CPU)
    for part in ("native", "python"):
        run("cmake", "--install", build, "--prefix", stage, "--component", f"wheel_{part}")
    run(sys.executable, ROOT / "csrc" / "cmake" / "mamba_wheel.py", stage, tmp_path / "dist")

    (wheel,) = (tmp_path / "dist").glob("mamba_ssm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        native = [name for name in archive.namelist() if name.endswith(SUFFIX)]
    assert sorted(native) == [f"mamba_ssm/native/{name}" for name in (CPU, CU12)]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package that holds this machine's library under both majors' names."""
    folder = tmp_path_factory.mktemp("both majors")
    ignored = shutil.ignore_patterns("__pycache__", "mamba_native_*")
    shutil.copytree(Path(mamba_ssm.__file__).parent, folder / "mamba_ssm", ignore=ignored)
    for name in (CU12, CU13):
        shutil.copy(native_library(), folder / "mamba_ssm" / "native" / name)
    return folder / "mamba_ssm"


@pytest.mark.parametrize(
    "cuda, expected",
    [("12.8", CU12), ("13.0", CU13), (None, CU13), ("11.8", None)],
    ids=["cuda12", "cuda13", "cpu", "cuda11"],
)
def test_torch_of_each_major_gets_its_own_library(package, cuda, expected):
    code = f"""
import torch
torch.version.cuda = {cuda!r}
from mamba_ssm.native import loader
try:
    print(loader.load())
    print(torch.ops.mamba_native.selective_scan_forward.default)
except loader.NativeError as error:
    print(error)
"""
    env = {key: value for key, value in os.environ.items() if key != loader.OVERRIDE}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, *rest = result.stdout.splitlines()
    if expected:
        assert Path(first) == package / "native" / expected
        assert rest == ["mamba_native.selective_scan_forward.default"]
    else:
        for words in ("Found: cu12, cu13", "Expected: cu11 or cpu", "built for CUDA 11.8", "To do"):
            assert words in first
