"""Checkpoints in Hugging Face's layout: a local folder, or the hub if huggingface_hub is installed."""

import importlib.util
import json
from pathlib import Path

import torch

CONFIG = "config.json"
BIN = "pytorch_model.bin"
SAFETENSORS = "model.safetensors"


def _first(name, filenames):
    """The local path of the first of these files that the checkpoint has; FileNotFoundError if it has none."""
    cause = None
    if Path(name).is_dir():
        for filename in filenames:
            if (path := Path(name) / filename).is_file():
                return path
    else:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError
        except ImportError as error:
            raise ImportError(
                f"{str(name)!r} is no folder here; to download it from the hub: pip install huggingface_hub"
            ) from error
        for filename in filenames:
            try:
                return Path(hf_hub_download(str(name), filename))
            except EntryNotFoundError as error:
                cause = error
    raise FileNotFoundError(f"{name}: it has no {' or '.join(filenames)}") from cause


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{SAFETENSORS} is read and written by safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def _load(path):
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_config_hf(model_name):
    """config.json as a dict."""
    return json.loads(_first(model_name, [CONFIG]).read_text(encoding="utf-8"))


def load_state_dict_hf(model_name, device=None, dtype=None):
    """The weights, on `device` and in `dtype` where given.

    From model.safetensors or pytorch_model.bin, whole or in shards; of both, the one that can be read.
    """
    names = [SAFETENSORS, BIN]
    if not importlib.util.find_spec("safetensors"):
        names.reverse()
    path = _first(model_name, [file for name in names for file in (name, f"{name}.index.json")])
    if path.suffix == ".json":
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [_first(model_name, [shard]) for shard in sorted(set(shards))]
    else:
        paths = [path]
    return {
        name: tensor.to(device=device, dtype=dtype)
        for path in paths
        for name, tensor in _load(path).items()
    }


def save_state_dict_hf(state_dict, folder, safe_serialization=False):
    """Writes pytorch_model.bin, or with safe_serialization model.safetensors, which takes no tensor twice."""
    if safe_serialization:
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        _safetensors().save_file(tensors, Path(folder) / SAFETENSORS, metadata={"format": "pt"})
    else:
        torch.save(state_dict, Path(folder) / BIN)
