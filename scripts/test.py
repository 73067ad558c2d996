"""Builds everything and runs the C++ and Python tests.

python scripts/test.py                  # CPU, from an empty machine
python scripts/test.py --gpu            # what is built already, with the torch of this Python
python scripts/test.py --preset linux-release-sm_90 --build-only
"""

import argparse
import importlib.util
import os
import subprocess
import sys

import _bootstrap as bootstrap

PYTEST_TOOLS = ("pytest", "expecttest", "auditwheel", "tqdm", "matplotlib")


def native_library(preset):
    """The op library that the preset built, CUDA's rather than the CPU's."""
    suffix = "dll" if bootstrap.WINDOWS else "so"
    return bootstrap.newest(f"build/{preset}/**/mamba_native_cu*.{suffix}") or bootstrap.newest(
        f"build/{preset}/**/mamba_native_cpu.{suffix}"
    )


def pytest(python, env, library, *arguments):
    """Tests the package as it lies in the sources, with this library."""
    env = dict(env, MAMBA_NATIVE_LIBRARY=str(library))
    sources = str(bootstrap.ROOT / "python")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (sources, env.get("PYTHONPATH"))))
    command = [str(python), "-m", "pytest", "tests/python", "-q", *arguments]
    return subprocess.run(command, cwd=bootstrap.ROOT, env=env).returncode


def test_cpu(options):
    with bootstrap.leg("torch and tools"):
        python = bootstrap.environment_python()
        bootstrap.install_torch(python, options.torch, None)
        bootstrap.install_build_tools(python)
        bootstrap.pip_install(python, *PYTEST_TOOLS)
        env = bootstrap.build_environment(python)
    preset = options.preset or bootstrap.default_preset(None)
    with bootstrap.leg(f"build {preset}"):
        bootstrap.configure(python, env, preset)
        bootstrap.build(env, preset)
    if options.build_only:
        return 0
    with bootstrap.leg("C++ tests"):
        ctest = [bootstrap.tool("ctest", env), "--preset", preset]
        failed = subprocess.run(ctest, cwd=bootstrap.ROOT, env=env).returncode
    with bootstrap.leg("Python tests"):
        bootstrap.build(env, preset, "--target", "wheel")
        env["MAMBA_TEST_BUILD"] = str(bootstrap.ROOT / "build" / preset)
        return pytest(python, env, native_library(preset), *options.pytest) or failed


def test_gpu(options):
    """No network, no compiler: the newest library and C++ tests below build/, this Python."""
    pattern = options.preset or "*"
    library = os.environ.get("MAMBA_NATIVE_LIBRARY") or native_library(pattern)
    if not library or "_cpu." in str(library):
        sys.exit("no library with CUDA below build/; build one, or set MAMBA_NATIVE_LIBRARY to it")
    print(f"library: {library}")
    failed = 0
    tests = bootstrap.newest(f"build/{pattern}/**/mamba_tests{'.exe' if bootstrap.WINDOWS else ''}")
    if tests is None:
        print("no C++ tests below build/: left out")
    else:
        with bootstrap.leg("C++ tests"):
            failed = subprocess.run(
                [tests, "--gtest_filter=*cuda*:*Cuda*-*large*:*Large*"]
            ).returncode
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: Python tests left out")
        return failed or tests is None
    with bootstrap.leg("Python tests"):
        return pytest(sys.executable, os.environ, library, "-m", "gpu", *options.pytest) or failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="run the CUDA tests; needs no network")
    parser.add_argument("--preset", help="CMake preset to build (default: the CPU's)")
    parser.add_argument("--build-only", action="store_true", help="stop after the build")
    parser.add_argument(
        "--torch", default=bootstrap.TORCH, help="version or specifier (default: %(default)s)"
    )
    parser.add_argument(
        "pytest", nargs="*", metavar="-- PYTEST_ARGUMENT", help="passed on to pytest"
    )
    options = parser.parse_args()
    return test_gpu(options) if options.gpu else test_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
