"""The README's C++ programs: with the installed CMake package and no torch, and with LibTorch and the op library."""

import os
import re
import shutil
import subprocess
import sys
from math import exp
from pathlib import Path

import pytest
import torch
from mamba_ssm.native import loader

ROOT = Path(__file__).parents[2]
# Both scan u = B = C = 1 with A = -1, delta = 1/2 and 16 states: h[t] = e^-1/2 h[t-1] + 1/2, y = 16 h, so
FIRST, LAST = 8.0, 8.0 / (1.0 - exp(-0.5))  # up to e^-32


def run(*command):
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compiled(source, folder, prefix):
    """The program of the folder's name, built by a project of its own."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(
        *("cmake", "-S", ROOT / "tests" / source, "-B", folder, *generator),
        *(f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"),
    )
    run("cmake", "--build", folder, "--config", "Release")
    return next(folder.rglob(f"scan_with*{'.exe' if os.name == 'nt' else ''}"))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = os.environ.get("MAMBA_TEST_BUILD")
    if build is None:
        pytest.skip("MAMBA_TEST_BUILD names no build to install; scripts/test.py sets it")
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", prefix)
    return compiled("package", tmp_path_factory.mktemp("without_torch"), prefix)


def values(output, device):
    return [float(x) for x in re.findall(rf"^{device}: .*= (\S+), .*= (\S+)$", output, re.M)[0]]


def test_a_program_without_torch_scans(program):
    assert values(run(program), "cpu") == pytest.approx([FIRST, LAST], abs=1e-3)


@pytest.mark.gpu
def test_a_program_without_torch_scans_on_the_gpu(program):
    cache = Path(os.environ["MAMBA_TEST_BUILD"], "CMakeCache.txt").read_text(encoding="utf-8")
    if not re.search(r"^CMAKE_CUDA_COMPILER:", cache, re.M):
        pytest.skip("MAMBA_TEST_BUILD was built without CUDA")
    assert values(run(program), "cuda") == pytest.approx([FIRST, LAST], abs=1e-3)


@pytest.fixture(scope="module")
def libtorch_program(tmp_path_factory):
    if not shutil.which("cmake") or not shutil.which("cl" if os.name == "nt" else "c++"):
        pytest.skip("needs CMake and a C++ compiler")
    if torch.version.cuda is not None and shutil.which("nvcc") is None:
        pytest.skip("find_package(Torch) of a torch with CUDA needs the CUDA toolkit")
    return compiled("libtorch", tmp_path_factory.mktemp("libtorch"), torch.utils.cmake_prefix_path)


def test_a_program_with_libtorch_scans_and_differentiates(libtorch_program, device, monkeypatch):
    if sys.platform == "win32":  # no RPATH there
        libraries = Path(torch.__file__).parent / "lib"
        monkeypatch.setenv("PATH", f"{libraries}{os.pathsep}{os.environ['PATH']}")
    library = loader.load()
    lines = run(libtorch_program, library, device).splitlines()
    found = [[float(x) for x in re.findall(r"= (\S+?)(?:,|$)", line)] for line in lines]
    # du is y reversed: the adjoint runs back from the last step
    assert found == [pytest.approx(pair, abs=1e-3) for pair in ([FIRST, LAST], [LAST, FIRST])]


def test_a_missing_library_is_named(libtorch_program, tmp_path):
    missing = tmp_path / "missing.so"
    result = subprocess.run([libtorch_program, missing, "cpu"], capture_output=True, text=True)
    assert result.returncode == 1 and "missing.so" in result.stderr


@pytest.mark.parametrize(
    "path", ["tests/package/CMakeLists.txt", "tests/package/main.cpp", "tests/libtorch/main.cpp"]
)
def test_readme_shows_what_is_compiled(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    (part,) = re.findall(r"^(?://|#) README begins\n(.*?)^(?://|#) README ends$", text, re.M | re.S)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert part.strip("\n") in [
        block.strip("\n") for block in re.findall(r"^```\w+\n(.*?)^```$", readme, re.M | re.S)
    ]
