"""The C++ compilers and CUDA toolkits of this machine, and which of them fit together.

Imports nothing of the package: scripts/ loads this file by its path, before anything is installed.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

TOOLS = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
SECONDS = 180  # more than a developer prompt needs to load; nvidia-smi hangs where the driver does


def run(command):
    """(status, output) of a command; nothing else here starts a process."""
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return result.returncode, result.stdout.decode("utf-8", errors="replace")


@dataclass
class Installation:
    """A Visual Studio with C++ tools."""

    name: str
    folder: Path
    default: str  # the toolset that a prompt gets, as 14.50
    toolsets: list  # every one, newest first


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def toolset_of(version):
    """14.44.35207 -> 14.44"""
    return ".".join(version.strip().split(".")[:2])


def msc_ver(toolset):
    """14.44 is compiler 19.44, whose _MSC_VER is 1944."""
    return 1900 + numbers(toolset)[1]


def _installation(row):
    folder = Path(row["installationPath"])
    names = [path.name for path in (folder / "VC" / "Tools" / "MSVC").glob("*.*")]
    toolsets = list(dict.fromkeys(map(toolset_of, sorted(names, key=numbers, reverse=True))))
    default = folder / "VC" / "Auxiliary" / "Build" / "Microsoft.VCToolsVersion.default.txt"
    if default.is_file():
        toolset = toolset_of(default.read_text(encoding="utf-8"))
    else:
        toolset = toolsets[0] if toolsets else ""
    return Installation(row.get("displayName", folder.name), folder, toolset, toolsets)


def installations(run=run):
    """(every Visual Studio with C++ tools, newest first; what vswhere said if it failed)."""
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    query = ["-format", "json", "-utf8", "-products", "*", "-requires", TOOLS]
    status, output = run([str(vswhere), *query])
    if status:
        return [], f"{vswhere}: {output.strip()}"
    rows = json.loads(output)
    rows.sort(key=lambda row: numbers(row["installationVersion"]), reverse=True)
    return [one for one in map(_installation, rows) if one.default], ""


def find_nvcc(*variables):
    """nvcc on PATH, else below the folder that one of these variables names, else None."""
    folders = [os.environ.get(name) for name in variables]
    searched = [None, *(os.path.join(folder, "bin") for folder in folders if folder)]
    return next(filter(None, (shutil.which("nvcc", path=path) for path in searched)), None)


def host_config(nvcc, run=run):
    """The header in which a toolkit says what host compilers it takes; "" where it has none."""
    inside = Path("include", "crt", "host_config.h")
    header = Path(nvcc).parent.parent / inside
    if not header.is_file():  # a link, or a script that calls the real one
        _, output = run([nvcc, "--dryrun", "-x", "cu", os.devnull])
        top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
        header = Path(top[1].strip() if top else "", inside)
    return header.read_text(encoding="utf-8", errors="replace") if header.is_file() else ""


def accepted_msc(header):
    """The range of _MSC_VER in that header; all where it says nothing."""
    bounds = re.search(r"#if _MSC_VER < (\d+) \|\| _MSC_VER >= (\d+)", header)
    return range(int(bounds[1]), int(bounds[2])) if bounds else range(10000)


def accepted_gcc(header):
    """The newest major of g++ in that header; None where it says nothing."""
    bound = re.search(r"#if __GNUC__ > (\d+)", header)
    return int(bound[1]) if bound else None
