"""Finds Visual C++ and loads what its developer prompt sets: so the scripts work in any prompt."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path


def _toolchain():
    """The package's module, by its path: the package itself may be another one, or missing."""
    path = Path(__file__).parents[1] / "python" / "mamba_ssm" / "cli" / "doctor" / "toolchain.py"
    spec = importlib.util.spec_from_file_location("toolchain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = _toolchain()
run = toolchain.run
Installation = toolchain.Installation

WORKLOAD = 'the workload "Desktop development with C++"'
V143 = "14.44"  # the compiler that preset x64-release-v143 names
V143_TOOLS = "Microsoft.VisualStudio.Component.VC.14.44.17.14.x86.x64"
ADD_V143 = (
    'add the component "MSVC v143 - VS 2022 C++ x64/x86 build tools (v14.44-17.14)" in the Visual '
    f"Studio Installer (Modify > Individual components; its id is {V143_TOOLS})"
)
MARK = "environment: "


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


def installations():
    """Every Visual Studio with C++ tools, newest first."""
    found, said = toolchain.installations(run)
    if not found:
        sys.exit(
            f"No Visual C++ found{said and f' ({said})'}. Install Visual Studio 2022 or newer, or its "
            f"Build Tools, with {WORKLOAD}."
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
        return shutil.which("nvcc", path=os.path.join(folder, "bin")) if folder else None
    return toolchain.find_nvcc("CUDA_PATH")


def choose(found, preset, nvcc):
    """(installation, toolset): the newest that preset and CUDA take, a prompt's default first."""
    have = ", ".join(f"{one.name} with {' and '.join(one.toolsets)}" for one in found)
    if preset.endswith("-v143"):
        for installation in found:
            if V143 in installation.toolsets:
                return installation, V143
        sys.exit(f"Preset {preset} wants compiler {V143}; found {have}. To install it, {ADD_V143}.")
    accepted = toolchain.accepted_msc(toolchain.host_config(nvcc, run) if nvcc else "")
    for installation in found:
        if toolchain.msc_ver(installation.default) in accepted:
            return installation, installation.default
    for installation in found:
        for toolset in installation.toolsets:
            if toolchain.msc_ver(toolset) in accepted:
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
        if preset.endswith("-v143") and toolchain.toolset_of(version) != V143:
            sys.exit(
                f"Preset {preset} wants compiler {V143}, and this prompt has {version}. Run this "
                "in a plain PowerShell, where it loads that compiler."
            )
        return env  # the user's choice; CMake compares it with what CUDA takes
    installation, toolset = choose(installations(), preset, find_nvcc(preset))
    print(f"compiler: {toolset} of {installation.name}", flush=True)
    return env | load(installation, toolset)
