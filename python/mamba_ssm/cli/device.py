"""Takes the --device of a command."""

import torch

from mamba_ssm.cli.errors import UsageError


def use(name):
    """Makes a CUDA device the current one. UsageError if this machine or this torch has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {error}") from error
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise UsageError(f"--device {name}: there are kernels for cpu and cuda")
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise UsageError(f"--device {name}: torch {torch.__version__} {why}; --device cpu works")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} devices, from 0")
    torch.cuda.set_device(device.index or 0)
