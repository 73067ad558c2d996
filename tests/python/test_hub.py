"""Checkpoints by their name on the hub: from its cache, without a network, and without its package."""

import sys

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

NAME = "someone/mamba-tiny"
REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of NAME's files in the hub's cache; nothing is downloaded."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / ("models--" + NAME.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_a_name_on_the_hub(hub, safe):
    if safe:
        pytest.importorskip("safetensors")
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
    model.save_pretrained(hub, safe_serialization=safe)
    loaded = MambaLMHeadModel.from_pretrained(NAME, device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, 8, (1, 5))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_checkpoint_on_the_hub_without_weights(hub):
    MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8)).save_pretrained(hub)
    (hub / "pytorch_model.bin").unlink()
    assert load_config_hf(NAME)["d_model"] == 16
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*pytorch_model\.bin"):
        load_state_dict_hf(NAME)


def test_without_huggingface_hub_a_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        MambaLMHeadModel.from_pretrained(NAME)
