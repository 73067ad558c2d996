"""Attention of hybrid models: formula, rotary positions, caches."""

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.modules.mha import MHA, rotate
from mamba_ssm.utils.generation import InferenceParams

pytestmark = pytest.mark.usefixtures("exact_references")

OPTIONS = {
    "plain": {},
    "grouped": {"num_heads_kv": 2},
    "one_kv_head": {"num_heads_kv": 1, "head_dim": 6},
    "rotary": {"rotary_emb_dim": 8},
    "rotary_interleaved": {"rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    "convolution": {"d_conv": 4},
    "mlp": {"mlp_dim": 200, "qkv_proj_bias": False, "out_proj_bias": False},
    "scale": {"softmax_scale": 0.1},
    "everything": {"num_heads_kv": 2, "rotary_emb_dim": 8, "d_conv": 3, "mlp_dim": 256},
}


@pytest.fixture(params=OPTIONS)
def model(request, device):
    return MHA(32, 4, causal=True, layer_idx=0, **OPTIONS[request.param]).to(device)


@pytest.fixture
def hidden(device):
    return torch.randn(2, 9, 32, device=device)


def by_loops(model, hidden):
    """softmax(q k / sqrt(d)) v, one query after the other."""
    batch, length, _ = hidden.shape
    proj = F.linear(hidden, model.in_proj.weight, model.in_proj.bias)
    qkv, mlp = proj[..., : model.qkv_dim], proj[..., model.qkv_dim :]
    if model.d_conv:
        qkv = model.conv1d(qkv.mT)[..., :length].mT
    heads = qkv.reshape(batch, length, -1, model.head_dim)
    q, k, v = heads.split([model.num_heads, model.num_heads_kv, model.num_heads_kv], dim=2)
    if dim := model.rotary_emb_dim:
        pairs = [(2 * i, 2 * i + 1) for i in range(dim // 2)]
        if not model.rotary_emb_interleaved:
            pairs = [(i, i + dim // 2) for i in range(dim // 2)]

        def turn(x):
            features = list(x.unbind(-1))
            for i, (a, b) in enumerate(pairs):
                angle = torch.arange(length, device=x.device) / 10000.0 ** (2 * i / dim)
                unit = torch.polar(torch.ones_like(angle), angle)[:, None]
                turned = torch.complex(features[a], features[b]) * unit
                features[a], features[b] = turned.real, turned.imag
            return torch.stack(features, dim=-1)

        q, k = turn(q), turn(k)
    outs = []
    for t in range(length):
        reach = t + 1 if model.causal else length
        for h in range(model.num_heads):
            source = h // (model.num_heads // model.num_heads_kv)
            weights = (q[:, t, None, h] * k[:, :reach, source]).sum(-1)
            weights = (weights * (model.softmax_scale or model.head_dim**-0.5)).softmax(-1)
            outs.append((weights.unsqueeze(-1) * v[:, :reach, source]).sum(1))
    out = torch.stack(outs, dim=1).reshape(batch, length, -1)
    up, gate = mlp.chunk(2, dim=-1)
    return model.out_proj(torch.cat([out, up * F.silu(gate)], dim=-1))


@pytest.mark.parametrize("causal", [True, False])
def test_forward_and_backward_are_the_formula(model, hidden, causal):
    model.causal = causal
    results = []
    for function in (model, lambda x: by_loops(model, x)):
        out = function(hidden)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_parameters_have_upstreams_names_and_shapes():
    model = MHA(32, 4, num_heads_kv=2, mlp_dim=200, d_conv=4, rotary_emb_dim=8)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {
        "in_proj.weight": (8 * 8 + 256, 32),
        "in_proj.bias": (8 * 8 + 256,),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "out_proj.weight": (32, 32 + 128),
        "out_proj.bias": (32,),
    }
    assert set(MHA(32, 4, qkv_proj_bias=False, out_proj_bias=False).state_dict()) == {
        "in_proj.weight",
        "out_proj.weight",
    }


@pytest.mark.parametrize("parts", [[1] * 9, [5, 1, 1, 1, 1], [2, 3, 4]], ids=str)
def test_pieces_continue_a_prompt(model, hidden, parts):
    """The convolution's state holds what went in: its outputs would give other continuations."""
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    outs = []
    with torch.no_grad():
        for part in hidden.split(parts, dim=1):
            outs.append(model(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
        torch.testing.assert_close(torch.cat(outs, 1), model(hidden), rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths(model, hidden):
    """lengths_per_sample: each row goes on where it is; rows of a prompt padded on the right."""
    lengths = torch.tensor([3, 6], dtype=torch.int32, device=hidden.device)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    with torch.no_grad():
        model(hidden[:, :6], inference_params=params)
        if model.d_conv:
            state = params.key_value_memory_dict[0][1]
            qkv = model.in_proj(hidden[:1, :3])[..., : model.qkv_dim].mT
            state[:1] = F.pad(qkv, (model.d_conv - 3, 0))
        params.seqlen_offset, params.lengths_per_sample = 6, lengths
        for step in range(3):
            token = torch.stack([hidden[0, 3 + step], hidden[1, 6 + step]]).unsqueeze(1)
            out = model(token, inference_params=params)
            for row in range(2):
                whole = model(hidden[row : row + 1, : lengths[row] + 1])
                torch.testing.assert_close(out[row], whole[0, -1:], rtol=1e-4, atol=1e-5)
            params.lengths_per_sample += 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_separate_ones(model, device, given, causal):
    """Also one of a token and, behind the last, padding; values and gradients."""
    model.causal = causal
    lengths = [4, 1, 5, 2]
    hidden = torch.randn(1, 12, 32, device=device)
    index = torch.arange(4).repeat_interleave(torch.tensor(lengths)).to(device, torch.int32)
    packing = {
        "seq_idx": torch.where(index == 3, -1, index).unsqueeze(0),
        "cu_seqlens": torch.tensor([0, 4, 5, 10, 10], device=device),
    }
    results = []
    for packed in (True, False):
        if packed:
            out = model(hidden, **{given: packing[given]})
        else:
            out = torch.cat([model(part) for part in hidden.split(lengths, dim=1)], dim=1)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*model.parameters()])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_packed_prompt_is_continued_by_a_batch(model, device):
    """Also where it is longer than a row of the cache, and has a sequence without a token."""
    lengths = torch.tensor([5, 1, 0, 7], dtype=torch.int32, device=device)
    sizes = lengths.tolist()
    rows = [torch.randn(1, n + 3, 32, device=device) for n in sizes]
    prompt = torch.cat([row[:, :n] for row, n in zip(rows, sizes, strict=True)], dim=1)
    params = InferenceParams(max_seqlen=10, max_batch_size=4)
    with torch.no_grad():
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        outs = model(prompt, inference_params=params, cu_seqlens=cu_seqlens).split(sizes, dim=1)
        params.seqlen_offset, params.lengths_per_sample = 7, lengths.clone()
        for t in range(3):
            token = torch.cat([row[:, n + t, None] for row, n in zip(rows, sizes, strict=True)])
            step = model(token, inference_params=params)
            outs = [torch.cat([o, s.unsqueeze(0)], 1) for o, s in zip(outs, step, strict=True)]
            params.seqlen_offset += 1
            params.lengths_per_sample += 1
        for out, row in zip(outs, rows, strict=True):
            torch.testing.assert_close(out, model(row), rtol=1e-4, atol=1e-5)
        params = InferenceParams(max_seqlen=10, max_batch_size=4)
        seq_idx = torch.zeros(1, 13, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match="needs cu_seqlens"):
            model(prompt, inference_params=params, seq_idx=seq_idx)
        params = InferenceParams(max_seqlen=6, max_batch_size=4)
        with pytest.raises(ValueError, match="room for 6 tokens, got a sequence of 7"):
            model(prompt, inference_params=params, cu_seqlens=cu_seqlens)
        with pytest.raises(RuntimeError, match="seq_idx must have shape"):
            model(prompt, seq_idx=seq_idx[:, 1:])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 0)], ids=str)
def test_empty_batches_and_sequences(model, device, shape):
    hidden = torch.randn(*shape, 32, device=device)
    index = torch.zeros(shape, dtype=torch.int32, device=device)
    assert model(hidden).shape == model(hidden, seq_idx=index).shape == hidden.shape
    if shape == (1, 0):
        params = InferenceParams(max_seqlen=4, max_batch_size=2)
        bounds = torch.zeros(3, dtype=torch.int32, device=device)
        assert model(hidden, inference_params=params, cu_seqlens=bounds).shape == hidden.shape
        assert not any(s.any() for s in params.key_value_memory_dict[0] if s is not None)


def test_caches(device):
    model = MHA(32, 4, num_heads_kv=2, d_conv=3, layer_idx=5, dtype=torch.bfloat16, device=device)
    kv, conv = model.allocate_inference_cache(3, 10)
    assert kv.shape == (3, 10, 2, 2, 8) and conv.shape == (3, 64, 3)
    assert kv.dtype == conv.dtype == torch.bfloat16
    assert model.allocate_inference_cache(3, 10, dtype=torch.float32)[0].dtype == torch.float32
    assert MHA(32, 4).allocate_inference_cache(1, 1)[1] is None
    params = InferenceParams(max_seqlen=4, max_batch_size=3)
    model(torch.randn(3, 4, 32, device=device, dtype=torch.bfloat16), inference_params=params)
    params.seqlen_offset = 4
    with pytest.raises(ValueError, match="room for 4 tokens, got 1 after 4"):
        model(torch.randn(3, 1, 32, device=device, dtype=torch.bfloat16), inference_params=params)
    with pytest.raises(AssertionError, match="layer_idx"):
        MHA(32, 4)(torch.randn(1, 1, 32), inference_params=params)


def test_bad_widths_are_refused():
    for options, message in (
        ({"num_heads": 5}, "embed_dim"),
        ({"num_heads": 4, "num_heads_kv": 3}, "num_heads_kv"),
        ({"num_heads": 4, "rotary_emb_dim": 3}, "rotary_emb_dim"),
        ({"num_heads": 4, "rotary_emb_dim": 10}, "rotary_emb_dim"),
    ):
        with pytest.raises(AssertionError, match=message):
            MHA(32, **options)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_of_rotated_vectors_depend_on_the_distance_alone(interleaved):
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(a, b):
        turn = [
            rotate(x, torch.tensor([[p]]), 8, interleaved=interleaved) for x, p in ((q, a), (k, b))
        ]
        return (turn[0] * turn[1]).sum()

    torch.testing.assert_close(score(3, 1), score(43, 41), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(3, 1), score(4, 1), rtol=1e-3)


def test_autocast_with_a_cache_of_the_weights_dtype(device, hidden):
    model = MHA(32, 4, causal=True, layer_idx=0, d_conv=4, rotary_emb_dim=8).to(device)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    outs = []
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        for part in hidden.split([5, 1, 1, 1, 1], dim=1):
            outs.append(model(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(outs, 1).float(), model(hidden), rtol=0.05, atol=0.03)
