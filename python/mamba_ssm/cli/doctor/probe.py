"""What torch and the native library say, asked in a process of their own: a broken one may take it down.

The process prints one line a stage, so that what came before a crash is known.
"""

import json
import subprocess
import sys

STAGES = ("torch", "devices", "library")
SECONDS = 300  # torch for Windows from a cold disk takes its time
_MARK = "mamba_ssm doctor: "
# the search path of this process decides what it would import, however that path came about
_PROGRAM = (
    "import json, sys; sys.path[:] = json.load(sys.stdin); "
    "from mamba_ssm.cli.doctor import probe; probe.tell()"
)


def ask():
    """{stage: what it found}; a stage that ended the process has only "error", later ones are absent."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps(sys.path).encode(),
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        status, out, said = f"took more than {SECONDS} s", error.stdout or b"", ""
    else:
        status, out = _ended(child.returncode), child.stdout
        said = child.stderr.decode("utf-8", "replace").strip()
    lines = out.decode("utf-8", "replace").splitlines()
    found = [json.loads(line[len(_MARK) :]) for line in lines if line.startswith(_MARK)]
    facts = dict(found)
    for stage in STAGES:
        if stage not in facts:
            facts[stage] = {"error": ": ".join(filter(None, (status, said[-500:])))}
            break
    return facts


def _ended(status):
    if status < 0:
        return f"the process died by signal {-status}"
    return f"the process ended with status {status:#x}"  # Windows: 0xc0000005 is a crash


def tell():
    """Runs in the process that `ask` starts."""
    for stage, facts in zip(STAGES, (_torch, _devices, _library), strict=True):
        try:
            found = facts()
        except Exception as error:
            found = {
                "error": f"{type(error).__name__}: {error}",
                "missing": getattr(error, "name", None)
                if isinstance(error, ModuleNotFoundError)
                else None,
            }
        print(_MARK + json.dumps([stage, found]), flush=True)


def _torch():
    import torch

    version = getattr(torch, "version", None)
    return {
        "version": str(torch.__version__),
        "file": torch.__file__,
        "cuda": getattr(version, "cuda", None),
        "hip": getattr(version, "hip", None),
    }


def _devices():
    import torch

    if getattr(torch.version, "hip", None) or not torch.cuda.is_available():
        reason = None
        if torch.version.cuda is not None:
            try:
                torch.cuda.init()
            except Exception as error:
                reason = str(error)
        return {"gpus": [], "reason": reason, "architectures": []}
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = [
        {"name": one.name, "capability": [one.major, one.minor], "memory": one.total_memory}
        for one in properties
    ]
    return {"gpus": gpus, "reason": None, "architectures": torch.cuda.get_arch_list()}


def _library():
    import torch

    from mamba_ssm.native import loader

    path = loader.load()
    info = json.loads(torch.ops.mamba_native.native_info())
    return {"path": path and str(path), **info}
