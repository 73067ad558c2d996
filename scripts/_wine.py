"""A Windows to test on where there is none: Wine, with CPython 3.11 and torch for Windows from PyPI.

What is downloaded and unpacked stays in MAMBA_WINDOWS_CACHE (default ~/.cache/mamba_native/windows, 2 GB);
the Python that a test run installs into is a copy of the one there.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from contextlib import contextmanager
from pathlib import Path

import _bootstrap as bootstrap

GCC, OBJDUMP = "x86_64-w64-mingw32-g++-posix", "x86_64-w64-mingw32-objdump"
WINE = "/usr/lib/wine/wine64"  # not the wrapper `wine`, which asks for a 32-bit Wine
APT = "g++-mingw-w64-x86-64-posix wine64 ninja-build libgtest-dev"
PYTHON = (3, 11)
LAUNCHER = bootstrap.ROOT / "tests" / "windows" / "python.cpp"
TORCH_FLOOR = "2.10.0"  # the oldest torch that the wheel promises to run on
TORCH_BELOW = "2.9.1"  # one that is too old, for the command that says so

# It carries python311.dll and the standard library's extension modules, for its own packager.
PANDA3D = "panda3d==1.10.16"
# Microsoft's C++ runtime: Wine 8's own loses its way when torch throws thousands of exceptions.
RUNTIME = "msvc-runtime==14.44.35112"
RUNTIME_DLLS = ("msvcp140", "msvcp140_1", "vcruntime140", "vcruntime140_1")
PACKAGES = (
    *("pip", "pytest", "expecttest", "hypothesis", "psutil", "pefile", "tqdm", "matplotlib"),
    "pytest-xdist",
    "cmake==3.31.6",  # 4.4 is silent under Wine 8
    "numpy==1.26.4",  # 2.x calls a function of ucrtbase.dll that Wine 8 lacks
    # torch's needs, and colorama, which pip on this machine does not know that Windows needs
    *("typing_extensions", "sympy", "networkx", "jinja2", "filelock", "fsspec", "setuptools"),
    "colorama",
)
FOR_WINDOWS = (
    *("--only-binary", ":all:", "--platform", "win_amd64", "--python-version", "3.11"),
    *("--implementation", "cp", "--abi", "cp311"),
)


def cache():
    given = os.environ.get("MAMBA_WINDOWS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "mamba_native" / "windows"


def base():
    """Folder of the Python that python_base makes; what goes into it is part of its name."""
    contents = repr((PANDA3D, RUNTIME, RUNTIME_DLLS, PACKAGES)).encode()
    return cache() / f"python-{hashlib.sha256(contents + LAUNCHER.read_bytes()).hexdigest()[:8]}"


def check_tools():
    missing = [tool for tool in (GCC, WINE) if not shutil.which(tool)]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}. On Debian or Ubuntu: apt-get install {APT}")
    if sys.version_info[:2] != PYTHON:
        sys.exit(
            f"python {sys.version.split()[0]} runs this script; Python for Windows is put together "
            f"from the standard library of a {'.'.join(map(str, PYTHON))}, so run it with that one"
        )


@contextmanager
def made(folder):
    """Yields an empty folder to fill, which becomes `folder`; None where that exists already."""
    if folder.is_dir():
        yield None
        return
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def pip(python, command, *arguments):
    bootstrap.run(
        [python, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments]
    )


def torch(python, version):
    """Folder with torch, torchgen, functorch and their metadata, of the wheel for Windows."""
    with made(cache() / f"torch-{version}") as folder:
        if folder:
            wheels = cache() / "wheels"
            shutil.rmtree(wheels, ignore_errors=True)
            pip(
                python, "download", "--no-deps", *FOR_WINDOWS, "--dest", wheels, f"torch=={version}"
            )
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
            shutil.rmtree(wheels)
    return cache() / f"torch-{version}"


def wheel_files(python, requirement, place):
    """(name, bytes) of the files in a wheel for Windows whose path contains `place`."""
    wheels = cache() / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip(python, "download", "--no-deps", *FOR_WINDOWS, "--dest", wheels, requirement)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in archive.namelist():
            if place in path and not path.endswith("/"):
                yield Path(path).name, archive.read(path)


def forwarder(library, name):
    """Makes python3.dll, which extensions of the limited API link to: every name goes to `library`."""
    report = subprocess.run([OBJDUMP, "-p", library], capture_output=True, text=True, check=True)
    exports = re.findall(r"^\s+\[ *\d+\].* (_?Py\w+)$", report.stdout, re.MULTILINE)
    definition = name.with_suffix(".def")
    lines = ["EXPORTS", *(f"{export}={library.stem}.{export}" for export in exports)]
    definition.write_text("\n".join(lines), encoding="ascii")
    bootstrap.run([GCC, "-shared", "-nostdlib", "-Wl,--entry,0", definition, "-o", name])
    definition.unlink()


def python_base(python):
    """Folder of a Python for Windows with what torch and the tests need, but without torch."""
    with made(base()) as folder:
        if folder:
            (folder / "DLLs").mkdir()
            for name, data in wheel_files(python, PANDA3D, "deploy_libs/"):
                if not name.lower().startswith(("api-ms-", "vcruntime", "tcl86t", "tk86t")):
                    home = folder if name == "python311.dll" else folder / "DLLs"
                    (home / name).write_bytes(data)
            for name, data in wheel_files(python, RUNTIME, "/Scripts/"):
                if name.removesuffix(".dll") in RUNTIME_DLLS:
                    (folder / name).write_bytes(data)
            # the modules in Python are the same on every platform
            left_out = shutil.ignore_patterns(
                *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "config-3*"),
                *("test", "tests", "idlelib", "ensurepip"),
            )
            shutil.copytree(sysconfig.get_path("stdlib"), folder / "Lib", ignore=left_out)
            exe = folder / "python.exe"
            bootstrap.run([GCC, "-std=c++17", "-O1", "-municode", "-static", LAUNCHER, "-o", exe])
            forwarder(folder / "python311.dll", folder / "python3.dll")
            for_environments = folder / "Lib" / "venv" / "scripts" / "nt"  # where venv looks
            for_environments.mkdir(parents=True, exist_ok=True)
            shutil.copy(exe, for_environments)
            packages = folder / "Lib" / "site-packages"
            pip(python, "install", "--no-compile", *FOR_WINDOWS, "--target", packages, *PACKAGES)
    return base()


def python_home(python, version, folder):
    """A fresh Python for Windows in `folder`, with that torch. Returns its python.exe."""
    libraries = torch(python, version)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(python_base(python), folder)
    for path in libraries.iterdir():
        (folder / "Lib" / "site-packages" / path.name).symlink_to(path)
    return folder / "python.exe"


def windows_path(path):
    """How a program under Wine names a path of this machine."""
    return "Z:" + str(path).replace("/", "\\")


def run(command, env):
    """Runs a Windows program in the repository, without input; returns its exit status.

    Its output goes through a pipe: Python for Windows does not start under Wine with a file of this
    machine as its standard output.
    """
    started = subprocess.Popen(
        [WINE, *command],
        cwd=bootstrap.ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    for line in started.stdout:
        print(line, end="", flush=True)
    return started.wait()


@contextmanager
def fixed_addresses():
    """What starts in here has its memory at the same addresses each time.

    Where Linux puts it at random, one start in 5000 under Wine 8 finds taken the address that Windows' shared
    data must have, and CreateProcess fails with "[WinError 1359] Internal error".
    """
    personality = ctypes.CDLL(None).personality
    query, no_randomize = 0xFFFFFFFF, 0x0040000  # linux/personality.h
    before = personality(query)
    if personality(before | no_randomize) == -1:
        print("addresses stay random here: a process in 5000 will fail to start under Wine")
    try:
        yield
    finally:
        personality(before)


@contextmanager
def environment(env):
    """env with a Wine that suits tests; its PATH has cmake. Nothing is written to ~/.wine."""
    cmake = base() / "Lib" / "site-packages" / "cmake" / "data" / "bin"
    env = dict(
        env,
        WINEPREFIX=str(cache() / "prefix"),
        WINEDEBUG="-all",
        # a crash ends the process instead of waiting in a debugger
        WINEDLLOVERRIDES="mscoree,mshtml,winedbg.exe=;" + ",".join(RUNTIME_DLLS) + "=n,b",
        WINEPATH=windows_path(cmake),
        KMP_AFFINITY="disabled",  # else libiomp5md.dll calls a NUMA function that Wine 8 lacks
    )
    env.pop("DISPLAY", None)
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    Path(env["WINEPREFIX"]).mkdir(parents=True, exist_ok=True)
    with fixed_addresses():
        subprocess.run([WINE, "wineboot", "--init"], stdin=subprocess.DEVNULL, **quiet, check=True)
        # An idle process keeps Wine's services up; without it every test pays for their start and stop.
        idle = subprocess.Popen([WINE, "cmd"], stdin=subprocess.PIPE, **quiet)
        try:
            yield env
        finally:
            idle.stdin.close()
            idle.wait()
