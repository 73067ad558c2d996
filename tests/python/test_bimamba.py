"""The bidirectional layer: two Mamba layers over the sequence and its mirror, packed or not."""

import pytest
import torch
from mamba_ssm.modules.bimamba import BiMamba
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.utils.generation import InferenceParams

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])


def directions(model):
    """Two Mamba layers that together are the model: of the sequence, and of its mirror."""
    state = model.state_dict()
    layers = []
    for suffix in ("", "" if model.tie_weights else "_b"):
        own = {"A_log": state[f"A{suffix}_log"], "D": state[f"D{suffix}"]}
        for name in ("conv1d", "x_proj", "dt_proj"):
            prefix = f"{name}{suffix}."
            own |= {
                f"{name}.{key.removeprefix(prefix)}": value
                for key, value in state.items()
                if key.startswith(prefix)
            }
        shared = {key: value for key, value in state.items() if key.startswith(("in_", "out_"))}
        layer = Mamba(model.d_model, model.d_state, bias=model.in_proj.bias is not None)
        layer.load_state_dict(own | shared)
        layers.append(layer.to(state["D"].device))
    return layers


def flipped_and_added(model, hidden):
    forward, backward = directions(model)
    bias = 0 if model.out_proj.bias is None else model.out_proj.bias  # both layers add it
    out = forward(hidden) + backward(hidden.flip(1)).flip(1) - bias
    return (out + bias) / 2 if model.divide_out else out


@TIED
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 37])
def test_it_is_mamba_and_mamba_of_the_mirror(device, tied, bias, length):
    model = BiMamba(32, tie_weights=tied, bias=bias).to(device)
    hidden = torch.randn(2, length, 32, device=device)
    torch.testing.assert_close(
        model(hidden), flipped_and_added(model, hidden), rtol=1e-4, atol=1e-5
    )


@TIED
def test_the_mirrored_sequence_gives_the_mirrored_output(device, tied):
    """Only where the weights are tied."""
    model = BiMamba(32, tie_weights=tied).to(device)
    hidden = torch.randn(2, 11, 32, device=device)
    same = torch.allclose(model(hidden.flip(1)).flip(1), model(hidden), rtol=1e-4, atol=1e-5)
    assert same is tied


def test_divide_out_halves(device):
    model = BiMamba(32, divide_out=True, bias=True).to(device)
    hidden = torch.randn(2, 11, 32, device=device)
    torch.testing.assert_close(
        model(hidden), flipped_and_added(model, hidden), rtol=1e-4, atol=1e-5
    )


@TIED
def test_every_output_depends_on_every_token(device, tied):
    model = BiMamba(16, tie_weights=tied).to(device)
    hidden = torch.randn(1, 9, 16, device=device, requires_grad=True)
    out = model(hidden)
    for t in (0, 4, 8):
        (gradient,) = torch.autograd.grad(out[:, t].sum(), hidden, retain_graph=True)
        assert gradient.abs().amax(-1).gt(0).all()


@TIED
def test_gradients(device, tied):
    model = BiMamba(16, d_state=4, tie_weights=tied).to(device)
    hidden = torch.randn(2, 9, 16, device=device)
    names = dict(model.named_parameters())
    got = torch.autograd.grad(model(hidden).square().sum(), names.values())
    forward, backward = directions(model)
    out = forward(hidden) + backward(hidden.flip(1)).flip(1)
    ours, mirrored = dict(forward.named_parameters()), dict(backward.named_parameters())
    leaves = [*ours.values(), *mirrored.values()]
    gradients = iter(torch.autograd.grad(out.square().sum(), leaves))
    expected = [dict(zip(group, gradients, strict=False)) for group in (ours, mirrored)]
    shared = (
        "in_proj",
        "out_proj",
        *(("conv1d", "x_proj", "dt_proj", "A_log", "D") if tied else ()),
    )
    for name, gradient in zip(names, got, strict=True):
        if name.startswith(shared):
            wanted = expected[0][name] + expected[1][name]
        elif name in expected[0]:
            wanted = expected[0][name]
        else:
            wanted = expected[1][name.replace("_b", "", 1)]
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@TIED
@pytest.mark.parametrize("lengths", [[5, 6], [1, 1, 9], [11]], ids=str)
def test_packed_sequences_are_separate_ones(device, tied, lengths):
    model = BiMamba(32, tie_weights=tied).to(device)
    hidden = torch.randn(2, sum(lengths), 32, device=device, requires_grad=True)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seq_idx = index.to(device, torch.int32).expand(2, -1)
    packed = model(hidden, seq_idx=seq_idx)
    apart = torch.cat([model(part) for part in hidden.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    leaves = [hidden, *model.parameters()]
    weights = torch.randn_like(packed)
    for one, other in zip(
        *(torch.autograd.grad((out * weights).sum(), leaves) for out in (packed, apart)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_parameters_have_vims_names():
    shapes = {name: tuple(p.shape) for name, p in BiMamba(48, d_state=8).state_dict().items()}
    plain = {name: tuple(p.shape) for name, p in Mamba(48, d_state=8).state_dict().items()}
    second = {
        "conv1d_b.weight": (96, 1, 4),
        "conv1d_b.bias": (96,),
        "x_proj_b.weight": (3 + 16, 96),
        "dt_proj_b.weight": (96, 3),
        "dt_proj_b.bias": (96,),
        "A_b_log": (96, 8),
        "D_b": (96,),
    }
    assert shapes == plain | second
    assert set(BiMamba(48, tie_weights=True).state_dict()) == set(plain)
    model = BiMamba(48)
    assert model.A_b_log._no_weight_decay and model.D_b._no_weight_decay
    assert model.dt_proj_b.bias._no_reinit and not torch.equal(
        model.dt_proj_b.bias, model.dt_proj.bias
    )


@TIED
@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)], ids=str)
def test_empty_batches_and_sequences(device, tied, shape):
    assert (
        BiMamba(32, tie_weights=tied).to(device)(torch.randn(shape, device=device)).shape == shape
    )


def test_it_is_a_mixer_of_blocks(device):
    block = Block(32, BiMamba, torch.nn.Identity).to(device)
    hidden = torch.randn(2, 6, 32, device=device)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2]] * 2, dtype=torch.int32, device=device)
    out, residual = block(hidden, seq_idx=seq_idx)
    assert torch.equal(residual, hidden)
    torch.testing.assert_close(out, block.mixer(block.norm(hidden), seq_idx=seq_idx))


def test_there_is_no_decoding():
    model = BiMamba(32, layer_idx=0)
    hidden = torch.randn(1, 1, 32)
    with pytest.raises(ValueError, match="inference_params=None"):
        model(hidden, inference_params=InferenceParams(8, 1))
    with pytest.raises(ValueError, match="no cache"):
        model.allocate_inference_cache(1, 8)
    with pytest.raises(ValueError, match="no decoding"):
        model.step(hidden, None, None)


@TIED
def test_compiles_to_one_graph(device, tied):
    model = BiMamba(32, tie_weights=tied).to(device)
    hidden = torch.randn(2, 9, 32, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), model(hidden))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_stay_near_float32(device, dtype):
    model = BiMamba(32).to(device)
    hidden = torch.randn(2, 20, 32, device=device)
    whole = model(hidden)
    with torch.autocast(device, dtype=dtype):
        torch.testing.assert_close(model(hidden).float(), whole, rtol=0.05, atol=0.02)
    out = model.to(dtype)(hidden.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), whole, rtol=0.05, atol=0.02)
