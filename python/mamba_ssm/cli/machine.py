"""What a measurement was taken on, and how much memory is left there."""

import ctypes
import json
import os
import platform
import re
import sys
from pathlib import Path

import torch

from mamba_ssm._version import __version__
from mamba_ssm.native import ops


def describe(device):
    """A dict for JSON: device, processor, cores, threads, free memory in bytes, versions, the loaded library."""
    description = {
        "device": str(device),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "free_bytes": free_memory(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "mamba_ssm": __version__,
        "library": json.loads(ops.native_info()),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["capability"] = f"{properties.major}.{properties.minor}"
    return description


def chip(description):
    """Such a dict's GPU, or processor with threads and instruction set."""
    if "gpu" in description:
        return description["gpu"]
    threads = description["threads"]
    plural = "s" if threads > 1 else ""
    return (
        f"{description['processor']}, {threads} thread{plural}, {description['library']['cpu_isa']}"
    )


def in_a_line(description):
    """Such a dict for people."""
    return (
        f"{chip(description)}; {description['platform']}; Python {description['python']}, "
        f"torch {description['torch']}, mamba_ssm {description['mamba_ssm']}"
    )


def processor():
    """The processor's name as its maker spells it, with what tells models of one name apart."""
    if sys.platform == "win32":
        import winreg

        path = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as key:
            name = winreg.QueryValueEx(key, "ProcessorNameString")[0].strip()
        return f"{name}, {platform.processor()}"
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    if len(fields) < 3:  # not x86
        return fields.get("model name") or platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


def free_memory(device):
    """Bytes that a program can still take on the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free to us
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "win32":
        return _free_on_windows()
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)[1]) * 1024


def _free_on_windows():
    class MemoryStatus(ctypes.Structure):  # MEMORYSTATUSEX
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("all", "free", "page_all", "page_free", "own_all", "own_free", "extended")
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise ctypes.WinError()
    return status.free
