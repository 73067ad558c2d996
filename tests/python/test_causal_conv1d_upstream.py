"""Upstream's own tests of causal_conv1d: their names, checks and tolerances, and a sample of their grids.

On a GPU the sample is larger; sizes that take a CPU minutes are left out.
"""

import itertools
import random

import pytest
import torch
from causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from causal_conv1d.causal_conv1d_varlen import (
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from mamba_ssm.utils import determinism

pytestmark = pytest.mark.usefixtures("exact_references")
TOLERANCES = {
    torch.float32: (3e-4, 1e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (1e-2, 5e-2),
}
LENGTHS = (1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096)
SHARED = {
    "dtype": [*TOLERANCES],
    "silu": [False, True],
    "bias": [False, True],
    "width": [2, 3, 4],
}
ELEMENTS_ON_CPU = 2**20  # of x


def grid(count, **axes):
    """Parametrizes a test by `case`, a dict: every value of every axis, then rows drawn from the whole product."""
    axes = SHARED | axes
    names = tuple(axes)
    longest = max(map(len, axes.values()))
    rows = [tuple(v[i % len(v)] for v in axes.values()) for i in range(longest)]
    whole = list(itertools.product(*axes.values()))
    rows += random.Random(0).sample(whole, min(count, len(whole)))
    cases = [dict(zip(names, row, strict=True)) for row in dict.fromkeys(rows)]
    ids = ["-".join(str(v).removeprefix("torch.") for v in case.values()) for case in cases]
    return pytest.mark.parametrize("case", cases, ids=ids)


def skip_what_takes_minutes(device, elements):
    if device == "cpu" and elements > ELEMENTS_ON_CPU:
        pytest.skip("for a GPU")


def close(got, expected, dtype, atol=None):
    rtol, base = TOLERANCES[dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=max(base, atol or 0))


def inputs(device, case, batch=2):
    """x is a slice of a wider tensor, time or channels side by side; weights are float32."""
    dim, length, width = case["dim"], case["length"], case["width"]
    wide = (batch, 4096 + dim + 64, length)
    if case.get("channel_last"):
        wide = torch.empty(batch, length, wide[1], device=device, dtype=case["dtype"]).transpose(
            1, 2
        )
    else:
        wide = torch.empty(wide, device=device, dtype=case["dtype"])
    x = wide[:, 4096 : 4096 + dim].normal_()
    weight = torch.randn(dim, width, device=device)
    bias = torch.randn(dim, device=device) if case["bias"] else None
    return x, weight, bias


def activation(case):
    return "silu" if case["silu"] else None


def compare(function, reference, tensors, dtype):
    """Outputs and every gradient of two functions of the same tensors."""
    results = []
    cotangents = None
    for candidate in (function, reference):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outs = candidate(*leaves)
        cotangents = cotangents or [torch.randn_like(out) for out in outs]
        results.append((outs, torch.autograd.grad(outs, leaves, cotangents)))
    (outs, grads), (expected_outs, expected_grads) = results
    for got, expected in zip(outs, expected_outs, strict=True):
        close(got, expected, dtype)
    for got, expected in zip(grads, expected_grads, strict=True):
        close(got, expected, dtype, atol=1e-3)


@grid(
    60,
    return_final=[False, True],
    has_init=[False, True],
    channel_last=[True, False],
    length=LENGTHS,
    dim=[64, 4128],
)
def test_causal_conv1d(device, case):
    skip_what_takes_minutes(device, 2 * case["dim"] * case["length"])
    x, weight, bias = inputs(device, case)
    tensors = {"x": x, "weight": weight, "bias": bias}
    if case["has_init"]:
        states = torch.randn(2, case["width"] - 1, case["dim"], device=device, dtype=case["dtype"])
        tensors["initial_states"] = states.transpose(1, 2)
    tensors = {name: t for name, t in tensors.items() if t is not None}
    options = {"return_final_states": case["return_final"], "activation": activation(case)}

    def named(function):
        def call(*leaves):
            outs = function(**dict(zip(tensors, leaves, strict=True)), **options)
            return outs if isinstance(outs, tuple) else (outs,)

        return call

    compare(named(causal_conv1d_fn), named(causal_conv1d_ref), [*tensors.values()], case["dtype"])


def step(device, case, batch, entries):
    """x (B, D, S), conv_state (entries, D, state_len) side by side in channels, weight, bias."""
    dim, width = case["dim"], case["width"]
    state_len = random.Random(str(case)).randrange(width - 1, width + 10)
    x = torch.randn(batch, case["tokens"], dim, device=device).to(case["dtype"]).transpose(1, 2)
    state = torch.randn(entries, state_len, dim, device=device).to(case["dtype"]).transpose(1, 2)
    weight = torch.randn(dim, width, device=device)
    bias = torch.randn(dim, device=device) if case["bias"] else None
    return x, state, weight, bias


STEPS = {"tokens": [1, 4, 5], "dim": [2048, 2064, 4096]}


@grid(16, circular=[False, True], **STEPS)
def test_causal_conv1d_update(device, case):
    x, state, weight, bias = step(device, case, 64, 64)
    seqlens = None
    if case["circular"]:
        seqlens = torch.randint(0, 1024, (64,), dtype=torch.int32, device=device)
    expected_state = state.clone()
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, activation(case), seqlens)
    out = causal_conv1d_update(x, state, weight, bias, activation(case), seqlens)
    assert torch.equal(state, expected_state)
    close(out, expected, case["dtype"])


@grid(16, circular=[False, True], **STEPS)
def test_causal_conv1d_update_with_batch_gather(device, case):
    x, pool, weight, bias = step(device, case, 64, 640)
    indices = torch.randperm(640, device=device)[:64].to(torch.int32)
    seqlens = None
    if case["circular"]:
        seqlens = torch.randint(0, 1024, (64,), dtype=torch.int32, device=device)
    expected_pool, rows = pool.clone(), pool[indices.long()]
    expected = causal_conv1d_update_ref(x, rows, weight, bias, activation(case), seqlens)
    expected_pool[indices.long()] = rows
    out = causal_conv1d_update(x, pool, weight, bias, activation(case), seqlens, indices)
    assert torch.equal(pool, expected_pool)
    close(out, expected, case["dtype"])


@grid(16, **STEPS)
def test_causal_conv1d_update_with_padding(device, case):
    x, pool, weight, bias = step(device, case, 64, 640)
    indices = torch.randperm(640, device=device)[:64].to(torch.int32)
    padded = torch.randperm(64, device=device)[:32]
    indices[padded] = -1
    live = indices >= 0
    expected_pool, rows = pool.clone(), pool[indices[live].long()]
    expected = causal_conv1d_update_ref(x[live], rows, weight, bias, activation(case))
    expected_pool[indices[live].long()] = rows
    out = causal_conv1d_update(x, pool, weight, bias, activation(case), conv_state_indices=indices)
    assert torch.equal(pool, expected_pool)
    assert not out[padded].any()
    close(out[live], expected, case["dtype"])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dim", [2048, 2064, 4096])
def test_causal_conv1d_get_states(device, dtype, dim):
    lengths = torch.randint(1, 32, (100,))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    x = torch.randn(int(lengths.sum()), dim, device=device).to(dtype)
    states = causal_conv1d_varlen_states(x, cu_seqlens, 20)
    assert torch.equal(states, causal_conv1d_varlen_states_ref(x, cu_seqlens, 20))


def run(device, x, weight, bias, dout):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = causal_conv1d_fn(*leaves, activation="silu")
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("channel_last", [False, True])
def test_causal_conv1d_race_condition(device, channel_last):
    """Many repeats: outputs and dx keep their bits."""
    dim, length, repeats = (4128, 2048, 300) if device == "cuda" else (257, 300, 10)
    case = {"dim": dim, "length": length, "width": 4, "bias": True, "dtype": torch.bfloat16}
    x, weight, bias = inputs(device, case | {"channel_last": channel_last})
    dout = torch.randn_like(x)
    out, dx, dweight, dbias = run(device, x, weight, bias, dout)
    for _ in range(repeats):
        again = run(device, x, weight, bias, dout)
        assert torch.equal(again[0], out) and torch.equal(again[1], dx)
        torch.testing.assert_close(again[2], dweight, rtol=0, atol=1e-4 * dweight.abs().max())
        torch.testing.assert_close(again[3], dbias, rtol=0, atol=1e-4 * dbias.abs().max())


def split(length, device, padding=0):
    """seq_idx (3, length) of random sequences, and their lengths; the last is -1 with padding."""
    rows, lengths = [], []
    for _ in range(3):
        cuts = sorted(random.sample(range(1, length), min(3, length - 1)))
        parts = [end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True)]
        ids = [-1 if padding and i == len(parts) - 1 else i for i in range(len(parts))]
        counts = torch.tensor(parts)
        rows.append(torch.tensor(ids, dtype=torch.int32).repeat_interleave(counts))
        lengths.append(parts)
    return torch.stack(rows).to(device), lengths


def per_sequence(x, weight, bias, lengths, case):
    rows = []
    for row, parts in zip(x, lengths, strict=True):
        pieces = row[None].split(parts, dim=-1)
        rows.append(
            torch.cat(
                [causal_conv1d_ref(p, weight, bias, activation=activation(case)) for p in pieces],
                dim=-1,
            )
        )
    return torch.cat(rows)


@grid(24, channel_last=[True, False], length=LENGTHS[2:], dim=[64, 4128])
def test_causal_conv1d_varlen(device, case):
    skip_what_takes_minutes(device, 3 * case["dim"] * case["length"])
    random.seed(0)
    seq_idx, lengths = split(case["length"], device)
    tensors = [t for t in inputs(device, case, batch=3) if t is not None]

    def packed(x, weight, bias=None):
        return (causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation(case)),)

    def separate(x, weight, bias=None):
        return (per_sequence(x, weight, bias, lengths, case),)

    compare(packed, separate, tensors, case["dtype"])


@grid(12, channel_last=[True, False], length=[128, 256, 512, 1024], dim=[64, 4128])
def test_causal_conv1d_varlen_padding(device, case):
    skip_what_takes_minutes(device, 3 * case["dim"] * case["length"])
    random.seed(0)
    seq_idx, lengths = split(case["length"], device, padding=1)
    x, weight, bias = inputs(device, case, batch=3)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation=activation(case))
    expected = per_sequence(x, weight, bias, lengths, case)
    padding = (seq_idx < 0)[:, None].expand(out.shape)
    assert not out[padding].any()
    close(out[~padding], expected[~padding], case["dtype"])


@pytest.fixture
def deterministic(monkeypatch):
    """Turns torch's switch, with no variable in the way; off again afterwards."""
    monkeypatch.delenv(determinism.VARIABLE, raising=False)
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def backward_case(device, channel_last):
    case = {"dim": 1024, "length": 500, "width": 4, "bias": True, "dtype": torch.bfloat16}
    x, weight, bias = inputs(device, case | {"channel_last": channel_last})
    return device, x, weight, bias, torch.randn_like(x)


@pytest.mark.parametrize("channel_last", [False, True])
def test_causal_conv1d_bwd_deterministic_reproducible(device, deterministic, channel_last):
    case = backward_case(device, channel_last)
    deterministic(True)
    first, *others = (run(*case) for _ in range(5))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("channel_last", [False, True])
def test_causal_conv1d_bwd_deterministic_close_to_default(device, deterministic, channel_last):
    case = backward_case(device, channel_last)
    for _ in range(3):
        deterministic(False)
        _, dx, dweight, dbias = run(*case)
        deterministic(True)
        _, other_dx, other_dweight, other_dbias = run(*case)
        torch.testing.assert_close(other_dx, dx, rtol=1e-2, atol=5e-2)
        torch.testing.assert_close(other_dweight, dweight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other_dbias, dbias, rtol=1e-3, atol=1e-3)
