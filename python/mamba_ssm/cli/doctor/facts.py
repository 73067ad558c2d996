"""All that doctor knows about a machine, as plain data: what --json prints and what the checks judge."""

import os
import platform
import re
import shutil
import struct
import sys
from pathlib import Path

from mamba_ssm._version import __version__
from mamba_ssm.cli.doctor import fatbin, packages, probe, toolchain
from mamba_ssm.native import loader

# what users set, and what decides a run or a build
VARIABLES = (
    *("MAMBA_NATIVE_LIBRARY", "MAMBA_CPU_ISA", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"),
    *("CUDA_HOME", "CUDA_PATH", "CUDACXX", "CUDAHOSTCXX", "CXX", "CL"),
    *(
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
        "TORCH_CUDA_ARCH_LIST",
        "NVCC_THREADS",
        "MAX_JOBS",
    ),
    *("MM_DISABLE_BF16", "MM_DISABLE_HALF", "DISTUTILS_USE_SDK", "VSCMD_ARG_TGT_ARCH"),
)


def collect():
    """{topic: facts}. Takes as long as importing torch does."""
    package = Path(loader.__file__).parents[1]
    return {
        "package": {"version": __version__, "folder": str(package)},
        "system": _system(),
        "python": _python(),
        **tried(probe.ask),
        "minimum_torch": ".".join(map(str, loader.MINIMUM_TORCH)),
        "driver": tried(_driver),
        "libraries": tried(_libraries, package / "native"),
        "packages": tried(packages.collect, package),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "build": tried(_build),
    }


def tried(collect, *arguments):
    """What it collects, or {"error"}: a machine that nobody thought of must not hide the other facts."""
    try:
        return collect(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _system():
    release = platform.release()
    wsl = None
    if sys.platform == "linux" and "microsoft" in release.lower():
        wsl = 2 if "wsl2" in release.lower() or Path("/dev/dxg").exists() else 1
    return {
        "name": platform.platform(),
        "os": {"win32": "windows", "linux": "linux"}.get(sys.platform, sys.platform),
        "machine": platform.machine(),
        "wsl": wsl,
    }


def _python():
    places = f"{sys.executable}|{sys.base_prefix}".lower()
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "bits": 8 * struct.calcsize("P"),
        "store": bool(re.search(r"[\\/]windowsapps[\\/]", places)),
    }


def _libraries(folder):
    """[{"kind", "path", "sass", "ptx"}]; one that the user names is the only one that counts."""
    override = os.environ.get(loader.OVERRIDE)
    paths = {"override": Path(override)} if override else loader.libraries(folder)
    rows = []
    for kind, path in paths.items():
        sass, ptx = fatbin.architectures(path) if path.is_file() else ([], [])
        rows.append({"kind": kind, "path": str(path), "sass": sass, "ptx": ptx})
    return rows


def _driver():
    """What nvidia-smi says: without torch, and where torch finds nothing."""
    smi = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if not smi:
        return {"version": None, "cuda": None, "gpus": [], "error": "nvidia-smi is not installed"}
    query = "--query-gpu=name,driver_version,compute_cap"
    status, output = toolchain.run([smi, query, "--format=csv,noheader"])
    if status:
        return {"version": None, "cuda": None, "gpus": [], "error": output.strip()[:500]}
    rows = [line.split(", ") for line in output.splitlines() if line.count(", ") == 2]
    _, overview = toolchain.run([smi])
    cuda = re.search(r"CUDA (?:\w+ )?Version: *([\d.]+)", overview)
    gpus = [
        {"name": name, "capability": [int(part) for part in capability.split(".")]}
        for name, _, capability in rows
    ]
    version = rows[0][1] if rows else None
    return {"version": version, "cuda": cuda and cuda[1], "gpus": gpus, "error": None}


def _tool(name, pattern, *arguments):
    """{"path", "version"} of a program, None without it."""
    path = shutil.which(name)
    if not path:
        return None
    _, output = toolchain.run([path, *arguments])
    version = re.search(pattern, output)
    return {"path": path, "version": version and version[1]}


def _build():
    """What those need who compile; a wheel's users need none of it."""
    windows = sys.platform == "win32"
    found, said = toolchain.installations() if windows else ([], "")
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = toolchain.find_nvcc("CUDA_HOME", "CUDA_PATH")
    return {
        "cl": _tool("cl", r"(\d+\.\d+\.\d+)") if windows else None,
        "visual_studio": [
            {"name": one.name, "folder": str(one.folder), "toolsets": one.toolsets} for one in found
        ],
        "vswhere": said,
        "gcc": None if windows else _tool(_gcc(), r"(\d+\.\d+\.\d+)", "-dumpfullversion"),
        "cuda_home": cuda_home if cuda_home and Path(cuda_home).is_dir() else None,
        "nvcc": nvcc and _nvcc(nvcc),
        "cmake": _tool("cmake", r"(\d+\.\d+[.\d]*)", "--version"),
        "ninja": _tool("ninja", r"(\d+\.\d+[.\d]*)", "--version"),
        "memory": _memory(),
        "cpus": os.cpu_count(),
    }


def _gcc():
    """The g++ that a build would take: the variables may name clang++, or a command with arguments."""
    named = [os.environ.get(name, "") for name in ("CUDAHOSTCXX", "CXX")]
    return next((name for name in named if re.search(r"(^|[/-])g\+\+(-[\d.]+)?$", name)), "g++")


def _nvcc(nvcc):
    _, said = toolchain.run([nvcc, "--version"])
    release = re.search(r"release ([\d.]+)", said)
    _, listed = toolchain.run([nvcc, "--list-gpu-arch"])
    header = toolchain.host_config(nvcc)
    msc = toolchain.accepted_msc(header)
    return {
        "path": nvcc,
        "version": release and release[1],
        "architectures": sorted(map(int, re.findall(r"compute_(\d+)", listed))),
        "msc": [msc.start, msc.stop],
        "gcc": toolchain.accepted_gcc(header),
    }


def _memory():
    """{"total", "available"} in bytes, None where the system does not say."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    kib = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return {"total": 1024 * kib["MemTotal"], "available": 1024 * kib["MemAvailable"]}


def _windows_memory():
    import ctypes

    # MEMORYSTATUSEX: its size, the load, then total and free physical memory and five more
    status = struct.pack("<II7Q", 64, 0, *[0] * 7)
    buffer = ctypes.create_string_buffer(status, len(status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(buffer):
        return None
    _, _, total, available, *_ = struct.unpack("<II7Q", buffer.raw)
    return {"total": total, "available": available}
