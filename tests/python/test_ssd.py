"""The chunked scan of Mamba-2 against a step-by-step recurrence in PyTorch, and what follows from it."""

import itertools
import math

import compare
import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.modules.ssd_minimal import segsum, segsum_unstable, ssd_minimal_discrete
from mamba_ssm.native import ssd as native
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_bwd, _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd, chunk_state, chunk_state_varlen
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    ssd_selective_scan,
)
from mamba_ssm.ops.triton.ssd_state_passing import state_passing

INF = math.inf


def recurrence(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=True,
    dt_limit=(0.0, INF),
    reverse=False,
):
    """(out, final states), step by step, in the dtype of A and at least float32."""
    dtype = torch.promote_types(x.dtype, A.dtype)
    out_dtype, (batch, length, heads, headdim) = x.dtype, x.shape
    x, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
    delta = dt if dt_bias is None else dt + dt_bias
    delta = (F.softplus(delta, threshold=20.0) if dt_softplus else delta).clamp(*dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(batch, heads, headdim, B.shape[-1])
    state = state if initial_states is None else initial_states.to(dtype)
    out = [None] * length
    steps = range(length - 1, -1, -1) if reverse else range(length)
    for t in steps:
        if seq_idx is not None and t != steps[0]:
            same = seq_idx[:, t] == seq_idx[:, t - steps.step]
            state = torch.where(same[:, None, None, None], state, 0)
        drive = (delta[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t, :, None]
        state = torch.exp(delta[:, t] * A)[:, :, None, None] * state + drive
        out[t] = (state * C[:, t, :, None]).sum(-1)
    y = torch.stack(out, dim=1)
    if D is not None:
        y = y + x * (D.unsqueeze(-1) if D.dim() == 1 else D)
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(out_dtype), state


def problem(
    dtype=torch.float32,
    device="cpu",
    batch=2,
    length=70,
    heads=4,
    headdim=12,
    groups=2,
    d_state=10,
    dt_bias=(-3, -1),
    seed=0,
):
    """Arguments by name, of any device the same; dt_bias: its smallest and largest value."""
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def uniform(*shape, low=-1.0, high=1.0, dtype=dtype):
        values = torch.rand(shape, generator=random, dtype=torch.float64)
        return (low + (high - low) * values).to(device, dtype)

    return {
        "x": uniform(batch, length, heads, headdim),
        "dt": uniform(batch, length, heads),
        "A": uniform(heads, low=-8, high=-0.5, dtype=wide),
        "B": uniform(batch, length, groups, d_state),
        "C": uniform(batch, length, groups, d_state),
        "D": uniform(heads, dtype=wide),
        "z": uniform(batch, length, heads, headdim, low=-2, high=2),
        "dt_bias": uniform(heads, low=dt_bias[0], high=dt_bias[1], dtype=wide),
        "initial_states": uniform(batch, heads, headdim, d_state, dtype=wide),
    }


def scan(chunk_size=64, dt_softplus=True, **arguments):
    return mamba_chunk_scan_combined(
        **arguments, chunk_size=chunk_size, dt_softplus=dt_softplus, return_final_states=True
    )


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- against the recurrence ----

ROWS = {
    "base": ({}, {}),
    "length_1": ({"length": 1}, {}),
    "length_65": ({"length": 65}, {}),
    "length_300": ({"length": 300}, {}),
    "group_per_head": ({"groups": 4}, {}),
    "one_group": ({"groups": 1}, {}),
    "headdim_64_d_state_128": ({"headdim": 64, "d_state": 128}, {}),
    "d_state_1": ({"d_state": 1}, {}),
    "dt_limit": ({}, {"dt_limit": (0.05, 0.2)}),
    "no_softplus": ({"dt_bias": (0, 0.2)}, {"dt_softplus": False, "dt_limit": (0.01, 0.8)}),
    "reverse": ({}, {"reverse": True}),
}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_outputs_and_gradients(row, dtype, device):
    shape, options = ROWS[row]
    tensors = problem(compare.DTYPES[dtype], device, **shape)
    compare.judge(
        "ssd",
        dtype,
        lambda **t: scan(**t, **options),
        lambda **t: recurrence(**t, **options),
        tensors,
        tensor_cores=device == "cuda" and dtype != "f32",
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_gradcheck(reverse, packed, channels):
    tensors = problem(torch.float64, length=5, headdim=3, d_state=2, heads=2, groups=1)
    if channels:
        tensors["D"] = torch.rand(2, 3, dtype=torch.float64)
    options = {"reverse": reverse, "dt_limit": (0.1, 0.3)}
    if packed:
        options["seq_idx"] = torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 4, -1]], dtype=torch.int32)
    names = list(tensors)

    def function(*values):
        return scan(**dict(zip(names, values, strict=True)), **options)

    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(function, leaves)


def test_float64_is_the_recurrence():
    tensors = problem(torch.float64)
    close(scan(**tensors), recurrence(**tensors), 1e-12)


# ---- identities ----


def test_is_a_selective_scan_with_tied_A(device):
    tensors = problem(device=device)
    del tensors["initial_states"]
    tied = ssd_selective_scan(**tensors, dt_softplus=True)
    close(scan(**tensors)[0], tied)
    tensors["D"] = torch.rand(4, 12, device=device)
    limits = {"dt_softplus": True, "dt_limit": (0.1, 0.2)}
    close(
        mamba_chunk_scan_combined(**tensors, chunk_size=8, **limits),
        ssd_selective_scan(**tensors, **limits),
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 256])
def test_any_chunk_size_and_the_formula_in_pytorch(device, chunk_size):
    tensors = problem(device=device)
    del tensors["initial_states"]
    out = mamba_chunk_scan_combined(**tensors, chunk_size=chunk_size, dt_softplus=True)
    close(out, mamba_chunk_scan(**tensors, chunk_size=chunk_size, dt_softplus=True))


def test_ssd_minimal(device):
    t = problem(device=device, length=64, groups=4)
    dt = F.softplus(t["dt"])
    y, states = ssd_minimal_discrete(
        t["x"] * dt.unsqueeze(-1), t["A"] * dt, t["B"], t["C"], 16, t["initial_states"]
    )
    plain = {name: t[name] for name in ("x", "dt", "A", "B", "C", "initial_states")}
    out, final = scan(**plain)
    close(out, y)
    close(final, states)
    with pytest.raises(ValueError, match="multiple of block_len 48, got length 64"):
        ssd_minimal_discrete(t["x"], t["A"] * dt, t["B"], t["C"], 48)
    close(segsum(t["A"]).exp(), segsum_unstable(t["A"]).exp())


def test_step_is_scan(device):
    t = problem(device=device, length=9)
    out, final = scan(**t)
    state = t["initial_states"].clone()
    spread = [t[name][:, None].expand(4, 12) for name in ("dt_bias", "D")]
    A = t["A"][:, None, None].expand(4, 12, 10)
    for i in range(9):
        dt = t["dt"][:, i, :, None].expand(2, 4, 12)
        tokens = (t["x"][:, i], dt, A, t["B"][:, i], t["C"][:, i])
        y = selective_state_update(state, *tokens, spread[1], t["z"][:, i], spread[0], True)
        close(y, out[:, i])
    close(state, final)


def test_reverse_is_flip(device):
    t = problem(device=device)
    timed = ("x", "dt", "B", "C", "z")
    flipped = {name: v.flip(1) if name in timed else v for name, v in t.items()}
    out, final = scan(**flipped)
    reversed_out, reversed_final = scan(**t, reverse=True)
    close(reversed_out, out.flip(1))
    close(reversed_final, final)


def test_state_carries_across_a_split(device):
    t = problem(device=device)
    whole, final = scan(**t)
    timed = ("x", "dt", "B", "C", "z")

    def part(begin, end, states):
        cut = {name: v[:, begin:end] if name in timed else v for name, v in t.items()}
        return scan(**cut | {"initial_states": states})

    first, states = part(0, 33, t["initial_states"])
    second, last = part(33, 70, states)
    close(torch.cat([first, second], dim=1), whole)
    close(last, final)


def test_groups_are_expanded(device):
    t = problem(device=device)
    wide = t | {name: t[name].repeat_interleave(2, dim=2) for name in ("B", "C")}
    for a, b in zip(scan(**t), scan(**wide), strict=True):
        close(a, b)


# ---- on a GPU ----


def gradients_of(tensors, **options):
    leaves = {name: v.detach().requires_grad_() for name, v in tensors.items()}
    out, final = scan(**leaves, **options)
    weights = torch.cos(torch.arange(out.shape[1], device=out.device)).view(1, -1, 1, 1)
    loss = (out.float() * weights).sum() + final.sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "final": final.detach()} | dict(
        zip(leaves, gradients, strict=True)
    )


@pytest.mark.parametrize("groups", [1, 8])
def test_every_run_gives_the_same_bits(device, groups):
    shape = {"length": 700, "heads": 8, "groups": groups, "headdim": 64, "d_state": 128}
    tensors = problem(torch.bfloat16, device, **shape)
    first = gradients_of(tensors)
    for _ in range(99 if device == "cuda" else 2):
        for name, again in gradients_of(tensors).items():
            assert torch.equal(first[name], again), name


@pytest.mark.gpu
@pytest.mark.parametrize("length", [300, 1600], ids=["one launch", "segments"])
def test_forward_replays_from_a_cuda_graph(length):
    shape = {"length": length, "headdim": 64, "d_state": 128}
    tensors, others = (problem(torch.bfloat16, "cuda", **shape, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        expected = scan(**others)
        scan(**tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = scan(**tensors)
        for name, tensor in tensors.items():
            tensor.copy_(others[name])
        graph.replay()
    for got, wanted in zip(replayed, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 8, "length": 2048, "heads": 80, "groups": 1},  # more than a workspace at once
        {"batch": 1, "length": 8192, "heads": 80, "groups": 1},  # segments of time
        {"batch": 1, "length": 2049, "heads": 24, "groups": 8},
        {"batch": 2, "length": 513, "heads": 4, "groups": 1, "d_state": 256},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_calls_agree_with_the_cpu(shape, dtype):
    tensors = problem(dtype, **{"headdim": 64, "d_state": 128} | shape)
    got = gradients_of({name: v.cuda() for name, v in tensors.items()})
    expected = gradients_of({name: v.float() for name, v in tensors.items()})
    for name, wanted in expected.items():
        error = (got[name].cpu().double() - wanted.double()).square().sum()
        share = (error / wanted.double().square().sum()).item()
        assert share < (1e-8 if dtype == torch.float32 else 1e-4), f"{name}: {share}"


# ---- packed sequences ----

BOUNDS = [0, 1, 1, 20, 64, 65, 70]  # one token, none, inside and at chunks' borders


@pytest.mark.parametrize("own_states", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_is_separate(device, own_states, reverse, index_dtype):
    t = problem(device=device, batch=1, length=73)  # three steps of padding
    if own_states:
        t["initial_states"] = torch.randn(len(BOUNDS) - 1, 4, 12, 10, device=device)
    else:
        del t["initial_states"]
    leaves = {name: v.clone().requires_grad_() for name, v in t.items()}
    cu_seqlens = torch.tensor(BOUNDS, dtype=index_dtype, device=device)
    out, final, varlen = mamba_chunk_scan_combined(
        **leaves,
        chunk_size=16,
        cu_seqlens=cu_seqlens,
        dt_softplus=True,
        return_final_states=True,
        return_varlen_states=True,
        reverse=reverse,
    )
    timed = ("x", "dt", "B", "C", "z")
    again = {name: v.clone().requires_grad_() for name, v in t.items()}
    outs, states = [], []
    for s, (begin, end) in enumerate(itertools.pairwise([*BOUNDS, 73])):
        cut = {name: v[:, begin:end] if name in timed else v for name, v in again.items()}
        if own_states:
            enters = again["initial_states"]
            cut["initial_states"] = enters[s : s + 1] if s < len(enters) else None
        part, state = scan(**cut, reverse=reverse)
        outs.append(part)
        states.append(state)
    close(out, torch.cat(outs, dim=1))
    close(varlen, torch.cat(states[:-1]))
    close(final, states[0 if reverse else -1])
    weights = torch.randn_like(out), torch.randn_like(varlen)
    ((out * weights[0]).sum() + (varlen * weights[1]).sum()).backward()
    separate = (torch.cat(outs, dim=1) * weights[0]).sum()
    (separate + (torch.cat(states[:-1]) * weights[1]).sum()).backward()
    for name, leaf in leaves.items():
        close(leaf.grad, again[name].grad, 1e-3)


def test_seq_idx_with_padding_is_the_recurrence(device):
    t = problem(device=device)
    ids = torch.zeros(2, 70, dtype=torch.int32, device=device)
    ids[0, 10:], ids[0, 64:], ids[1, 1:], ids[1, 33:] = 1, -1, 5, 6
    close(scan(**t, seq_idx=ids), recurrence(**t, seq_idx=ids))


def test_initial_states_enter_the_first_sequence(device):
    """Also where it lies in the first chunk, and whatever its id is."""
    t = problem(device=device, batch=1, length=20)
    cu_seqlens = torch.tensor([0, 7, 20], device=device)
    ids = torch.tensor([[3] * 7 + [4] * 13], dtype=torch.int32, device=device)
    out, varlen = mamba_chunk_scan_combined(
        **t, chunk_size=64, cu_seqlens=cu_seqlens, dt_softplus=True, return_varlen_states=True
    )
    close(out, scan(**t, seq_idx=ids)[0])
    first = {name: v[:, :7] if v.dim() > 1 else v for name, v in t.items()}
    first["initial_states"] = t["initial_states"]
    close(varlen[:1], scan(**first)[1])


def test_varlen_states_have_the_state_dtype():
    t = problem(torch.bfloat16, batch=1)
    cu_seqlens = torch.tensor([0, 70])
    options = {"chunk_size": 8, "cu_seqlens": cu_seqlens, "return_varlen_states": True}
    assert mamba_chunk_scan_combined(**t, **options)[1].dtype == torch.bfloat16
    states = mamba_chunk_scan_combined(**t, **options, state_dtype=torch.float32)[1]
    assert states.dtype == torch.float32
    assert scan(**t)[1].dtype == torch.float32


# ---- edges ----


@pytest.mark.parametrize("empty", [{"length": 0}, {"batch": 0}], ids=str)
def test_nothing_leaves_the_initial_state(device, empty):
    t = {name: v.requires_grad_() for name, v in problem(device=device, **empty).items()}
    out, final = scan(**t)
    assert out.shape == t["x"].shape
    assert torch.equal(final, t["initial_states"])
    final.sum().backward()
    assert torch.equal(t["initial_states"].grad, torch.ones_like(final))
    assert torch.equal(t["A"].grad, torch.zeros_like(t["A"]))


def test_gradient_of_one_output_only(device):
    t = {name: v.requires_grad_() for name, v in problem(device=device).items()}
    out, final = scan(**t)
    from_out = torch.autograd.grad(out.sum(), t["x"], retain_graph=True)[0]
    from_final = torch.autograd.grad(final.sum(), t["x"], retain_graph=True)[0]
    both = torch.autograd.grad(out.sum() + final.sum(), t["x"])[0]
    close(from_out + from_final, both)
    assert torch.autograd.grad(scan(**t)[1].sum(), t["C"])[0].abs().max() == 0


def test_no_grad_keeps_no_states():
    t = problem()
    with torch.no_grad():
        out = mamba_chunk_scan_combined(**{**t, "x": t["x"].requires_grad_()}, chunk_size=8)
    assert out.grad_fn is None


def test_any_stride_and_alignment(device):
    t = problem(device=device)
    plain = scan(**t)
    fused = torch.cat([torch.zeros(2, 70, 1, device=device), t["x"].flatten(2)], dim=2)
    odd = t | {"x": fused[..., 1:].unflatten(2, (4, 12))}
    odd["z"] = t["z"].transpose(1, 3).contiguous().transpose(1, 3)
    odd["B"] = t["B"].transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(plain, scan(**odd), strict=True):
        assert torch.equal(a, b)
    expanded = t | {"dt": t["dt"][:, :1].expand(2, 70, 4)}
    close(scan(**expanded), recurrence(**expanded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_any_dtype(device, dtype):
    t = problem(dtype, device)
    narrow = t | {name: t[name].to(dtype) for name in ("A", "D", "dt_bias", "initial_states")}
    wide = {name: v.to(t[name].dtype) for name, v in narrow.items()}
    narrow["dt"] = t["dt"].float()
    leaves = {name: v.detach().requires_grad_() for name, v in narrow.items()}
    out, final = scan(**leaves)
    close(out, scan(**wide)[0], 1e-2)
    out.sum().backward()
    assert all(v.grad.dtype == v.dtype for v in leaves.values())
    assert final.dtype == torch.float32


def test_errors():
    t = problem()

    def message(error=RuntimeError, **changes):
        with pytest.raises(error) as caught:
            mamba_chunk_scan_combined(**{**t, "chunk_size": 8, **changes})
        return str(caught.value)

    assert "chunk_size must be at least 1, got 0" in message(ValueError, chunk_size=0)
    assert "needs cu_seqlens" in message(ValueError, return_varlen_states=True)
    bounds = {"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 70])}
    assert "batch 2" in message(ValueError, **bounds)
    one = problem(batch=1)
    bounds["cu_seqlens"] = torch.tensor([0, 80])
    assert "end at 70 steps at most" in message(ValueError, **one, **bounds)
    bounds["cu_seqlens"] = torch.tensor([0.0, 70.0])
    assert "int32 or int64" in message(TypeError, **one, **bounds)
    states = torch.zeros(3, 4, 12, 10)
    bounds["cu_seqlens"] = torch.tensor([0, 9, 70])
    assert "each of the 2" in message(ValueError, **one | {"initial_states": states}, **bounds)
    assert "dt must have shape (2, 70, 4)" in message(dt=t["dt"][:, 1:])
    assert "A must have shape (4)" in message(A=t["A"][1:])
    assert "groups of B" in message(B=t["B"].repeat(1, 1, 3, 1)[:, :, :3])
    assert "dt_limit must be (smallest, largest)" in message(dt_limit=(1.0, 0.0))
    ids = torch.zeros(2, 69)
    assert "seq_idx must be int32 or int64" in message(seq_idx=ids)
    assert "seq_idx must have shape (2, 70)" in message(seq_idx=ids.int())
    assert "cu_seqlens must be a tensor, got list" in message(
        TypeError, **one, return_varlen_states=True, cu_seqlens=[0, 70]
    )


# ---- torch's own machinery ----


def test_opcheck(device):
    t = {name: v.requires_grad_() for name, v in problem(device=device, length=9).items()}
    options = (True, 0.0, INF, None, 0, False, True)
    torch.library.opcheck(native.ssd_forward, (*t.values(), *options))
    out, states, checkpoints = native.ssd_forward(*t.values(), *options)
    arguments = (torch.ones_like(out), torch.ones_like(states), *t.values(), checkpoints)
    detached = [v.detach() for v in arguments]
    torch.library.opcheck(native.ssd_backward, (*detached, *options[:-1], True))


def test_compiles_without_graph_breaks(device):
    t = problem(device=device, length=20)

    one_sequence = torch.zeros(2, 20, dtype=torch.int32, device=device)

    def loss(x, A):
        out, final = scan(**t | {"x": x, "A": A}, seq_idx=one_sequence)
        return out.square().sum() + final.sum()

    leaves = [t[name].clone().requires_grad_() for name in ("x", "A")]
    again = [t[name].clone().requires_grad_() for name in ("x", "A")]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves).backward()
    loss(*again).backward()
    for a, b in zip(leaves, again, strict=True):
        close(a.grad, b.grad)


# ---- the pieces ----


def test_pieces_make_the_scan():
    t = problem()
    initial = t["initial_states"]
    dA_cumsum, delta = _chunk_cumsum_fwd(t["dt"], t["A"], 16, t["dt_bias"], True)
    assert dA_cumsum.shape == delta.shape == (2, 4, 5, 16)
    assert delta[..., -1, -10:].abs().max() == 0
    padded = {n: F.pad(t[n], (0, 0, 0, 0, 0, 10)) for n in ("x", "B", "C", "z")}
    states = chunk_state(t["B"], t["x"], delta, dA_cumsum)
    assert states.shape == (2, 5, 4, 12, 10)
    passed, final = state_passing(states.flatten(-2), dA_cumsum[..., -1], initial.flatten(-2))
    inputs = (padded["B"], padded["C"], padded["x"], delta, dA_cumsum, passed.view_as(states))
    out = chunk_scan(*inputs, t["D"], padded["z"])
    expected = scan(**t)
    close(out[:, :70], expected[0])
    close(final.view_as(initial), expected[1])
    with pytest.raises(ValueError, match="5 chunks of 16 steps, got length 70"):
        chunk_scan(t["B"], t["C"], t["x"], *inputs[3:])


def test_chunk_state_varlen():
    t = problem(batch=1, length=200)
    bounds = [0, 5, 5, 60, 64, 130, 200]
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor(bounds).diff())
    dA_cumsum, delta = _chunk_cumsum_fwd(t["dt"], t["A"], 64, t["dt_bias"], True)
    entering = torch.stack(
        [
            recurrence(
                **{n: v[:, : 64 * c] if n in ("x", "dt", "B", "C") else v for n, v in t.items()}
                | {"z": None, "D": None, "initial_states": None},
                seq_idx=ids[None, : 64 * c],
            )[1][0]
            if c
            else torch.zeros(4, 12, 10)
            for c in range(4)
        ]
    )
    states = chunk_state_varlen(
        t["B"][0], t["x"][0], delta[0], dA_cumsum[0], torch.tensor(bounds), entering
    )
    expected = mamba_chunk_scan_combined(
        **t | {"initial_states": None},
        chunk_size=64,
        cu_seqlens=torch.tensor(bounds),
        dt_softplus=True,
        return_varlen_states=True,
    )[1]
    close(states, expected)


@pytest.mark.parametrize("groups", [None, 2])
def test_bmm_within_chunks(groups):
    shape = (2, 50, 3) if groups is None else (2, 50, groups, 3)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = (torch.arange(50) // 7).repeat(2, 1)
    out = _bmm_chunk_fwd(a, b, 16, seq_idx=ids)
    assert out.shape == ((2, 4, 16, 16) if groups is None else (2, 4, 2, 16, 16))
    one = (out if groups is None else out[:, :, 1])[1, 2]
    rows = (t if groups is None else t[:, :, 1] for t in (a, b))
    dense = torch.einsum("lk,sk->ls", *(t[1, 32:48] for t in rows))
    same = ids[0, 32:48, None] == ids[0, 32:48]
    close(one, dense * same, 1e-12)
    dout = torch.randn_like(out)
    dout = dout * (out != 0)
    expected = torch.autograd.grad(out, (a, b), dout)
    close(_bmm_chunk_bwd(a, dout), expected[1], 1e-12)
    close(_bmm_chunk_bwd(b, dout.transpose(-1, -2), residual=a), expected[0] + a, 1e-12)
