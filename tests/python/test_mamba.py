"""The Mamba layer: parameters, initialisation, caches, and agreement of its forms."""

import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.causal_conv1d import causal_conv1d_ref
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils.generation import InferenceParams


def test_parameters_have_upstreams_names_and_shapes():
    model = Mamba(48, d_state=8, d_conv=3, expand=2, bias=True)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {
        "A_log": (96, 8),
        "D": (96,),
        "in_proj.weight": (192, 48),
        "in_proj.bias": (192,),
        "conv1d.weight": (96, 1, 3),
        "conv1d.bias": (96,),
        "x_proj.weight": (3 + 16, 96),
        "dt_proj.weight": (96, 3),
        "dt_proj.bias": (96,),
        "out_proj.weight": (48, 96),
        "out_proj.bias": (48,),
    }
    names = set(Mamba(48, conv_bias=False).state_dict())
    assert not names & {"in_proj.bias", "conv1d.bias", "out_proj.bias"}


def test_initialisation():
    model = Mamba(64, dtype=torch.bfloat16, dt_rank=16, dt_min=0.01, dt_max=0.2)
    assert model.A_log.dtype == model.D.dtype == torch.float32
    assert model.in_proj.weight.dtype == torch.bfloat16
    expected = torch.arange(1.0, 17.0).log().expand(128, -1)
    torch.testing.assert_close(model.A_log.detach(), expected)
    assert (model.D == 1).all()
    dt = F.softplus(model.dt_proj.bias.float())
    assert dt.min() > 0.01 * 0.98 and dt.max() < 0.2 * 1.02
    log_dt = (dt.log() - math.log(0.01)) / math.log(20)
    assert 0.35 < log_dt.mean() < 0.65  # uniform in the logarithm
    assert model.dt_proj.weight.abs().max() <= 16**-0.5
    assert model.A_log._no_weight_decay and model.D._no_weight_decay
    assert model.dt_proj.bias._no_reinit
    assert (Mamba(64, dt_init="constant", dt_scale=2.0).dt_proj.weight == 2 * 4**-0.5).all()
    with pytest.raises(NotImplementedError, match="dt_init"):
        Mamba(64, dt_init="zero")


def plain(model, hidden):
    """The layer's equations in plain PyTorch."""
    x, z = (
        F.linear(hidden, model.in_proj.weight, model.in_proj.bias).transpose(1, 2).chunk(2, dim=1)
    )
    x = causal_conv1d_ref(x, model.conv1d.weight.squeeze(1), model.conv1d.bias, activation="silu")
    dt, B, C = model.x_proj(x.transpose(1, 2)).split(
        [model.dt_rank, model.d_state, model.d_state], -1
    )
    y = selective_scan_ref(
        x,
        F.linear(dt, model.dt_proj.weight).transpose(1, 2),
        -torch.exp(model.A_log),
        B.transpose(1, 2),
        C.transpose(1, 2),
        model.D,
        z,
        model.dt_proj.bias,
        delta_softplus=True,
    )
    return model.out_proj(y.transpose(1, 2))


@pytest.mark.parametrize("fast", [True, False], ids=["fast_path", "plain_path"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 3, 37])
def test_forward_and_backward_are_the_equations(device, bias, length, fast):
    model = Mamba(32, bias=bias, use_fast_path=fast).to(device)
    hidden = torch.randn(2, length, 32, device=device, requires_grad=True)
    results = []
    for function in (model, lambda h: plain(model, h)):
        out = function(hidden)
        wanted = [hidden, *model.parameters()]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_fast_path_keeps_less_for_the_backward_pass(device):
    hidden = torch.randn(2, 64, 32, device=device)

    def kept(model):
        found = {}

        def pack(tensor):
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(hidden)
        return sum(found.values())

    fast, plain = (Mamba(32, use_fast_path=use).to(device) for use in (True, False))
    assert kept(fast) < 0.75 * kept(plain)


@pytest.mark.parametrize("fast", [True, False], ids=["fast_path", "plain_path"])
@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)], ids=str)
def test_empty_batches_and_sequences(device, shape, fast):
    model = Mamba(32, layer_idx=0, use_fast_path=fast).to(device)
    hidden = torch.randn(shape, device=device, requires_grad=True)
    out = model(hidden)
    out.sum().backward()
    assert out.shape == shape and hidden.grad.shape == shape
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    params = InferenceParams(max_seqlen=5, max_batch_size=shape[0])
    assert model(hidden, inference_params=params).shape == shape
    assert not any(state.any() for state in params.key_value_memory_dict[0])


@pytest.mark.parametrize("prompt", [0, 1, 2, 9])
def test_steps_continue_a_prompt(device, prompt):
    """Prompt and decoding together are the forward pass over the whole, with a state wider than d_conv - 1."""
    model = Mamba(32, layer_idx=0).to(device)
    hidden = torch.randn(2, 12, 32, device=device)
    params = InferenceParams(max_seqlen=12, max_batch_size=2)
    parts = []
    with torch.no_grad():
        whole = model(hidden)
        if prompt:
            parts.append(model(hidden[:, :prompt], inference_params=params))
        else:
            params.key_value_memory_dict[0] = model.allocate_inference_cache(2, 12)
        states = params.key_value_memory_dict[0]
        for t in range(prompt, 12):
            params.seqlen_offset = t
            if t:
                parts.append(model(hidden[:, t : t + 1], inference_params=params))
            else:
                parts.append(model.step(hidden[:, :1], *states)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert params.key_value_memory_dict[0][1] is states[1]


@pytest.mark.parametrize("lengths", [[5, 6], [1, 1, 9], [11]], ids=str)
def test_packed_sequences_are_separate_ones(device, lengths):
    model = Mamba(32, layer_idx=0).to(device)
    hidden = torch.randn(2, sum(lengths), 32, device=device, requires_grad=True)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    packed = model(hidden, seq_idx=index.to(device, torch.int32).expand(2, -1))
    apart = torch.cat([model(part) for part in hidden.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    leaves, weights = [hidden, *model.parameters()], torch.randn_like(packed)
    for got, expected in zip(
        *(torch.autograd.grad((out * weights).sum(), leaves) for out in (packed, apart)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="one a row"):
        model(hidden, inference_params=InferenceParams(11, 2), seq_idx=index)


def test_caches(device):
    model = Mamba(32, layer_idx=3, dtype=torch.bfloat16, device=device)
    conv, ssm = model.allocate_inference_cache(4, 100)
    assert (conv.shape, ssm.shape) == ((4, 64, 4), (4, 64, 16))
    assert conv.dtype == ssm.dtype == torch.bfloat16 and not conv.any() and not ssm.any()
    assert model.allocate_inference_cache(4, 100, dtype=torch.float32)[1].dtype == torch.float32
    params = InferenceParams(max_seqlen=9, max_batch_size=4)
    first = model._get_states_from_cache(params, 4)
    first[0].fill_(1.0)
    assert model._get_states_from_cache(params, 4) is first
    assert not model._get_states_from_cache(params, 4, initialize_states=True)[0].any()
    assert model._get_states_from_cache(params, 2)[0].shape[0] == 2
    with pytest.raises(AssertionError, match="layer_idx"):
        Mamba(32)._get_states_from_cache(params, 4)


def test_step_takes_one_token():
    model = Mamba(32)
    with pytest.raises(AssertionError, match="one token"):
        model.step(torch.randn(1, 2, 32), *model.allocate_inference_cache(1, 1))


def test_states_may_have_a_dtype_of_their_own(device):
    """A float32 cache of a bfloat16 layer, as allocate_inference_cache(dtype=) gives it."""
    model = Mamba(32, layer_idx=0, dtype=torch.bfloat16, device=device)
    hidden = torch.randn(2, 12, 32, device=device, dtype=torch.bfloat16)
    outs = {}
    for dtype in (torch.float32, torch.bfloat16):
        states = model.allocate_inference_cache(2, 12, dtype=dtype)
        with torch.no_grad():
            steps = [model.step(hidden[:, t : t + 1], *states)[0] for t in range(12)]
        outs[dtype] = torch.cat(steps, dim=1)
        assert states[0].dtype == states[1].dtype == dtype and steps[0].dtype == torch.bfloat16
    torch.testing.assert_close(*outs.values(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(device, dtype):
    model = Mamba(32).to(device)
    hidden = torch.randn(2, 20, 32, device=device)
    whole = model(hidden)
    out = model.to(dtype)(hidden.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), whole, rtol=0.05, atol=0.02)


def test_autocast(device):
    model = Mamba(32, bias=True).to(device)
    hidden = torch.randn(2, 20, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = model(hidden)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(out.float(), model(hidden), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(device, dynamic):
    model = Mamba(32).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 23):
        hidden = torch.randn(2, length, 32, device=device)
        results = []
        for function in (model, compiled):
            out = function(hidden)
            results.append(
                (out, *torch.autograd.grad(out.square().sum(), list(model.parameters())))
            )
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_step_compiles_to_one_graph(device):
    """With states that the graph changes."""
    model = Mamba(32).to(device)
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    expected, got = (model.allocate_inference_cache(2, 1) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            token = torch.randn(2, 1, 32, device=device)
            torch.testing.assert_close(compiled(token, *got)[0], model.step(token, *expected)[0])
    torch.testing.assert_close(got, expected)


HOST_COMPILER = "cl" if sys.platform == "win32" else "g++"


@pytest.mark.skipif(not shutil.which(HOST_COMPILER), reason="inductor needs a C++ compiler")
def test_compiles_through_inductor(device):
    model = Mamba(32).to(device)
    hidden = torch.randn(2, 9, 32, device=device)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), model(hidden), rtol=1e-4, atol=1e-5)


def test_exports(device):
    model = Mamba(32).to(device)
    length = torch.export.Dim("length", min=2, max=100)
    exported = torch.export.export(
        model, (torch.randn(2, 9, 32, device=device),), dynamic_shapes=({1: length},)
    )
    hidden = torch.randn(2, 31, 32, device=device)
    torch.testing.assert_close(exported.module()(hidden), model(hidden))


@pytest.mark.skipif(not shutil.which(HOST_COMPILER), reason="inductor needs a C++ compiler")
def test_packages_for_aot_inductor(tmp_path):
    """A package of the layer, for sequences of several lengths, run without its Python code."""
    model = Mamba(32).eval()
    length = torch.export.Dim("length", min=2, max=100)
    with torch.no_grad():
        exported = torch.export.export(
            model, (torch.randn(2, 9, 32),), dynamic_shapes=({1: length},)
        )
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "mamba.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for length in (9, 31):
            hidden = torch.randn(2, length, 32)
            torch.testing.assert_close(package(hidden), model(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, RMSNorm])
def test_block_fused_is_unfused(device, norm, residual_in_fp32):
    def block(fused):
        torch.manual_seed(3)
        return Block(32, Mamba, GatedMLP, norm, fused, residual_in_fp32).to(device)

    hidden, residual = torch.randn(2, 5, 32, device=device), torch.randn(2, 5, 32, device=device)
    fused, unfused = block(True), block(False)
    assert set(fused.state_dict()) == set(unfused.state_dict())
    for given in (None, residual):
        torch.testing.assert_close(fused(hidden, given), unfused(hidden, given))


def test_a_fused_block_needs_a_norm_that_it_knows():
    with pytest.raises(AssertionError, match="LayerNorm or an RMSNorm"):
        Block(32, Mamba, torch.nn.Identity, torch.nn.RMSNorm, fused_add_norm=True)


@pytest.mark.parametrize("fused", [True, False])
def test_the_residual_of_a_half_precision_block_may_stay_in_float32(device, fused):
    hidden = torch.randn(2, 5, 32, device=device, dtype=torch.bfloat16)
    for in_fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        block = Block(32, Mamba, GatedMLP, RMSNorm, fused, in_fp32).to(device, torch.bfloat16)
        out, residual = block(hidden)
        assert out.dtype == torch.bfloat16 and residual.dtype == dtype


def test_block_hands_cache_and_keywords_to_its_mixer():
    class Mixer(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, hidden, inference_params=None, **keywords):
            self.seen = inference_params, keywords
            return hidden

        def allocate_inference_cache(self, *arguments, **keywords):
            return arguments, keywords

    block = Block(8, Mixer, torch.nn.Identity)
    block(torch.randn(1, 2, 8), inference_params="params", seq_idx=3)
    assert block.mixer.seen == ("params", {"seq_idx": 3})
    cache = block.allocate_inference_cache(2, 9, dtype=torch.float16, layer=1)
    assert cache == ((2, 9), {"dtype": torch.float16, "layer": 1})


def test_block_without_mlp_has_one_norm():
    names = {name.split(".")[0] for name in Block(32, Mamba, torch.nn.Identity).state_dict()}
    assert names == {"norm", "mixer"}


def test_gated_mlp():
    mlp = GatedMLP(48)
    assert mlp.fc1.weight.shape == (2 * 128, 48) and mlp.fc2.weight.shape == (48, 128)
    x = torch.randn(3, 48)
    y, gate = F.linear(x, mlp.fc1.weight).chunk(2, -1)
    torch.testing.assert_close(mlp(x), F.linear(y * F.silu(gate), mlp.fc2.weight))


def test_block_is_importable_from_its_old_path():
    from mamba_ssm.modules import mamba_simple

    assert mamba_simple.Block is Block


def test_vmap_is_a_loop(device):
    """Over a batch of batches; the layer's parameters serve all."""
    model = Mamba(32).to(device)
    hidden = torch.randn(3, 2, 9, 32, device=device)
    mapped = torch.func.vmap(model, in_dims=1)(hidden.transpose(0, 1))
    whole = torch.stack([model(one) for one in hidden])
    torch.testing.assert_close(mapped, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fast_path", "plain_path"])
def test_gradients_of_each_sample_are_a_loop(device, fast):
    model = Mamba(32, bias=True, use_fast_path=fast).to(device)
    parameters = dict(model.named_parameters())
    hidden = torch.randn(3, 9, 32, device=device)

    def loss(parameters, one):
        return torch.func.functional_call(model, parameters, (one.unsqueeze(0),)).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, hidden)
    for i, one in enumerate(hidden):
        gradients = torch.autograd.grad(loss(parameters, one), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(mapped[name][i], gradient, rtol=1e-4, atol=1e-5)


def test_vmap_over_layers_of_an_ensemble(device):
    layers = [Mamba(32).to(device) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    hidden = torch.randn(2, 9, 32, device=device)

    def run(parameters, hidden):
        return torch.func.functional_call(layers[0], (parameters, buffers), (hidden,))

    mapped = torch.func.vmap(run, in_dims=(0, None))(parameters, hidden)
    whole = torch.stack([layer(hidden) for layer in layers])
    torch.testing.assert_close(mapped, whole, rtol=1e-4, atol=1e-5)
