"""Checkpoints in Hugging Face's layout: a local folder, or the hub if huggingface_hub is installed."""

import json
from pathlib import Path

import torch


def _find(name, filename):
    """The file's local path, or None where the checkpoint lacks it."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return path if path.is_file() else None
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{str(name)!r} is no folder here; to download it from the hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download(str(name), filename))
    except EntryNotFoundError:
        return None


def _load(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_config_hf(model_name):
    """config.json as a dict."""
    path = _find(model_name, "config.json")
    if path is None:
        raise FileNotFoundError(f"{model_name}: no config.json")
    return json.loads(path.read_text(encoding="utf-8"))


def load_state_dict_hf(model_name, device=None, dtype=None):
    """The weights, whole or in shards, .bin or .safetensors, on `device` and in `dtype` where given."""
    state_dict = {}
    names = ("pytorch_model.bin", "model.safetensors")
    for name in names:
        if path := _find(model_name, name):
            state_dict = _load(path)
            break
    else:
        for name in names:
            if index := _find(model_name, f"{name}.index.json"):
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                for shard in sorted(set(shards)):
                    state_dict.update(_load(_find(model_name, shard)))
                break
        else:
            raise FileNotFoundError(
                f"{model_name}: neither {' nor '.join(names)}, whole or in shards"
            )
    return {key: tensor.to(device=device, dtype=dtype) for key, tensor in state_dict.items()}
