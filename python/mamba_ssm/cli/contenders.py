"""Other implementations of the Mamba layer, with the weights of ours, for `bench --lengths`."""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mamba_ssm._version import __version__
from mamba_ssm.cli import formulas
from mamba_ssm.cli.errors import UsageError

NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda")
CHECKED_LENGTH = 32
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # over the largest value
FUSED = 0.5  # Contender.states of kernels that keep the states to themselves


@dataclass
class Contender:
    """states: tensors of (B, D, N, L) in float32 that a forward pass holds at once, as its peak memory showed."""

    name: str
    run: Callable  # (B, L, d_model) -> the same
    states: float


def gather(layer, upstream):
    """([Contender, ...], {name: why it is left out}); ours comes first.

    layer: a `Mamba`, already on its device. upstream: a folder with another mamba_ssm, or None.
    """
    makers = {"PyTorch formula": _formula, "transformers": _transformers, "mambapy": _mambapy}
    if upstream is not None:
        if not (upstream / "mamba_ssm").is_dir():
            raise UsageError(
                f"--upstream {upstream}: no folder mamba_ssm in there; "
                f"pip install --target {upstream} --no-deps mamba-ssm makes one"
            )
        makers["upstream"] = lambda layer: _upstream(layer, upstream)
    found = [Contender(f"mamba_ssm {__version__}", layer, FUSED)]
    left_out = {}
    for name, make in makers.items():
        try:
            contender = make(layer)
            difference = _difference(layer, contender)
        except Exception as error:  # others' code, which fails in its own ways
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            left_out[name] = "not installed" if missing else f"{type(error).__name__}: {error}"
            continue
        if difference is None:
            found.append(contender)
        else:
            left_out[contender.name] = difference
    return found, left_out


@torch.no_grad()
def _difference(layer, contender):
    """Why the contender does not compute what the layer does, None if it does."""
    weight = layer.in_proj.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    size = (1, CHECKED_LENGTH, layer.d_model)
    hidden = torch.randn(size, device=weight.device, generator=generator).to(weight.dtype)
    ours, theirs = layer(hidden).float(), contender.run(hidden).float()
    error = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if error <= ALLOWED[weight.dtype]:
        return None
    return f"its output differs from ours by {error:.1e} of the largest value"


def _formula(layer):
    return Contender("PyTorch formula", partial(formulas.of_mamba, layer), 7.5)


def _with_weights_of(layer, module):
    module.load_state_dict(layer.state_dict(), assign=True)  # with their devices and dtypes
    return module.eval()


def _transformers(layer):
    """Its slow path, which it takes where no kernels are installed."""
    package = importlib.import_module("transformers")
    source = importlib.import_module("transformers.models.mamba.modeling_mamba")
    # transformers looks for kernels when its module is executed: execute a copy that finds none.
    spec = importlib.util.spec_from_file_location(f"{source.__name__}_slow", source.__file__)
    copy = importlib.util.module_from_spec(spec)
    with _without_our_modules():
        sys.modules |= dict.fromkeys(NAMES)  # None: an import of it fails
        sys.modules[spec.name] = copy
        try:
            spec.loader.exec_module(copy)
        finally:
            del sys.modules[spec.name]
    # It would advise on every run to install what is hidden from it on purpose.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    config = package.MambaConfig(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        conv_kernel=layer.d_conv,
        expand=layer.expand,
        num_hidden_layers=1,
    )
    mixer = _with_weights_of(layer, copy.MambaMixer(config, 0))
    name = f"transformers {package.__version__}, slow path"
    return Contender(name, mixer, 4)


def _mambapy(layer):
    from importlib.metadata import version

    mambapy = importlib.import_module("mambapy.mamba")
    config = mambapy.MambaConfig(
        d_model=layer.d_model,
        n_layers=1,
        d_state=layer.d_state,
        expand_factor=layer.expand,
        d_conv=layer.d_conv,
    )
    block = _with_weights_of(layer, mambapy.MambaBlock(config))
    return Contender(f"mambapy {version('mambapy')}", block, 6)


def _upstream(layer, folder):
    """The layer of a package that shares our name: ours steps aside while it is imported."""
    folder = str(folder.resolve())
    with _without_our_modules():
        sys.path.insert(0, folder)
        try:
            module = importlib.import_module("mamba_ssm.modules.mamba_simple")
        finally:
            sys.path.remove(folder)
        version = sys.modules["mamba_ssm"].__version__
    if Path(folder) not in Path(module.__file__).resolve().parents:
        raise ImportError(f"found {module.__file__}, which is not in {folder}")
    other = module.Mamba(layer.d_model, layer.d_state, layer.d_conv, layer.expand)
    other = _with_weights_of(layer, other)
    return Contender(f"upstream {version}", other, FUSED)


@contextmanager
def _without_our_modules():
    """Inside, no module of NAMES counts as imported; afterwards ours do again, and no others."""

    def take():
        names = [name for name in sys.modules if name.partition(".")[0] in NAMES]
        return {name: sys.modules.pop(name) for name in names}

    kept = take()
    try:
        yield
    finally:
        take()
        sys.modules |= kept
