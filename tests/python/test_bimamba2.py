"""The bidirectional Mamba-2 layer: Mamba-2 over the sequence and its mirror, fused, packed or not."""

import doctest
import functools

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.modules.bimamba import BiMamba2
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.ops.triton.ssd_combined import mamba_conv1d_scan_ref
from mamba_ssm.utils.generation import InferenceParams

SMALL = {"d_model": 24, "d_state": 6, "headdim": 8}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
FUSION = pytest.mark.parametrize("fusion", ["sum", "concat", "gated"])
ROWS = {
    "base": {},
    "groups": {"ngroups": 3},
    "no_norm": {"rmsnorm": False},
    "plain_path": {"use_mem_eff_path": False},
    "everything": {
        "ngroups": 2,
        "d_ssm": 32,
        "D_has_hdim": True,
        "dt_limit": (0.005, 0.02),
        "bias": True,
        "norm_before_gate": True,
    },
}


def make(device, tied, fusion, **options):
    """A layer whose two directions differ, unless they are tied."""
    model = BiMamba2(**SMALL | options, tie_weights=tied, fusion=fusion).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("D", "norm")):
                parameter.uniform_(0.5, 2)
    return model


def by_flips(model, u):
    """The definition in plain PyTorch: the second direction is the layer of the mirrored sequence."""
    parts = [2 * (model.d_inner - model.d_ssm), model.d_ssm, model.conv_dim, model.nheads]
    zx0, z, xBC, dt = model.in_proj(u).split(parts, dim=-1)

    def direction(xBC, dt, conv1d, dt_bias, A_log, D):
        return mamba_conv1d_scan_ref(
            xBC,
            conv1d.weight.squeeze(1),
            conv1d.bias,
            dt,
            -torch.exp(A_log),
            16,
            D=D.view(model.nheads, -1).expand(-1, model.headdim),
            dt_bias=dt_bias,
            dt_softplus=True,
            dt_limit=model.dt_limit,
            ngroups=model.ngroups,
        ).flatten(2)

    ours = (model.conv1d, model.dt_bias, model.A_log, model.D)
    others = ours
    if not model.tie_weights:
        others = (model.conv1d_b, model.dt_bias_b, model.A_b_log, model.D_b)
    ahead = direction(xBC, dt, *ours)
    back = direction(xBC.flip(1), dt.flip(1), *others).flip(1)
    if model.fusion == "gated":
        gate = torch.sigmoid(model.fusion_gate(u)).repeat_interleave(model.headdim, -1)
        y = gate * ahead + (1 - gate) * back
    elif model.fusion == "concat":
        y, z = torch.cat([ahead, back], -1), torch.cat([z, z], -1)
    else:
        y = ahead + back
    y = y * F.silu(z) if not model.norm_before_gate else y
    if model.rmsnorm:
        groups = y.unflatten(-1, (-1, model.d_ssm // model.ngroups))
        rstd = torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
        y = (groups * rstd).flatten(-2) * model.norm.weight
    y = y * F.silu(z) if model.norm_before_gate else y
    gate, up = zx0.chunk(2, dim=-1)
    return model.out_proj(torch.cat([F.silu(gate) * up, y], dim=-1))


def assert_same(functions, u, model):
    results, wanted = [], [u, *model.parameters()]
    for function in functions:
        out = function(u)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for got, expected in zip(*results, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=5e-4, atol=2e-4 * scale)


@TIED
@FUSION
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("length", [1, 3, 37])
def test_it_is_mamba2_and_mamba2_of_the_mirror(device, tied, fusion, row, length):
    model = make(device, tied, fusion, **ROWS[row])
    u = torch.randn(2, length, 24, device=device, requires_grad=True)
    assert_same((model, functools.partial(by_flips, model)), u, model)


@TIED
@FUSION
def test_the_mirrored_sequence_gives_the_mirrored_output(device, tied, fusion):
    """Only where the weights are tied and the fusion treats both directions alike."""
    model = make(device, tied, fusion)
    u = torch.randn(2, 11, 24, device=device)
    same = torch.allclose(model(u.flip(1)).flip(1), model(u), rtol=1e-4, atol=1e-5)
    assert same is (tied and fusion == "sum")


@TIED
@FUSION
def test_every_output_depends_on_every_token(device, tied, fusion):
    model = make(device, tied, fusion)
    u = torch.randn(1, 9, 24, device=device, requires_grad=True)
    out = model(u)
    for t in (0, 4, 8):
        (gradient,) = torch.autograd.grad(out[:, t].sum(), u, retain_graph=True)
        assert gradient.abs().amax(-1).gt(0).all()


@TIED
@FUSION
@pytest.mark.parametrize("lengths", [[5, 6], [1, 1, 9], [11]], ids=str)
def test_packed_sequences_are_separate_ones(device, tied, fusion, lengths):
    model = make(device, tied, fusion)
    u = torch.randn(2, 11, 24, device=device, requires_grad=True)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seq_idx = index.to(device, torch.int32).expand(2, -1)

    def apart(u):
        return torch.cat([model(part) for part in u.split(lengths, dim=1)], dim=1)

    assert_same((functools.partial(model, seq_idx=seq_idx), apart), u, model)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    torch.testing.assert_close(model(u[:1], cu_seqlens=bounds), apart(u[:1]), rtol=1e-4, atol=1e-4)


def test_parameters():
    plain = {name: tuple(p.shape) for name, p in Mamba2(**SMALL).state_dict().items()}
    second = {"conv1d_b.weight": (60, 1, 4), "conv1d_b.bias": (60,)}
    second |= {"dt_bias_b": (6,), "A_b_log": (6,), "D_b": (6,)}
    model = BiMamba2(**SMALL)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == plain | second
    assert set(BiMamba2(**SMALL, tie_weights=True).state_dict()) == set(plain)
    assert all(p._no_weight_decay for p in (model.dt_bias_b, model.A_b_log, model.D_b))
    assert not torch.equal(model.A_b_log, model.A_log)
    wide = BiMamba2(**SMALL, fusion="concat", bias=True)
    assert wide.out_proj.weight.shape == (24, 96) and wide.out_proj.bias.shape == (24,)
    assert wide.norm.weight.shape == (96,) and wide.norm.group_size == 48
    assert BiMamba2(**SMALL, fusion="gated").fusion_gate.weight.shape == (6, 24)
    with pytest.raises(ValueError, match="fusion must be one of .*got 'mean'"):
        BiMamba2(**SMALL, fusion="mean")


def test_there_is_no_decoding():
    model = BiMamba2(**SMALL, layer_idx=0)
    u = torch.randn(1, 1, 24)
    with pytest.raises(ValueError, match="inference_params=None"):
        model(u, inference_params=InferenceParams(8, 1))
    with pytest.raises(ValueError, match="no cache"):
        model.allocate_inference_cache(1, 8)
    with pytest.raises(ValueError, match="no decoding"):
        model.step(u, None, None)


def test_it_is_a_mixer_of_blocks(device):
    block = Block(24, functools.partial(BiMamba2, d_state=6, headdim=8), torch.nn.Identity)
    block.to(device)
    hidden = torch.randn(2, 6, 24, device=device)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2]] * 2, dtype=torch.int32, device=device)
    out, residual = block(hidden, seq_idx=seq_idx)
    assert torch.equal(residual, hidden)
    torch.testing.assert_close(out, block.mixer(block.norm(hidden), seq_idx=seq_idx))


@FUSION
@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)], ids=str)
def test_empty_batches_and_sequences(device, fusion, shape):
    assert make(device, False, fusion)(torch.randn(shape, device=device)).shape == shape


@FUSION
def test_compiles_to_one_graph(device, fusion):
    model = make(device, False, fusion)
    u = torch.randn(2, 9, 24, device=device, requires_grad=True)
    assert_same((torch.compile(model, fullgraph=True, backend="aot_eager"), model), u, model)


@FUSION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_stay_near_float32(device, fusion, dtype):
    model = make(device, False, fusion)
    u = torch.randn(2, 20, 24, device=device)
    whole = model(u)
    with torch.autocast(device, dtype=dtype):
        out = model(u)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    for result in (out, model.to(dtype)(u.to(dtype))):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), whole, rtol=0.05, atol=0.05)


def test_the_docstrings_example():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(BiMamba2, globs={"BiMamba2": BiMamba2, "torch": torch})
    assert "BiMamba2(d_model=64)" in example.docstring and len(example.examples) == 3
    assert doctest.DocTestRunner().run(example) == (0, 3)


def kept(model, length):
    """Bytes that the backward pass of `length` steps keeps, beside the parameters."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    u = torch.randn(1, length, 64, device=model.D.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(u)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(size for pointer, size in sizes.items() if pointer not in own)
    assert out.shape == u.shape
    return total


@FUSION
def test_memory_grows_linearly_with_the_length(device, fusion):
    model = BiMamba2(64, fusion=fusion).to(device)
    kept(model, 256)
    fixed, one, two = (kept(model, length) for length in (512, 1024, 2048))
    assert two - one == pytest.approx(2 * (one - fixed), rel=0.02)
    assert two < 2048 * 4 * 64 * 40  # forty times u


def test_a_step_on_four_minutes_of_eeg(device):
    """Four recordings of 60 s, 64 channels at 256 Hz: a step lowers the loss."""
    model = torch.nn.Sequential(BiMamba2(64), torch.nn.Linear(64, 1)).to(device)
    recordings = torch.randn(4, 15360, 64, device=device)
    target = recordings[..., :1].roll(-1, dims=1)  # of the next sample
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(model(recordings), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.gpu
def test_peak_memory_on_cuda_grows_linearly():
    model = BiMamba2(64).to("cuda")

    def peak(length):
        u = torch.randn(4, length, 64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(u).sum().backward()
        model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)  # what libraries allocate once
    assert peak(15360) < 4.2 * peak(3840)
