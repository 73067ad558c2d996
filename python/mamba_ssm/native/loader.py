"""Finds the library of kernels that fits the installed torch, and loads it once.

Importing this module neither imports torch nor loads anything. A library that cannot be loaded is no error
until an operation is called: then `NativeError` says what was found, what was expected and what to do.
"""

import functools
import os
import sys
from pathlib import Path

NAMESPACE = "mamba_native"
OVERRIDE = "MAMBA_NATIVE_LIBRARY"  # a path to load instead, for development builds
MINIMUM_TORCH = (2, 10)
OPERATIONS = (
    "selective_scan_forward",
    "selective_scan_backward",
    "causal_conv1d_forward",
    "causal_conv1d_backward",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "selective_state_update",
    "layer_norm_forward",
    "layer_norm_backward",
    "layer_norm_branches_forward",
    "layer_norm_branches_backward",
    "gated_norm_forward",
    "gated_norm_backward",
    "ssd_forward",
    "ssd_backward",
    "native_info",
)


class NativeError(RuntimeError):
    """The native operations cannot run here."""


def libraries(folder):
    """The op libraries in a folder: {"cpu" | "cu12" | "cu13": path}."""
    suffix = ".dll" if sys.platform == "win32" else ".so"
    paths = {kind: Path(folder) / f"{NAMESPACE}_{kind}{suffix}" for kind in ("cpu", "cu12", "cu13")}
    return {kind: path for kind, path in paths.items() if path.is_file()}


def choose(found, torch_version, cuda_version):
    """The path in `found` that fits this torch. CUDA majors never mix: their runtimes do not.

    cuda_version: torch.version.cuda, None for a torch without CUDA, which can load any library.
    """
    if tuple(int(part) for part in torch_version.split(".")[:2]) < MINIMUM_TORCH:
        raise NativeError(
            f"mamba_ssm found torch {torch_version} and needs torch 2.10 or newer, on the CPU too; "
            f'upgrade it with: pip install --upgrade "torch>=2.10"'
        )
    wanted = (
        ("cpu", "cu13", "cu12")
        if cuda_version is None
        else (f"cu{cuda_version.split('.')[0]}", "cpu")
    )
    for kind in wanted:
        if kind in found:
            return found[kind]
    build = "without CUDA" if cuda_version is None else f"for CUDA {cuda_version}"
    if found:
        cure = "install a torch of one of the found majors, or build this package with torch's CUDA major"
    else:
        cure = f"install the mamba_ssm wheel of this platform, or set {OVERRIDE} to a library you built"
    raise NativeError(
        f"mamba_ssm has no native library for this torch. Found: {', '.join(sorted(found)) or 'none'}, "
        f"beside {Path(__file__).parent}. Expected: {' or '.join(wanted)}, because torch {torch_version} "
        f"is built {build}. To do: {cure}."
    )


def load():
    """Loads the library once and returns its path, None if this process had the operations already."""
    path, reason = _outcome()
    if reason is not None:
        raise NativeError(reason)
    return path


@functools.cache
def _outcome():
    """(path, None) of the loaded library, or (None, why there is none)."""
    try:
        return _load(), None
    except NativeError as error:
        return None, str(error)


def _load():
    import torch

    path = None
    namespace = getattr(torch.ops, NAMESPACE)
    if not hasattr(namespace, OPERATIONS[0]):  # a namespace can be registered once in a process
        override = os.environ.get(OVERRIDE)
        path = Path(override) if override else None
        path = path or choose(
            libraries(Path(__file__).parent), torch.__version__, torch.version.cuda
        )
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise NativeError(
                f"mamba_ssm could not load its native library. Found: {path}, which the system refused: "
                f"{error}. Expected: a library that loads into torch {torch.__version__}. To do: "
                f"reinstall mamba_ssm and torch."
            ) from error
    # torch before 2.13 only logs a registration that failed.
    missing = [name for name in OPERATIONS if not hasattr(namespace, name)]
    if missing:
        raise NativeError(
            f"mamba_ssm's native library is incomplete. Found: {path}. Expected it to register "
            f"{', '.join(missing)}. To do: reinstall mamba_ssm {_version()}, whole."
        )
    _refuse_cuda_without_kernels(torch, path)
    return path


def _version():
    from mamba_ssm._version import __version__

    return __version__


_refusals = None  # a torch.library.Library: its registrations last as long as it does
_refused = ()


def refuses_cuda(name=OPERATIONS[0]):
    """Whether the loaded library has no CUDA kernels for the operation."""
    return name in _refused


def _refuse_cuda_without_kernels(torch, path):
    """Replaces the dispatcher's words about a missing CUDA kernel by ours."""
    global _refusals, _refused

    def refusal(name):
        def refuse(*args, **kwargs):
            cure = "move model and tensors to the CPU, where every operation runs"
            if refuses_cuda():  # the first one, and so all
                cure = f"install the wheel with CUDA or build with MAMBA_CUDA=ON; or {cure}"
            raise NativeError(
                f"mamba_ssm got CUDA tensors, but its native library has no CUDA kernels for {name}. "
                f"Found: {path}. Expected: a {NAMESPACE}_cu{(torch.version.cuda or '13').split('.')[0]} "
                f"that has them. To do: {cure}."
            )

        return refuse

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _refused = tuple(
        name
        for name in OPERATIONS
        if name != "native_info"  # takes no tensor
        and not has_kernel(f"{NAMESPACE}::{name}", "CUDA")
    )
    if _refused:
        _refusals = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in _refused:
        _refusals.impl(name, refusal(name), "CUDA")


def operation(name, fake, setup_context=None, backward=None):
    """The callable of a native operation, with its shapes and gradient registered for torch.compile.

    Where the library cannot be loaded, a callable that raises the reason.
    """
    import torch

    from mamba_ssm.native import vmap

    _, reason = _outcome()
    if reason is not None:

        def unavailable(*args, **kwargs):
            raise NativeError(reason)

        return unavailable

    def checked_fake(*args):
        devices = {str(arg.device) for arg in args if isinstance(arg, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: all tensors must be on one device, got {sorted(devices)}")
        return fake(*args)

    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, checked_fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if name != "native_info":  # takes no tensor
        vmap.register(overload, setup_context, backward)
    return overload
