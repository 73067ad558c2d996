"""What the scripts share: a virtual environment, torch, build tools, and the build itself."""

import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from contextlib import contextmanager
from pathlib import Path

import _visual_studio as visual_studio

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = sys.platform == "win32"
TORCH = "2.13.0"
XSIMD_WHEEL = "pythran==0.19.0"  # carries the headers of xsimd 14.1.0
CMAKE_MINIMUM = (3, 25)


@contextmanager
def leg(name):
    """Prints how long a part took, failed or not."""
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    try:
        yield
    finally:
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


def run(command, **options):
    """Prints and runs a command in the repository; a failure ends the script with its status."""
    command = [str(part) for part in command]
    print("$ " + subprocess.list2cmdline(command), flush=True)
    status = subprocess.run(command, cwd=ROOT, **options).returncode
    if status:
        sys.exit(status)


def environment_python():
    """The Python of .venv, made on first use."""
    if WINDOWS:
        visual_studio.check_python()
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if WINDOWS else "bin/python")
    if not python.is_file():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    return python


def pip_install(python, *arguments):
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def cuda_major():
    """Major version of nvcc if this machine has it and a GPU to run the kernels on, else None."""
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.environ.get("CUDA_PATH", "") + "/bin"
    )
    gpu = shutil.which("nvidia-smi")
    if not nvcc or not gpu or subprocess.run([gpu, "-L"], capture_output=True).returncode:
        return None
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return int(version.split("release ")[1].split(".")[0])


def default_preset(cuda):
    return ("x64-" if WINDOWS else "linux-") + ("release" if cuda else "cpu")


def install_torch(python, wanted, cuda):
    """wanted: a version (2.13.0) or a specifier (>=2.10). cuda: nvcc's major, None for the CPU."""
    specifier = f"=={wanted}" if wanted[0].isdigit() else wanted
    build = {None: "cpu", 12: "cu126"}.get(cuda, "cu130")
    # PyPI's torch has CUDA on Linux and none on Windows; torch's own index has every build. PyPI
    # serves where that cannot be reached.
    index = f"https://download.pytorch.org/whl/{build}"
    requirement = f"torch{specifier}"
    pip_install(python, requirement, "--no-deps", "--extra-index-url", index, "--retries", "1")
    pip_install(python, requirement, "numpy")


def install_build_tools(python):
    packages = ["scikit-build-core"]
    if not shutil.which("ninja"):
        packages.append("ninja")
    if _cmake_version() < CMAKE_MINIMUM:
        packages.append("cmake")
    pip_install(python, *packages)


def _cmake_version():
    cmake = shutil.which("cmake")
    if cmake is None:
        return (0,)
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in text.split()[2].split("-")[0].split(".")[:2])


def _xsimd_headers(python):
    """Folder of xsimd's headers: MAMBA_XSIMD_DIR, or taken out of a wheel that carries them."""
    given = os.environ.get("MAMBA_XSIMD_DIR")
    if given:
        return given
    folder = ROOT / "build" / "xsimd"
    headers = folder / "pythran"
    if not (headers / "xsimd" / "xsimd.hpp").is_file():
        download = [
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        run([*download, "--only-binary", ":all:", "--dest", folder, XSIMD_WHEEL])
        with zipfile.ZipFile(next(folder.glob("pythran-*.whl"))) as wheel:
            wheel.extractall(
                folder, [n for n in wheel.namelist() if n.startswith("pythran/xsimd/")]
            )
    return str(headers)


def build_environment(python, preset=""):
    """Variables for cmake: the tools of .venv first, a compiler, xsimd, ccache if there is one."""
    env = dict(os.environ)
    if WINDOWS:
        env = visual_studio.environment(env, preset)
    path = next(name for name in env if name.upper() == "PATH")
    env[path] = str(python.parent) + os.pathsep + env[path]
    env["MAMBA_XSIMD_DIR"] = _xsimd_headers(python)
    if shutil.which("ccache"):
        env.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", "ccache")
        env.setdefault("CMAKE_CUDA_COMPILER_LAUNCHER", "ccache")
    return env


def tool(name, env):
    return shutil.which(name, path=env.get("PATH") or env.get("Path"))


def configure(python, env, preset, *definitions):
    run(
        [tool("cmake", env), "--preset", preset, f"-DPython_EXECUTABLE={python}", *definitions],
        env=env,
    )


def build(env, preset, *arguments):
    run([tool("cmake", env), "--build", "--preset", preset, *arguments], env=env)


def newest(pattern):
    """The newest file below the repository that matches, or None."""
    return max(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)
