"""The Mamba-2 layers: parameters, initialisation, caches, packed sequences, and agreement of their forms."""

import copy
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, create_block
from mamba_ssm.modules.bimamba import BiMamba2
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.causal_conv1d import causal_conv1d_ref
from mamba_ssm.ops.triton.ssd_combined import ssd_selective_scan
from mamba_ssm.utils.determinism import set_deterministic_mode
from mamba_ssm.utils.generation import InferenceParams
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = {"d_model": 24, "d_state": 10, "headdim": 8}
ROWS = {
    "base": {},
    "groups": {"ngroups": 3},
    "no_norm": {"rmsnorm": False},
    "norm_before_gate": {"norm_before_gate": True, "ngroups": 2},
    "mlp": {"d_ssm": 32},
    "mlp_no_norm": {"d_ssm": 32, "rmsnorm": False},
    "D_per_channel": {"D_has_hdim": True},
    "limits": {"dt_limit": (0.005, 0.02)},
    "bias": {"bias": True, "conv_bias": False},
    "everything": {
        "ngroups": 2,
        "d_ssm": 32,
        "D_has_hdim": True,
        "dt_limit": (0.005, 0.02),
        "bias": True,
        "d_conv": 3,
    },
}


@pytest.fixture(params=ROWS)
def options(request):
    return SMALL | ROWS[request.param]


def test_parameters_have_upstreams_names_and_shapes():
    model = Mamba2(48, d_state=16, d_conv=3, headdim=8, ngroups=2, d_ssm=64, bias=True)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {
        "in_proj.weight": (192 + 64 + 8, 48),
        "in_proj.bias": (192 + 64 + 8,),
        "conv1d.weight": (128, 1, 3),
        "conv1d.bias": (128,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "norm.weight": (64,),
        "out_proj.weight": (48, 96),
        "out_proj.bias": (48,),
    }
    names = set(Mamba2(48, headdim=8, rmsnorm=False, conv_bias=False).state_dict())
    assert not names & {"norm.weight", "in_proj.bias", "conv1d.bias", "out_proj.bias"}
    assert Mamba2(48, headdim=8, D_has_hdim=True).D.shape == (96,)
    simple = Mamba2Simple(64, learnable_init_states=True)
    assert set(simple.state_dict()) == {*Mamba2(64).state_dict(), "init_states"}
    assert simple.init_states.shape == (1, 128, 64) and not simple.init_states.any()
    assert simple.init_states._no_weight_decay


def test_initialisation():
    model = Mamba2(
        512,
        headdim=4,
        dt_min=0.01,
        dt_max=0.2,
        A_init_range=(2, 5),
        conv_init=0.1,
        dtype=torch.bfloat16,
    )
    A = model.A_log.detach().float().exp()
    assert A.min() > 1.97 and A.max() < 5.04 and A.std() > 0.7
    assert model.D.dtype == torch.float32 and (model.D == 1).all()
    assert model.A_log.dtype == model.dt_bias.dtype == model.norm.weight.dtype == torch.bfloat16
    dt = F.softplus(model.dt_bias.detach().float())
    assert dt.min() > 0.01 * 0.98 and dt.max() < 0.2 * 1.02
    log_dt = (dt.log() - math.log(0.01)) / math.log(20)
    assert 0.4 < log_dt.mean() < 0.6  # uniform in the logarithm
    assert model.conv1d.weight.abs().max() <= 0.1 and (model.norm.weight == 1).all()
    assert all(p._no_weight_decay for p in (model.A_log, model.D, model.dt_bias))
    assert (F.softplus(Mamba2(64, dt_min=1e-6, dt_max=1e-5).dt_bias) > 0.99e-4).all()


def plain(model, u):
    """The layer's equations in plain PyTorch."""
    parts = [2 * (model.d_inner - model.d_ssm), model.d_ssm, model.conv_dim, model.nheads]
    zx0, z, xBC, dt = model.in_proj(u).split(parts, dim=-1)
    weight, bias = model.conv1d.weight.squeeze(1), model.conv1d.bias
    xBC = causal_conv1d_ref(xBC.mT, weight, bias, activation="silu").mT
    states = model.ngroups * model.d_state
    x, B, C = xBC.split([model.d_ssm, states, states], dim=-1)
    y = ssd_selective_scan(
        x.unflatten(-1, (model.nheads, -1)),
        dt,
        -torch.exp(model.A_log),
        *(t.unflatten(-1, (model.ngroups, -1)) for t in (B, C)),
        D=model.D.view(model.nheads, -1).expand(-1, model.headdim),
        dt_bias=model.dt_bias,
        dt_softplus=True,
        dt_limit=model.dt_limit,
    ).flatten(2)

    def normalise(y):
        groups = y.unflatten(-1, (model.ngroups, -1))
        rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
        return (groups * rstd).flatten(-2) * model.norm.weight

    if not model.rmsnorm:
        y = y * F.silu(z)
    elif model.norm_before_gate:
        y = normalise(y) * F.silu(z)
    else:
        y = normalise(y * F.silu(z))
    gate, up = zx0.chunk(2, dim=-1)
    return model.out_proj(torch.cat([F.silu(gate) * up, y], dim=-1))


def assert_same(functions, inputs, parameters, tolerance=2e-4):
    results, wanted = [], [*inputs, *parameters]
    for function in functions:
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("fast", [True, False], ids=["mem_eff_path", "plain_path"])
@pytest.mark.parametrize("length", [1, 3, 37])
def test_forward_and_backward_are_the_equations(device, options, length, fast):
    model = Mamba2(**options, use_mem_eff_path=fast).to(device)
    with torch.no_grad():  # what starts equal must not hide another's place
        for parameter in (model.D, *(p for n, p in model.named_parameters() if "norm" in n)):
            parameter.uniform_(0.5, 2)
    u = torch.randn(2, length, 24, device=device, requires_grad=True)
    assert_same((model, lambda u: plain(model, u)), [u], model.parameters())


def test_flattened_rows(device):
    model = Mamba2(**SMALL).to(device)
    u = torch.randn(2, 7, 24, device=device)
    assert torch.equal(model(u.flatten(0, 1), seqlen=7), model(u).flatten(0, 1))


@pytest.mark.parametrize("prompt", [0, 1, 2, 9])
def test_steps_continue_a_prompt(device, options, prompt):
    model = Mamba2(**options, layer_idx=0).to(device)
    u = torch.randn(2, 12, 24, device=device)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    parts = []
    with torch.no_grad():
        whole = model(u)
        if prompt:
            parts.append(model(u[:, :prompt], inference_params=params))
        else:
            params.key_value_memory_dict[0] = model.allocate_inference_cache(2, 12)
        states = params.key_value_memory_dict[0]
        for t in range(prompt, 12):
            params.seqlen_offset = t
            if t:
                parts.append(model(u[:, t : t + 1], inference_params=params))
            else:
                parts.append(model.step(u[:, :1], *states)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert params.key_value_memory_dict[0][1] is states[1]


LENGTHS = pytest.mark.parametrize("lengths", [[5, 6], [1, 1, 9], [11]], ids=str)


def bounds(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def indices(lengths, device, rows=1):
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return index.to(device, torch.int32).expand(rows, -1)


@pytest.mark.parametrize("fast", [True, False], ids=["mem_eff_path", "plain_path"])
@LENGTHS
def test_packed_sequences_are_separate_ones(device, lengths, fast):
    model = Mamba2(**SMALL, use_mem_eff_path=fast).to(device)
    u = torch.randn(2, 11, 24, device=device, requires_grad=True)

    def packed(u):
        return model(u, seq_idx=indices(lengths, device, 2))

    def apart(u):
        return torch.cat([model(part) for part in u.split(lengths, dim=1)], dim=1)

    assert_same((packed, apart), [u], model.parameters())
    by_bounds = model(u[:1], cu_seqlens=bounds(lengths, device))
    torch.testing.assert_close(by_bounds, packed(u)[:1])


@pytest.mark.parametrize("given", ["cu_seqlens", "both"])
@pytest.mark.parametrize("options", [ROWS["base"], ROWS["everything"]], ids=["base", "everything"])
def test_a_packed_prompt_is_continued_by_a_batch(device, options, given):
    """A sequence without a token too: its states are zeros."""
    model = Mamba2(**SMALL | options, layer_idx=0).to(device)
    lengths = [5, 1, 0, 7]
    rows = [torch.randn(1, n + 3, 24, device=device) for n in lengths]
    prompt = torch.cat([row[:, :n] for row, n in zip(rows, lengths, strict=True)], dim=1)
    params = InferenceParams(max_seqlen=16, max_batch_size=4)
    packing = {"cu_seqlens": bounds(lengths, device)}
    packing |= {"seq_idx": indices(lengths, device)} if given == "both" else {}
    with torch.no_grad():
        outs = list(model(prompt, inference_params=params, **packing).split(lengths, dim=1))
        for t in range(3):
            params.seqlen_offset = 7 + t
            token = torch.cat([row[:, n + t, None] for row, n in zip(rows, lengths, strict=True)])
            step = model(token, inference_params=params)
            outs = [torch.cat([o, s.unsqueeze(0)], 1) for o, s in zip(outs, step, strict=True)]
        for out, row in zip(outs, rows, strict=True):
            torch.testing.assert_close(out, model(row), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        params = InferenceParams(max_seqlen=16, max_batch_size=4)
        model(prompt, seq_idx=indices(lengths, device), inference_params=params)


def test_caches(device):
    model = Mamba2(**SMALL, layer_idx=3, dtype=torch.bfloat16, device=device)
    conv, ssm = model.allocate_inference_cache(4, 100)
    assert (conv.shape, ssm.shape) == ((4, 48 + 20, 4), (4, 6, 8, 10)) and conv.stride(1) == 1
    assert conv.dtype == ssm.dtype == torch.bfloat16 and not conv.any() and not ssm.any()
    assert model.allocate_inference_cache(4, 100, dtype=torch.float32)[1].dtype == torch.float32
    params = InferenceParams(max_seqlen=9, max_batch_size=4)
    first = model._get_states_from_cache(params, 4)
    first[0].fill_(1.0)
    assert model._get_states_from_cache(params, 4) is first
    assert not model._get_states_from_cache(params, 4, initialize_states=True)[0].any()
    assert model._get_states_from_cache(params, 2)[0].shape[0] == 2
    with pytest.raises(AssertionError, match="layer_idx"):
        Mamba2(**SMALL)._get_states_from_cache(params, 4)
    with pytest.raises(AssertionError, match="one token"):
        model.step(torch.randn(1, 2, 24), conv, ssm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_stay_near_float32(device, dtype):
    model = Mamba2(**SMALL, layer_idx=0).to(device)
    u = torch.randn(2, 20, 24, device=device)
    whole = model(u)
    with torch.autocast(device, dtype=dtype):
        out = model(u)
        params = InferenceParams(max_seqlen=20, max_batch_size=2)
        with torch.no_grad():
            steps = [model(u[:, :9], inference_params=params)]
            for params.seqlen_offset in range(9, 20):
                token = u[:, params.seqlen_offset, None]
                steps.append(model(token, inference_params=params))
    out.float().sum().backward()
    assert out.dtype == dtype and all(p.grad.dtype == torch.float32 for p in model.parameters())
    for result in (out, torch.cat(steps, dim=1), model.to(dtype)(u.to(dtype))):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), whole, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)], ids=str)
def test_empty_batches_and_sequences(device, shape):
    model = Mamba2(**SMALL, layer_idx=0).to(device)
    u = torch.randn(shape, device=device, requires_grad=True)
    out = model(u)
    out.sum().backward()
    assert out.shape == shape and u.grad.shape == shape
    assert not any(p.grad.any() for p in model.parameters())
    params = InferenceParams(max_seqlen=5, max_batch_size=shape[0])
    assert model(u, inference_params=params).shape == shape
    assert not any(state.any() for state in params.key_value_memory_dict[0])


def test_compiles_to_one_graph(device):
    model = Mamba2(**SMALL).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 23):
        u = torch.randn(2, length, 24, device=device, requires_grad=True)
        assert_same((model, compiled), [u], model.parameters())


class Computed(TorchDispatchMode):
    """Names of the operations that run, without those that only look at memory otherwise."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layer, options, expected",
    [
        (Mamba2, SMALL, "mm causal_conv1d_update selective_state_update gated_norm_forward mm"),
        (
            Mamba2,
            SMALL | ROWS["limits"] | ROWS["no_norm"],
            "mm causal_conv1d_update selective_state_update mm",
        ),
        (Mamba, {"d_model": 24}, "mm causal_conv1d_update mm mm selective_state_update mm"),
    ],
    ids=["mamba2", "mamba2 without norm, with limits", "mamba"],
)
def test_a_step_computes_nothing_beside_products_and_our_operations(
    device, layer, options, expected, dtype
):
    """On a GPU every other operation would be a kernel of a microsecond or two, as long as ours take."""
    layer = layer(**options, device=device, dtype=dtype)
    states = layer.allocate_inference_cache(2, 1)
    token = torch.randn(2, 1, 24, device=device, dtype=dtype)
    with torch.no_grad(), Computed() as computed:
        layer.step(token, *states)
    assert computed.names == expected.split()


def test_step_compiles_to_one_graph(device):
    model = Mamba2(**SMALL).to(device)
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    expected, got = (model.allocate_inference_cache(2, 1) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            token = torch.randn(2, 1, 24, device=device)
            torch.testing.assert_close(compiled(token, *got)[0], model.step(token, *expected)[0])
    torch.testing.assert_close(got, expected)


def test_gradients_for_each_sample(device):
    """torch.func over the layer: vmap of its gradient is the gradient of each row."""
    model = Mamba2(**SMALL).to(device)
    u = torch.randn(3, 5, 24, device=device)
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row.unsqueeze(0),)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, u)
    for i, row in enumerate(u):
        rows = torch.autograd.grad(loss(parameters, row), parameters.values())
        for name, grad in zip(parameters, rows, strict=True):
            torch.testing.assert_close(each[name][i], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_mode_gives_the_same_bits(device, dtype):
    """And results near those of the default mode."""
    model = Mamba2(64, d_state=16, headdim=64, chunk_size=16).to(device, dtype)
    u = torch.randn(4, 300, 64, device=device, dtype=dtype, requires_grad=True)

    def run():
        out = model(u)
        return out, *torch.autograd.grad(out.sum(), [u, *model.parameters()])

    default = run()
    set_deterministic_mode(True)
    try:
        first, *others = (run() for _ in range(5))
    finally:
        set_deterministic_mode(None)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, default, strict=True):
        scale = b.float().abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * scale)


def test_bad_widths_are_refused():
    for options, message in (
        ({"headdim": 7}, "headdim must divide"),
        ({"ngroups": 4}, "ngroups must divide"),
        ({"d_ssm": 64}, "d_ssm must be at most"),
        ({"A_init_range": (0, 1)}, "A_init_range"),
    ):
        with pytest.raises(AssertionError, match=message):
            Mamba2(**SMALL | options)
    with pytest.raises(ValueError, match="process_group must be None, got str"):
        Mamba2(**SMALL, process_group="world")
    with pytest.raises(ValueError, match="batch 2"):
        Mamba2(**SMALL)(torch.randn(2, 4, 24), cu_seqlens=torch.tensor([0, 4]))


def test_it_is_saved_and_loaded_by_the_hubs_mixin(tmp_path):
    pytest.importorskip("safetensors", reason="the hub's mixin writes safetensors")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model = Mamba2(**SMALL, ngroups=2)
    model.save_pretrained(tmp_path)
    loaded = Mamba2.from_pretrained(tmp_path)
    u = torch.randn(1, 5, 24)
    assert torch.equal(loaded(u), model(u))


# ---- Mamba2Simple ----


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("activation", [None, "swish"])
def test_simple_has_one_result_on_both_paths(device, learnt, activation):
    """Upstream's unfused path norms without groups and lets packed sequences see each other."""
    options = {"learnable_init_states": learnt, "activation": activation, "ngroups": 2}
    model = Mamba2Simple(24, d_state=6, headdim=8, layer_idx=0, **options).to(device)
    if learnt:
        torch.nn.init.normal_(model.init_states)
    u = torch.randn(2, 9, 24, device=device, requires_grad=True)
    seq_idx = indices([4, 5], device, 2)

    def run(u, fused):
        model.use_mem_eff_path = fused
        return model(u, seq_idx)

    paths = [functools.partial(run, fused=fused) for fused in (True, False)]
    assert_same(paths, [u], model.parameters())


def test_simple_starts_from_learnt_states_in_steps_too(device):
    model = Mamba2Simple(24, d_state=6, headdim=8, learnable_init_states=True, layer_idx=0).to(
        device
    )
    u = torch.randn(2, 6, 24, device=device)
    zero = model(u)
    torch.nn.init.normal_(model.init_states)
    whole = model(u)
    assert (whole - zero)[:, 0].abs().max() > 1e-3
    with torch.no_grad():
        states = model.allocate_inference_cache(2, 6)
        steps = [model.step(u[:, t : t + 1], *states)[0] for t in range(6)]
        params = InferenceParams(max_seqlen=6, max_batch_size=2)
        prompt = model(u[:, :4], inference_params=params)
        params.seqlen_offset = 4
        after = model(u[:, 4:5], inference_params=params)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([prompt, after], 1), whole[:, :5], rtol=1e-4, atol=1e-4)


# ---- models ----

CONFIG = {
    "d_model": 32,
    "n_layer": 3,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16},
}
MODELS = {
    "mamba2": {},
    "hybrid": {
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 4, "causal": True, "rotary_emb_dim": 8},
        "d_intermediate": 48,
    },
    # The options of the published mamba2attn-2.7b and transformerpp-2.7b.
    "convolved_attention": {
        "attn_layer_idx": [0, 2],
        "attn_cfg": {
            "num_heads": 4,
            "head_dim": 10,
            "causal": True,
            "d_conv": 4,
            "rotary_emb_dim": 6,
            "qkv_proj_bias": False,
            "out_proj_bias": False,
        },
    },
    "attention_alone": {
        "attn_layer_idx": [0, 1, 2],
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "causal": True, "rotary_emb_dim": 8},
        "d_intermediate": 48,
        "rms_norm": False,
    },
}


@pytest.fixture(params=MODELS)
def model(request, device):
    config = MambaConfig(**CONFIG | MODELS[request.param])
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5}).to(device)


def scores(model, tokens, prompt, **options):
    output = model.generate(
        tokens[:, :prompt],
        tokens.shape[1],
        teacher_outputs=tokens,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(output.sequences, tokens)
    return torch.stack(output.scores, dim=1)


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_decoding_is_the_forward_pass(model, device, graphs):
    if graphs and device == "cpu":
        pytest.skip("CUDA graphs are CUDA's")
    tokens = torch.randint(0, 61, (3, 20), device=device)
    with torch.no_grad():
        whole = model(tokens).logits[:, 9:-1]
    torch.testing.assert_close(scores(model, tokens, 10, cg=graphs), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padding", [0, 7])
def test_a_packed_prompt_of_a_model(model, device, padding):
    """Lengths as they come, prefilled as one row, then decoded as a batch; padding is behind the last sequence."""
    lengths, more = [17, 6, 10], 4
    rows = [torch.randint(0, 61, (1, n + more), device=device) for n in lengths]
    prompt = torch.cat([row[:, :n] for row, n in zip(rows, lengths, strict=True)], dim=1)
    prompt = F.pad(prompt, (0, padding))
    params = InferenceParams(max_seqlen=32, max_batch_size=3)
    cu_seqlens = bounds(lengths, device)
    seq_idx = F.pad(indices(lengths, device), (0, padding), value=-1)
    packing = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    with torch.no_grad():
        logits = model(prompt, inference_params=params, **packing).logits
        outs = [logits[0, cu_seqlens[1:].long() - 1]]
        for t in range(more - 1):
            params.seqlen_offset = max(lengths) + t
            params.lengths_per_sample = cu_seqlens.diff() + t
            token = torch.cat([row[:, n + t, None] for row, n in zip(rows, lengths, strict=True)])
            outs.append(model(token, inference_params=params).logits[:, -1])
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            whole = model(row).logits[0, n - 1 : -1]
            torch.testing.assert_close(torch.stack(outs)[:, i], whole, rtol=1e-3, atol=1e-3)


def test_packed_rows_of_a_model_are_separate_ones(model, device):
    """Logits and gradients, eager and compiled to one graph."""
    lengths = [7, 1, 12]
    tokens = torch.randint(0, 61, (2, 20), device=device)
    seq_idx = indices(lengths, device, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for logits in (
        torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1),
        model(tokens, seq_idx=seq_idx).logits,
        compiled(tokens, seq_idx=seq_idx).logits,
    ):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        results.append((logits, *torch.autograd.grad(loss, [*model.parameters()])))
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4 * scale)


def test_a_model_learns(device):
    """A period of seven tokens."""
    model = MambaLMHeadModel(MambaConfig(**CONFIG)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(60, device=device).remainder(7).expand(2, -1)
    for _ in range(30):
        logits = model(text[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_a_model_is_saved_and_loaded(tmp_path):
    model = MambaLMHeadModel(MambaConfig(**CONFIG))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ssm_cfg"]["layer"] == "Mamba2"
    ids = torch.randint(0, 61, (1, 9))
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_blocks_know_their_layers():
    assert isinstance(create_block(32, ssm_cfg={"layer": "Mamba2", "headdim": 16}).mixer, Mamba2)
    with pytest.raises(ValueError, match="'Mamba1', 'Mamba2'"):
        create_block(32, ssm_cfg={"layer": "Mamba9"})


@pytest.mark.gpu
def test_step_and_forward_are_captured_in_a_graph():
    model = Mamba2(**SMALL, layer_idx=0).to("cuda")
    u = torch.randn(3, 6, 24, device="cuda")
    states, token = model.allocate_inference_cache(3, 6), u[:, :1].clone()
    with torch.no_grad():
        whole = model(u)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model.step(token, *states)
            model(u)
        torch.cuda.current_stream().wait_stream(side)
        graph, forward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, *_ = model.step(token, *states)
        with torch.cuda.graph(forward):
            again = model(u)
        for state in states:
            state.zero_()
        outs = []
        for t in range(6):
            token.copy_(u[:, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        forward.replay()
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, whole)


LAYERS = {
    "Mamba2": lambda: Mamba2(**SMALL),
    "Mamba2, everything": lambda: Mamba2(**SMALL | ROWS["everything"]),
    "Mamba2, plain path": lambda: Mamba2(**SMALL, use_mem_eff_path=False),
    "Mamba2Simple": lambda: Mamba2Simple(24, d_state=6, headdim=8, learnable_init_states=True),
    "BiMamba2": lambda: BiMamba2(**SMALL),
    "BiMamba2, gated": lambda: BiMamba2(**SMALL, tie_weights=False, fusion="gated"),
}


def train(model, u):
    out = model(u)
    return out, *torch.autograd.grad(out.square().sum(), [u, *model.parameters()])


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 70, 700])
def test_the_gpu_agrees_with_the_cpu(layer, length):
    u = torch.randn(2, length, 24)
    results = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(layer).to(device)
        results.append(train(model, u.to(device).requires_grad_()))
    for expected, got in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.gpu
def test_training_replays_from_cuda_graphs(layer):
    """Forward and backward, as make_graphed_callables captures them."""
    model = layer.to("cuda")
    sample, u = (torch.randn(2, 70, 24, device="cuda", requires_grad=True) for _ in range(2))
    expected = train(model, u)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (sample,))
    for got, wanted in zip(train(graphed, u), expected, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * scale)


def test_layers_export_with_a_free_length(layer, device):
    """For inference; what a backward pass keeps has a size of its own up to 256 steps."""
    layer = layer.to(device)
    length = torch.export.Dim("length", min=2, max=1000)
    sample = torch.randn(2, 9, 24, device=device)
    with torch.no_grad():
        exported = torch.export.export(
            layer, (sample,), dynamic_shapes={"u": {1: length}}, strict=False
        )
        for steps in (2, 31, 300):
            u = torch.randn(2, steps, 24, device=device)
            torch.testing.assert_close(exported.module()(u), layer(u))
