"""What the facts mean for those who compile: this project, or upstream's. Nothing here stops a wheel from working."""

import re

from mamba_ssm.cli.doctor import arch_list, checks, toolchain
from mamba_ssm.cli.doctor.checks import Row

V143 = "14.44 of Visual Studio 2022, which is also a component of 2026"


def compiler(facts):
    build = facts["build"]
    if facts["system"]["os"] != "windows":
        one = build["gcc"]
        if one is None:
            return Row("compiler", "note", "no g++", "needed only to build", "apt-get install g++")
        return Row("compiler", "ok", f"{one['path']} {one['version']}")
    installed = "; ".join(
        f"{one['name']} with {', '.join(one['toolsets'])}" for one in build["visual_studio"]
    )
    if build["cl"]:
        found = f"cl.exe {build['cl']['version']}; installed: {installed or 'unknown'}"
        target = facts["variables"].get("VSCMD_ARG_TGT_ARCH", "x64")
        if target != "x64":
            cure = "open the x64 Native Tools Command Prompt"
            return Row("compiler", "warning", found, f"this prompt compiles for {target}", cure)
        return Row("compiler", "ok", found)
    if installed:
        cause = "cl.exe is not on PATH: no Visual Studio is loaded in this prompt"
        cure = "open the x64 Native Tools Command Prompt; python scripts/test.py finds the compiler by itself"
        return Row("compiler", "note", installed, cause, cure)
    cause = f"no Visual C++ {build['vswhere'] and '(' + build['vswhere'] + ')'}".strip()
    cure = (
        'needed only to build: Visual Studio or its Build Tools with "Desktop development with C++"'
    )
    return Row("compiler", "note", "none", cause, cure)


def cuda(facts):
    """The toolkit, and whether builds with setup.py find it: those ask CUDA_HOME."""
    build, torch = facts["build"], facts["torch"]
    nvcc = build["nvcc"]
    if nvcc is None:
        cause = "no nvcc: needed only to build CUDA kernels"
        named = facts["variables"].get("CUDA_HOME") or facts["variables"].get("CUDA_PATH")
        if named:
            cause = f"CUDA_HOME or CUDA_PATH is {named}, and no bin/nvcc is below it"
        cure = "install the CUDA toolkit 12.8 or newer and set CUDA_HOME to its folder, or use the wheel"
        return Row("CUDA toolkit", "note", "none", cause, cure)
    found = f"{nvcc['path']} {nvcc['version']}, CUDA_HOME {build['cuda_home'] or 'unset'}"
    theirs = torch.get("cuda")
    if theirs and checks.version(theirs)[0] != checks.version(nvcc["version"])[0]:
        cause = f"torch is built for CUDA {theirs}: what this nvcc compiles does not load into it"
        cure = f"a toolkit of CUDA {checks.version(theirs)[0]}, or a torch for {nvcc['version']}"
        return Row("CUDA toolkit", "warning", found, cause, cure)
    if build["cuda_home"] is None:
        cause = "CMake finds nvcc on PATH; setup.py builds of upstream want CUDA_HOME"
        cure = "set CUDA_HOME to the folder above nvcc's bin before building upstream's packages"
        return Row("CUDA toolkit", "note", found, cause, cure)
    return Row("CUDA toolkit", "ok", found)


def host(facts):
    """The compiler against what the toolkit's own header accepts."""
    build, nvcc = facts["build"], facts["build"]["nvcc"]
    if nvcc is None:
        return None
    if build["gcc"] and nvcc["gcc"] and build["gcc"]["version"]:
        major = checks.version(build["gcc"]["version"])[0]
        found = f"g++ {major}; CUDA {nvcc['version']} accepts up to {nvcc['gcc']}"
        if major > nvcc["gcc"]:
            cause = "nvcc stops with `unsupported GNU version`"
            cure = (
                f"install g++-{nvcc['gcc']} and configure with -DCMAKE_CXX_COMPILER=g++-{nvcc['gcc']} (setup.py: CC "
                "and CXX), or take a newer CUDA"
            )
            return Row("compiler for CUDA", "warning", found, cause, cure)
        return Row("compiler for CUDA", "ok", found)
    accepted = range(*nvcc["msc"])
    if build["cl"] and build["cl"]["version"]:
        have = ["14." + build["cl"]["version"].split(".")[1]]
    else:
        have = [one for row in build["visual_studio"] for one in row["toolsets"]]
    if not have:
        return None
    fitting = [one for one in have if toolchain.msc_ver(one) in accepted]
    bounds = f"14.{accepted.start - 1900} to below 14.{accepted.stop - 1900}"
    found = f"Visual C++ {', '.join(have)}; CUDA {nvcc['version']} accepts {bounds}"
    if not fitting:
        cause = "nvcc stops with `unsupported Microsoft Visual Studio version`"
        cure = f"CUDA 13.2 or newer for Visual Studio 2026, or compiler {V143}: vcvarsall.bat x64 -vcvars_ver=14.44"
        return Row("compiler for CUDA", "warning", found, cause, cure)
    return Row("compiler for CUDA", "ok", found)


def tools(facts):
    build = facts["build"]
    have = [f"{name} {build[name]['version']}" for name in ("cmake", "ninja") if build[name]]
    missing = [name for name in ("cmake", "ninja") if not build[name]]
    found = ", ".join(have) or "none"
    if missing:
        cure = f"pip install {' '.join(missing)}"
        return Row("build tools", "note", found, f"not on PATH: {', '.join(missing)}", cure)
    if checks.version(build["cmake"]["version"]) < (3, 25):
        return Row(
            "build tools", "warning", found, "CMake is older than 3.25", "pip install -U cmake"
        )
    return Row("build tools", "ok", found)


def architectures(facts):
    """TORCH_CUDA_ARCH_LIST, resolved for this nvcc and these GPUs."""
    text = facts["variables"].get("TORCH_CUDA_ARCH_LIST")
    nvcc = facts["build"]["nvcc"]
    if not text or nvcc is None:
        return Row("TORCH_CUDA_ARCH_LIST", "note", text or "unset: the preset decides")
    gpus = facts.get("devices", {}).get("gpus") or facts["driver"]["gpus"]
    native = [10 * one["capability"][0] + one["capability"][1] for one in gpus]
    result, wrong = arch_list.resolve(text, nvcc["architectures"], native)
    if wrong:
        cure = "leave it out, or take a CUDA that builds it"
        return Row("TORCH_CUDA_ARCH_LIST", "warning", text, wrong, cure)
    return Row("TORCH_CUDA_ARCH_LIST", "ok", f"{text}: CMAKE_CUDA_ARCHITECTURES {';'.join(result)}")


def flags(facts):
    """The rest of what changes a build, as it stands."""
    names = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CL", "CXX", "CUDAHOSTCXX", "CUDACXX")
    names += ("NVCC_THREADS", "MM_DISABLE_BF16", "MM_DISABLE_HALF", "DISTUTILS_USE_SDK")
    given = {name: facts["variables"][name] for name in names if name in facts["variables"]}
    found = ", ".join(f"{name}={text}" for name, text in given.items())
    return Row("build variables", "note", found) if given else None


def memory(facts):
    build = facts["build"]
    if build["memory"] is None:
        return None
    total, free = (build["memory"][name] / 2**30 for name in ("total", "available"))
    given = facts["variables"].get("MAX_JOBS", "")
    jobs = int(given) if re.fullmatch(r"[1-9]\d*", given) else build["cpus"]
    found = f"{free:.0f} of {total:.0f} GiB free, {jobs} jobs at a time"
    if free < jobs:  # the largest sources took g++ 12 and nvcc 13.0 0.4 GiB; cl.exe may take more
        cause = "less than 1 GiB for each compiler: the system may kill one"
        cure = f"set MAX_JOBS={max(1, int(free))}; for upstream's setup.py also NVCC_THREADS=1"
        return Row("memory to compile", "warning", found, cause, cure)
    return Row("memory to compile", "ok", found)


CHECKS = (compiler, cuda, host, tools, architectures, flags, memory)


def rows(facts):
    return checks.rows(facts, CHECKS)
