"""The installed CMake package: what find_package(mamba_native) gives a C++ program without torch."""

import os
import re
import shutil
import subprocess
from math import exp
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command):
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = os.environ.get("MAMBA_TEST_BUILD")
    if build is None:
        pytest.skip("MAMBA_TEST_BUILD names no build to install; scripts/test.py sets it")
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build, "--prefix", prefix)
    consumer = tmp_path_factory.mktemp("consumer")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(
        *("cmake", "-S", ROOT / "tests" / "package", "-B", consumer, *generator),
        *(f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"),
    )
    run("cmake", "--build", consumer)
    suffix = ".exe" if os.name == "nt" else ""
    return next(consumer.rglob(f"scan_without_torch{suffix}"))


def test_a_program_without_torch_scans(program):
    # A = -1, delta = 1/2, u = B = C = 1, d_state = 16: h[t] = e^-1/2 h[t-1] + 1/2, y = 16 h.
    first, last = map(float, re.findall(r"= ([\d.]+)", run(program)))
    assert first == pytest.approx(8.0, abs=1e-4)
    assert last == pytest.approx(8.0 / (1.0 - exp(-0.5)), abs=1e-3)
