"""Finds Visual C++ and loads what its developer prompt sets: so the scripts work in any prompt."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WORKLOAD = 'the workload "Desktop development with C++"'
TOOLS = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
V143 = "14.44"  # the compiler that preset x64-release-v143 names
V143_TOOLS = "Microsoft.VisualStudio.Component.VC.14.44.17.14.x86.x64"
ADD_V143 = (
    'add the component "MSVC v143 - VS 2022 C++ x64/x86 build tools (v14.44-17.14)" in the Visual '
    f"Studio Installer (Modify > Individual components; its id is {V143_TOOLS})"
)
MARK = "environment: "


@dataclass
class Installation:
    name: str
    folder: Path
    default: str  # the toolset that a prompt gets, as 14.50
    toolsets: list  # every one, newest first


def run(command):
    """(status, output) of a command; nothing else here starts a process."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return 1, str(error)
    return result.returncode, result.stdout.decode("utf-8", errors="replace")


def check_python():
    """Ends the script under a Python that no build can use."""
    places = (sys.executable, sys.base_prefix)
    if any("windowsapps" in re.split(r"[/\\]", place.lower()) for place in places):
        sys.exit(
            f"{sys.executable} is the Microsoft Store's Python: other programs do not see the "
            "files that it writes, and CMake cannot run it. Install Python from python.org (winget "
            "install Python.Python.3.13) and run this again; if `python` still opens the Store, "
            "switch its alias off in Settings > Apps > Advanced app settings > App execution "
            "aliases."
        )
    if sys.maxsize < 2**32:
        sys.exit(
            f"{sys.executable} is a 32-bit Python, and torch has 64 bits. Install the Windows "
            "installer (64-bit) from python.org and run this again."
        )


def _numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)]


def _toolset(version):
    """14.44.35207 -> 14.44"""
    return ".".join(version.strip().split(".")[:2])


def _msc_ver(toolset):
    """14.44 is compiler 19.44, whose _MSC_VER is 1944."""
    return 1900 + _numbers(toolset)[1]


def _installation(row):
    folder = Path(row["installationPath"])
    names = [path.name for path in (folder / "VC" / "Tools" / "MSVC").glob("*.*")]
    toolsets = list(dict.fromkeys(map(_toolset, sorted(names, key=_numbers, reverse=True))))
    default = folder / "VC" / "Auxiliary" / "Build" / "Microsoft.VCToolsVersion.default.txt"
    if default.is_file():
        toolset = _toolset(default.read_text(encoding="utf-8"))
    else:
        toolset = toolsets[0] if toolsets else ""
    return Installation(row.get("displayName", folder.name), folder, toolset, toolsets)


def installations():
    """Every Visual Studio with C++ tools, newest first."""
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")
    vswhere = Path(programs, "Microsoft Visual Studio", "Installer", "vswhere.exe")
    query = ["-format", "json", "-utf8", "-products", "*", "-requires", TOOLS]
    status, output = run([str(vswhere), *query])
    rows = json.loads(output) if status == 0 else []
    rows.sort(key=lambda row: _numbers(row["installationVersion"]), reverse=True)
    found = [installation for installation in map(_installation, rows) if installation.default]
    if not found:
        said = f" ({vswhere}: {output.strip()})" if status else ""
        sys.exit(
            f"No Visual C++ found{said}. Install Visual Studio 2022 or newer, or its Build Tools, "
            f"with {WORKLOAD}."
        )
    return found


def find_nvcc(preset):
    """The nvcc that CMake will take for this preset, or None."""
    if preset.endswith("-cpu"):
        return None
    if preset.endswith("-cu12"):  # MAMBA_CUDA_MAJOR: the newest of that major
        minors = (re.fullmatch(r"CUDA_PATH_V12_(\d+)", name) for name in os.environ)
        newest = max((int(minor[1]) for minor in minors if minor), default=None)
        folder = os.environ.get(f"CUDA_PATH_V12_{newest}")
    else:
        nvcc = shutil.which("nvcc")
        if nvcc:
            return nvcc
        folder = os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(folder, "bin")) if folder else None


def accepted_by(nvcc):
    """The range of _MSC_VER that this CUDA takes; without CUDA, or a word in its header, all."""
    header = nvcc and Path(nvcc).parent.parent / "include" / "crt" / "host_config.h"
    if header and header.is_file():
        text = header.read_text(encoding="utf-8", errors="replace")
        bounds = re.search(r"#if _MSC_VER < (\d+) \|\| _MSC_VER >= (\d+)", text)
        if bounds:
            return range(int(bounds[1]), int(bounds[2]))
    return range(10000)


def choose(found, preset, nvcc):
    """(installation, toolset): the newest that preset and CUDA take, a prompt's default first."""
    have = ", ".join(f"{one.name} with {' and '.join(one.toolsets)}" for one in found)
    if preset.endswith("-v143"):
        for installation in found:
            if V143 in installation.toolsets:
                return installation, V143
        sys.exit(f"Preset {preset} wants compiler {V143}; found {have}. To install it, {ADD_V143}.")
    accepted = accepted_by(nvcc)
    for installation in found:
        if _msc_ver(installation.default) in accepted:
            return installation, installation.default
    for installation in found:
        for toolset in installation.toolsets:
            if _msc_ver(toolset) in accepted:
                return installation, toolset
    sys.exit(
        f"The CUDA of {nvcc} takes compilers from 14.{accepted.start - 1900} to below "
        f"14.{accepted.stop - 1900}; found {have}. Install a CUDA that takes yours (>= 13.2 takes "
        f"Visual Studio 2026), or {ADD_V143}."
    )


def load(installation, toolset):
    """The variables after vcvarsall.bat, their names in capitals."""
    script = installation.folder / "VC" / "Auxiliary" / "Build" / "vcvarsall.bat"
    call = f'call "{script}" x64 -vcvars_ver={toolset}'
    # Python prints them, in ASCII: cmd's own `set` writes in a code page that lacks some letters.
    show = f"import json, os; print('{MARK}' + json.dumps(dict(os.environ)))"
    status, output = run(f'cmd /d /s /c "{call} && "{sys.executable}" -I -c "{show}""')
    variables = parse(output)
    if status or variables.get("VSCMD_ARG_TGT_ARCH") != "x64" or not variables.get("INCLUDE"):
        shown = "\n".join(line for line in output.splitlines() if not line.startswith(MARK))
        sys.exit(
            f"{call} set up no compiler (status {status}). Repair {installation.name} in the "
            f"Visual Studio Installer, with {WORKLOAD}. It printed:\n{shown}"
        )
    return variables


def parse(output):
    """The variables, their names in capitals, from among whatever else was printed."""
    for line in output.splitlines():
        if line.startswith(MARK):
            return {name.upper(): text for name, text in json.loads(line[len(MARK) :]).items()}
    return {}


def environment(env, preset=""):
    """These variables with a compiler among them that the preset, and CUDA if it is used, take."""
    env = {name.upper(): text for name, text in env.items()}  # Windows does not tell Path from PATH
    target = env.get("VSCMD_ARG_TGT_ARCH")
    if target not in (None, "", "x64"):
        sys.exit(
            f"This prompt compiles for {target}, and torch for Windows is x64. Run this "
            'in a plain PowerShell, where it finds the compiler, or in an "x64 Native Tools '
            'Command Prompt".'
        )
    if target:
        version = env.get("VCTOOLSVERSION", "")
        if preset.endswith("-v143") and _toolset(version) != V143:
            sys.exit(
                f"Preset {preset} wants compiler {V143}, and this prompt has {version}. Run this "
                "in a plain PowerShell, where it loads that compiler."
            )
        return env  # the user's choice; CMake compares it with what CUDA takes
    installation, toolset = choose(installations(), preset, find_nvcc(preset))
    print(f"compiler: {toolset} of {installation.name}", flush=True)
    return env | load(installation, toolset)
