"""What the facts mean for those who run models: one row a check, with cause and cure where something is wrong.

A verdict is "ok", "note" (nothing to do), "warning" (works, perhaps not as wished) or "problem" (does not work).
"""

import re
from dataclasses import dataclass

from mamba_ssm.cli.doctor import fatbin

OLDEST_GPU = (7, 5)
UNEXAMINED = "could not be examined"
VERDICTS = ("ok", "note", "warning", "problem")
BACK = (
    "pip uninstall -y {names}, then install this project's wheel again: "
    "pip install --force-reinstall --no-deps WHEEL"
)


@dataclass
class Row:
    check: str
    verdict: str
    found: str
    cause: str = ""
    cure: str = ""


def capability(numbers):
    return f"sm_{numbers[0]}{numbers[1]}"


def version(text):
    """The leading numbers of a version, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def system(facts):
    one = facts["system"]
    found = one["name"] + (f", WSL{one['wsl']}" if one["wsl"] else "")
    if one["machine"].lower() not in ("x86_64", "amd64"):
        cause = f"the wheels' native libraries are for x86-64, and this machine is {one['machine']}"
        return Row("system", "problem", found, cause, "build from source on this machine")
    if one["wsl"] == 1:
        cause = "WSL1 has no GPU driver"
        cure = "in PowerShell: wsl --set-version DISTRIBUTION 2; or use the CPU"
        return Row("system", "warning", found, cause, cure)
    return Row("system", "ok", found)


def python(facts):
    one = facts["python"]
    found = f"{one['version']}, {one['bits']} bits, {one['executable']}"
    cure = "install Python from python.org, 64-bit (winget install Python.Python.3.13)"
    if one["bits"] != 64:
        return Row("Python", "problem", found, "torch and the native library have 64 bits", cure)
    if one["store"]:
        cause = (
            "the Microsoft Store's Python finds DLLs by rules of its own, and CMake cannot run it"
        )
        return Row("Python", "warning", found, cause, cure)
    return Row("Python", "ok", found)


def torch(facts):
    one = facts["torch"]
    wanted = facts["minimum_torch"]
    cure = f'pip install "torch>={wanted}" (pytorch.org lists the commands for CUDA builds)'
    if one.get("missing") == "torch":
        return Row("torch", "problem", "not installed", "every operation runs inside torch", cure)
    if "error" in one:
        cause = f"import torch failed: {one['error']}"
        again = (
            f'pip install --force-reinstall "torch>={wanted}"; '
            "python -m mamba_ssm doctor --explain takes the message"
        )
        return Row("torch", "problem", "broken", cause, again)
    built = f"for CUDA {one['cuda']}" if one["cuda"] else "without CUDA"
    built = f"for ROCm {one['hip']}" if one["hip"] else built
    found = f"{one['version']}, built {built}, {one['file']}"
    if version(one["version"]) < version(wanted):
        cause = f"the native library uses the stable interface of torch {wanted} and later"
        return Row("torch", "problem", found, cause, f'pip install --upgrade "torch>={wanted}"')
    return Row("torch", "ok", found)


def gpu(facts):
    """Whether torch reaches the GPU that the driver knows."""
    driver, torch_facts, devices = facts["driver"], facts["torch"], facts.get("devices", {})
    if torch_facts.get("hip"):
        cause = "this torch is for AMD's GPUs; the kernels are for NVIDIA's and for the CPU"
        return Row("GPU", "note", "not used", cause, "device='cpu'")
    seen = devices.get("gpus") or []
    known = seen or driver["gpus"]
    names = ", ".join(f"{one['name']} ({capability(one['capability'])})" for one in known)
    said = f"driver {driver['version']} for CUDA up to {driver['cuda']}"
    if not known:
        why = devices.get("reason") or driver["error"] or "the driver lists none"
        cause = "torch is built for CUDA, and there is no GPU: " + why
        if torch_facts.get("cuda"):
            cure = (
                "the CPU works: device='cpu'. In a container: docker run --gpus all; "
                "in WSL2: the driver of Windows, none inside"
            )
            return Row("GPU", "note", "none", cause, cure)
        return Row("GPU", "ok", "none; every operation runs on the CPU")
    if seen:
        return Row("GPU", "ok", f"{names}, {said}" if driver["version"] else names)
    found = f"{names}, {said}"
    if "error" in torch_facts:
        return Row("GPU", "note", found, "torch cannot be asked, see above")
    if torch_facts["cuda"] is None:
        cause = f"torch {torch_facts['version']} is built without CUDA, as PyPI's is for Windows"
        cure = (
            "pip install --force-reinstall torch --index-url "
            "https://download.pytorch.org/whl/cu130 (cu126 for drivers below 580)"
        )
        return Row("GPU", "problem", found, cause, cure)
    hidden = facts["variables"].get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        cause = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"
        return Row("GPU", "problem", found, cause, "unset CUDA_VISIBLE_DEVICES")
    if driver["cuda"] and version(driver["cuda"])[0] < version(torch_facts["cuda"])[0]:
        cause = f"the driver is older than torch's CUDA {torch_facts['cuda']} (13.x wants driver 580 or newer)"
        cure = f"update the NVIDIA driver, or install a torch for CUDA {version(driver['cuda'])[0]}"
        return Row("GPU", "problem", found, cause, cure)
    cause = f"torch does not reach it: {devices.get('reason') or devices.get('error') or 'no reason given'}"
    return Row("GPU", "problem", found, cause, "reboot, then reinstall the NVIDIA driver")


def _code(library):
    sass = ", ".join(f"sm_{one}" for one in library["sass"])
    ptx = ", ".join(f"compute_{one}" for one in library["ptx"])
    return f"{sass}{f' and PTX {ptx}' if ptx else ''}" if sass or ptx else "no CUDA kernels"


def library(facts):
    """Whether the native library is there, loads, and for which torch it is made."""
    there, loaded = facts["libraries"], facts.get("library", {})
    files = "; ".join(f"{one['path']}: {_code(one)}" for one in there) or "no library file"
    error = loaded.get("error") or (None if loaded else "the process that asks torch ended before")
    if error is None:
        abi = loaded.get("torch_abi", facts["minimum_torch"])
        found = f"{loaded['path']} {loaded['version']}, for torch {abi} and later"
        found += f", CPU {loaded['cpu_isa']}"
        if loaded["version"] != facts["package"]["version"]:
            cause = f"the Python files are of {facts['package']['version']}, the library is not"
            cure = "install one wheel, whole; unset MAMBA_NATIVE_LIBRARY if it is set"
            return Row("native library", "problem", found, cause, cure)
        return Row("native library", "ok", found)
    if torch(facts).verdict == "problem":
        if there:
            return Row("native library", "note", files, "not loaded: torch comes first, see above")
        cause, cure = "its file is missing", "install the wheel of mamba_ssm for this platform"
        return Row("native library", "problem", files, cause, cure)
    cause, _, cure = error.removeprefix("NativeError: ").partition(" To do: ")
    return Row(
        "native library", "problem", files, cause, cure or "reinstall mamba_ssm and torch, both"
    )


def _used(facts):
    """The library that this torch loads, None where that is not known."""
    path = facts.get("library", {}).get("path")
    return next((one for one in facts["libraries"] if one["path"] == path), None)


def kernels(facts):
    """Whether each GPU finds code in the library that is loaded, and in torch."""
    gpus = facts.get("devices", {}).get("gpus") or facts["driver"]["gpus"]
    used = _used(facts)
    if not gpus:
        return Row("kernels", "ok", _code(used) if used else "no GPU to run any")
    names = ", ".join(f"{one['name']} ({capability(one['capability'])})" for one in gpus)
    old = [one for one in gpus if tuple(one["capability"]) < OLDEST_GPU]
    if old:
        is_a = f"{old[0]['name']} is {capability(old[0]['capability'])}"
        cause = f"{is_a}; there are kernels from sm_75 (Turing, RTX 20, T4) on"
        return Row("kernels", "problem", names, cause, "a newer GPU, or the CPU: device='cpu'")
    candidates = [used] if used else facts["libraries"]
    if not candidates:
        return Row("kernels", "note", names, "no library to look into, see above")
    found = "; ".join(f"{one['kind']}: {_code(one)}" for one in candidates)
    without = [
        one
        for one in gpus
        if not any(
            fatbin.runs_on(one["capability"], code["sass"], code["ptx"]) for code in candidates
        )
    ]
    if without:
        cause = (
            f"nothing in it runs on {without[0]['name']} ({capability(without[0]['capability'])})"
        )
        number = "".join(map(str, without[0]["capability"]))
        cure = f"install the wheel with CUDA, or build for this GPU: TORCH_CUDA_ARCH_LIST={number}"
        return Row("kernels", "problem", found, cause, cure)
    return Row("kernels", "ok", f"{found}; runs on {names}")


def torch_kernels(facts):
    """The same for torch's own: the other source of `no kernel image is available`."""
    devices = facts.get("devices", {})
    names = devices.get("architectures") or []
    if not devices.get("gpus") or not names:
        return None
    code = {"sm": [], "compute": []}
    for kind, number in (re.findall(r"(sm|compute)_(\d+)", name)[0] for name in names):
        code[kind].append(int(number))
    found = ", ".join(names)
    for one in devices["gpus"]:
        if not fatbin.runs_on(one["capability"], code["sm"], code["compute"]):
            cause = (
                f"torch itself has no kernels for {one['name']} ({capability(one['capability'])})"
            )
            cure = (
                "install a torch build that has: CUDA 12.6 builds for GPUs before Turing, "
                "CUDA 12.8 or newer for RTX 50"
            )
            return Row("torch's kernels", "problem", found, cause, cure)
    return Row("torch's kernels", "ok", found)


def packages(facts):
    """Whether pip's packages of our names are ours, whole and unmixed."""
    one = facts["packages"]
    listed = [row for row in one["distributions"] if row["name"] in ("mamba_ssm", "causal_conv1d")]
    found = ", ".join(f"{row['name']} {row['version']}" for row in listed)
    foreign = [row for row in listed if not row["ours"]]
    names = " ".join(sorted({row["name"] for row in listed})) or "mamba_ssm"
    cure = BACK.format(names=names)
    if foreign:
        cause = (
            f"{foreign[0]['name']} {foreign[0]['version']} in {foreign[0]['folder']} is upstream's: pip install -U "
            "replaces ours by it, because upstream's newer version number counts as newer than ours"
        )
        return Row("packages", "problem", found, cause, cure)
    for row in listed:
        damaged = row["missing"] or row["changed"]
        if damaged:
            what = "missing" if row["missing"] else "not what pip installed"
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            return Row("packages", "problem", found, f"{what}: {damaged[0]}{more}", cure)
    twice = [name for name in names.split() if sum(row["name"] == name for row in listed) > 1]
    if twice:
        folders = " and ".join(row["folder"] for row in listed if row["name"] == twice[0])
        return Row("packages", "problem", found, f"{twice[0]} is there twice: {folders}", cure)
    if one["strangers"]:
        cause = f"files that do not belong to ours, {len(one['strangers'])} in all: {one['strangers'][0]}"
        return Row("packages", "problem", found, cause, cure)
    if not any(row["name"] == "mamba_ssm" for row in listed):
        folder = facts["package"]["folder"]
        return Row("packages", "note", f"a source tree, not installed by pip: {folder}")
    return Row("packages", "ok", found)


def shadows(facts):
    """Whether Python finds a module of upstream's before ours."""
    modules = facts["packages"]["modules"]
    for name, places in modules.items():
        if places and not places[0]["ours"]:
            cause = f"Python finds {places[0]['file']} first, which is not ours"
            cure = "uninstall what it belongs to, or remove that file or its folder from PYTHONPATH"
            return Row("modules", "problem", name, cause, cure)
    second = [(name, place) for name, places in modules.items() for place in places[1:]]
    found = ", ".join(name for name, places in modules.items() if places)
    if second:
        name, place = second[0]
        cause = f"another {name}, behind ours: {place['file']}"
        cure = "remove it, so that the order of the search path does not matter"
        return Row("modules", "warning", found, cause, cure)
    return Row("modules", "ok", found)


def triton(facts):
    found = facts["packages"]["triton"]
    return Row("Triton", "ok", f"{found}, not used" if found else "not installed, not needed")


def variables(facts):
    """Variables that change how operations run."""
    names = ("MAMBA_NATIVE_LIBRARY", "MAMBA_CPU_ISA", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")
    given = {name: facts["variables"][name] for name in names if name in facts["variables"]}
    found = ", ".join(f"{name}={text}" for name, text in given.items())
    return Row("variables", "note", found) if given else None


CHECKS = (
    *(system, python, torch, gpu, library, kernels, torch_kernels),
    *(packages, shadows, triton, variables),
)


def rows(facts, checks=CHECKS):
    return [row for row in (_row(check, facts) for check in checks) if row]


def _row(check, facts):
    """A check that stumbles over a machine that nobody thought of must not hide the other rows."""
    try:
        return check(facts)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        cure = "report it with what `python -m mamba_ssm doctor --json` prints"
        return Row(check.__name__, "warning", UNEXAMINED, cause, cure)
