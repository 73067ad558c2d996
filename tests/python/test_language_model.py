"""The language model: state dict, initialisation, checkpoints, training."""

import json
import math
import sys

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, create_block
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mha import MHA
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf


def small(**changes):
    return MambaConfig(**({"d_model": 32, "n_layer": 2, "vocab_size": 61} | changes))


def test_state_dict_has_upstreams_names():
    names = set(MambaLMHeadModel(small()).state_dict())
    mixer = {
        "A_log",
        "D",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "out_proj.weight",
    }
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    for i in range(2):
        expected |= {f"backbone.layers.{i}.mixer.{name}" for name in mixer}
        expected.add(f"backbone.layers.{i}.norm.weight")
    assert names == expected
    with_mlp = set(MambaLMHeadModel(small(d_intermediate=64, rms_norm=False)).state_dict())
    assert {
        f"backbone.layers.0.{n}" for n in ("norm2.bias", "mlp.fc1.weight", "mlp.fc2.weight")
    } <= with_mlp


def test_vocabulary_is_padded_and_tied():
    model = MambaLMHeadModel(small())
    assert model.backbone.embedding.weight.shape == (64, 32)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert MambaLMHeadModel(small(tie_embeddings=False)).lm_head.weight.shape == (64, 32)


def test_residual_outputs_shrink_with_depth():
    """out_proj is uniform in +-1/sqrt(fan_in), over sqrt(residual additions)."""
    for d_intermediate, residuals in ((0, 2), (64, 4)):
        model = MambaLMHeadModel(small(d_intermediate=d_intermediate))
        largest = model.backbone.layers[1].mixer.out_proj.weight.abs().max().item()
        bound = 1 / math.sqrt(64 * residuals)
        assert 0.95 * bound < largest <= bound
    assert 0.015 < model.backbone.embedding.weight.std().item() < 0.025
    bias = model.backbone.layers[0].mixer.dt_proj.bias
    assert bias.abs().min() > 0  # dt_proj's bias keeps its own initialisation


def test_embedding_scale_follows_initializer_cfg():
    model = MambaLMHeadModel(small(), initializer_cfg={"initializer_range": 0.5})
    assert 0.4 < model.backbone.embedding.weight.std().item() < 0.6


@pytest.mark.parametrize(
    "changes",
    [{}, {"rms_norm": False}, {"d_intermediate": 64}, {"residual_in_fp32": False}],
    ids=str,
)
def test_fused_is_unfused(device, changes):
    tokens = torch.randint(0, 61, (2, 9), device=device)
    logits = []
    for fused in (True, False):
        torch.manual_seed(5)
        model = MambaLMHeadModel(small(fused_add_norm=fused, **changes)).to(device)
        logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_num_last_tokens(device):
    model = MambaLMHeadModel(small()).to(device)
    tokens = torch.randint(0, 61, (2, 9), device=device)
    last = model(tokens, num_last_tokens=2).logits
    torch.testing.assert_close(last, model(tokens).logits[:, -2:])


def test_learns_a_short_text(device):
    model = MambaLMHeadModel(small()).to(device)
    tokens = torch.arange(60, device=device).remainder(7).unsqueeze(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.0 and losses[-1] < 0.3, losses


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_round_trip(tmp_path, tied, file):
    if safe := file.endswith("safetensors"):
        pytest.importorskip("safetensors")
    model = MambaLMHeadModel(small(tie_embeddings=tied))
    model.save_pretrained(tmp_path, **({"safe_serialization": True} if safe else {}))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", file}
    assert json.loads((tmp_path / "config.json").read_text()) == load_config_hf(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    tokens = torch.randint(0, 61, (1, 5))
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    half = MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert (half.lm_head.weight is half.backbone.embedding.weight) is tied


def test_of_two_formats_the_one_that_can_be_read(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    for safe in (True, False):
        model = MambaLMHeadModel(small())
        model.save_pretrained(tmp_path, safe_serialization=safe)
        if safe:
            weight = model.lm_head.weight
    assert torch.equal(MambaLMHeadModel.from_pretrained(tmp_path).lm_head.weight, weight)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert torch.equal(
        MambaLMHeadModel.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight
    )
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ImportError, match="pip install safetensors"):
        MambaLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_sharded_checkpoint(tmp_path, suffix):
    if suffix == "bin":
        name, save = "pytorch_model.bin", torch.save
    else:
        name, save = "model.safetensors", pytest.importorskip("safetensors.torch").save_file
    state = MambaLMHeadModel(small(tie_embeddings=False)).state_dict()
    index = {key: f"part-{i % 2}.{suffix}" for i, key in enumerate(state)}
    for part in set(index.values()):
        save({key: state[key] for key in state if index[key] == part}, tmp_path / part)
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = load_state_dict_hf(tmp_path, dtype=torch.float64)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key].double()) for key in state)
    (tmp_path / f"part-1.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="part-1"):
        load_state_dict_hf(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_config_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        load_state_dict_hf(tmp_path)


def test_unknown_fields_of_a_config_are_refused():
    with pytest.raises(TypeError, match="d_modle"):
        MambaConfig(d_modle=3)


def test_create_block():
    config = {"layer": "Mamba1", "d_state": 4}
    block = create_block(32, ssm_cfg=config, layer_idx=7)
    assert isinstance(block.mixer, Mamba) and block.mixer.d_state == 4
    assert block.layer_idx == block.mixer.layer_idx == 7 and "layer" in config
    assert create_block(32, {"d_state": 4}).mixer.d_state == 4  # mamba_ssm 1: ssm_cfg came second
    assert create_block(32, None).mlp is None
    with pytest.raises(ValueError, match="Mamba17"):
        create_block(32, ssm_cfg={"layer": "Mamba17"})
    attention = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}
    kinds = [type(create_block(32, layer_idx=i, **attention).mixer) for i in range(3)]
    assert kinds == [Mamba, MHA, Mamba]


HYBRID = {
    "n_layer": 3,
    "attn_layer_idx": [1],
    "attn_cfg": {
        "num_heads": 4,
        "num_heads_kv": 2,
        "causal": True,
        "d_conv": 4,
        "rotary_emb_dim": 4,
    },
}


@pytest.mark.parametrize("cg", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_hybrid_models_decode_like_the_forward_pass(device, cg):
    if cg and device == "cpu":
        pytest.skip("graphs are CUDA's")
    model = MambaLMHeadModel(small(**HYBRID), initializer_cfg={"initializer_range": 0.5}).to(device)
    teacher = torch.randint(0, 61, (3, 20), device=device)
    output = model.generate(
        teacher[:, :9],
        20,
        teacher_outputs=teacher,
        cg=cg,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        whole = model(teacher).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(output.scores, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_evaluation_harness_calls(tmp_path):
    """Positional name, device and dtype by name, everything else to generate()."""
    MambaLMHeadModel(small()).save_pretrained(tmp_path)
    model = MambaLMHeadModel.from_pretrained(str(tmp_path), device="cpu", dtype=torch.float32)
    tokens = torch.randint(0, 61, (2, 5))
    out = model.generate(input_ids=tokens, max_length=9, temperature=1.0, top_k=1)
    assert out.shape == (2, 9) and torch.equal(out[:, :5], tokens)
