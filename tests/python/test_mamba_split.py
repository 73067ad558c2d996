"""mamba_split_conv1d_scan_combined against its reference, and what it keeps between the passes."""

import functools
import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from bad_calls import FAULTS, SHAPES, assert_refused, spoil, thousand_examples
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops.mamba_split import conv1d_scan
from mamba_ssm.ops.triton.ssd_combined import (
    MambaSplitConv1dScanCombinedFn,
    mamba_conv1d_scan_ref,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
)


def problem(
    device="cpu",
    dtype=torch.float32,
    heads=4,
    headdim=6,
    groups=2,
    d_state=5,
    extra=0,
    length=21,
    norm=True,
    out=True,
    bias=True,
    channels=False,
):
    """(tensors that have gradients, options)."""
    wide = torch.promote_types(dtype, torch.float32)
    dim = heads * headdim
    conv = dim + 2 * groups * d_state

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype)

    tensors = {
        "zxbcdt": randn(2, length, 2 * extra + dim + conv + heads),
        "conv1d_weight": randn(conv, 4) / 2,
        "conv1d_bias": randn(conv) if bias else None,
        "dt_bias": randn(heads, dtype=wide) - 1,
        "A": -torch.rand(heads, device=device, dtype=wide) - 0.5,
        "D": randn(heads, *([headdim] if channels else []), dtype=wide),
        "rmsnorm_weight": randn(dim) if norm else None,
        "outproj_weight": randn(9, extra + dim) / dim**0.5 if out else None,
        "outproj_bias": randn(9) if out and bias else None,
    }
    options = {"ngroups": groups, "headdim": None if channels else headdim}
    return tensors, options


def evaluate(function, tensors, **options):
    """(outputs, gradient of each tensor) of the sum of squares."""
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}
    outs = function(**leaves, chunk_size=8, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(sum(o.float().square().sum() for o in outs), given.values())
    return outs, dict(zip(given, grads, strict=True))


def assert_equal(got, expected, tolerance=2e-4):
    for one, other in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for name, grad in expected[1].items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(
            got[1][name], grad, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: n + m
        )


ROWS = {
    "base": {},
    "no_norm": {"norm": False},
    "no_projection": {"out": False},
    "neither": {"norm": False, "out": False},
    "no_bias": {"bias": False},
    "mlp": {"extra": 7},
    "mlp_no_norm": {"extra": 7, "norm": False},  # upstream's weight gradient lacks the MLP's part
    "mlp_no_projection": {"extra": 7, "out": False},
    "D_per_channel": {"channels": True},
    "odd_channels": {"heads": 3, "headdim": 5, "groups": 1, "d_state": 3},
    "one_group": {"groups": 1},
    "length_1": {"length": 1},
    "length_300": {"length": 300},
}


@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
@pytest.mark.parametrize("row", ROWS)
def test_forward_and_backward_are_the_reference(row, before, device):
    tensors, options = problem(device, **ROWS[row])
    options |= {"norm_before_gate": before}
    got = evaluate(mamba_split_conv1d_scan_combined, tensors, **options)
    assert_equal(got, evaluate(mamba_split_conv1d_scan_ref, tensors, **options))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.2, 0.5)], ids=str)
def test_activation_and_limits(activation, limit, device):
    tensors, options = problem(device)
    options |= {"activation": activation, "dt_limit": limit}
    got = evaluate(mamba_split_conv1d_scan_combined, tensors, **options)
    assert_equal(got, evaluate(mamba_split_conv1d_scan_ref, tensors, **options))


def test_gradcheck():
    shape = {"heads": 2, "headdim": 3, "groups": 1, "d_state": 2, "length": 4, "extra": 1}
    tensors, options = problem(dtype=torch.float64, **shape)
    tensors["initial_states"] = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    names = list(tensors)

    def function(*values):
        arguments = dict(zip(names, values, strict=True))
        return mamba_split_conv1d_scan_combined(
            **arguments, **options, chunk_size=2, return_final_states=True
        )

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_the_reference_groups_its_norm():
    """Not so upstream's, whose norm spans all channels."""
    tensors, options = problem(dtype=torch.float64, out=False)
    whole = mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=8)
    z = tensors["zxbcdt"][..., :24]
    normed = whole / (tensors["rmsnorm_weight"] * F.silu(z))
    mean = normed.unflatten(-1, (2, 12)).square().mean(-1)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float64(dtype, device):
    tensors, options = problem(device, dtype, length=70)
    exact = {n: t.cpu().double() for n, t in tensors.items()}
    (out,), grads = evaluate(mamba_split_conv1d_scan_combined, tensors, **options)
    (truth,), true_grads = evaluate(mamba_split_conv1d_scan_ref, exact, **options)
    assert out.dtype == dtype
    for one, other in [(out, truth), *((grads[n], true_grads[n]) for n in tensors)]:
        error = (one.cpu().double() - other).square().sum() / other.square().sum()
        assert error < (1e-3 if dtype == torch.bfloat16 else 1e-4)
    assert all(grads[name].dtype == tensors[name].dtype for name in tensors)


def test_packed_sequences_are_separate_ones(device):
    """Ends of sequences in the convolution's window, and a sequence of one step."""
    tensors, options = problem(device, length=13, extra=2)
    lengths = [5, 1, 2, 5]
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(2, -1)

    def apart(zxbcdt, **rest):
        parts = zxbcdt.split(lengths, dim=1)
        return torch.cat([mamba_split_conv1d_scan_combined(part, **rest) for part in parts], dim=1)

    seq_idx = ids.to(device, torch.int32)
    got = evaluate(mamba_split_conv1d_scan_combined, tensors, **options, seq_idx=seq_idx)
    assert_equal(got, evaluate(apart, tensors, **options))


@pytest.mark.parametrize("boundary", [1, 2, 3, 4, 7, 8, 9, 19])
def test_seq_idx_boundaries_anywhere(device, boundary):
    """A sequence of one step behind each, then another one and a tail of -1, which takes no part in a gradient."""
    tensors, options = problem(device, length=25, extra=2)
    cuts = [0, boundary, boundary + 1, 22]
    ids = torch.full((2, 25), -1, dtype=torch.int32, device=device)
    for i, begin in enumerate(cuts[:-1]):
        ids[:, begin : cuts[i + 1]] = i

    def packed(zxbcdt, **rest):
        return mamba_split_conv1d_scan_combined(zxbcdt, **rest, seq_idx=ids)[:, :22]

    def apart(zxbcdt, **rest):
        parts = [zxbcdt[:, begin:end] for begin, end in itertools.pairwise(cuts)]
        return torch.cat([mamba_split_conv1d_scan_combined(part, **rest) for part in parts], dim=1)

    assert_equal(evaluate(packed, tensors, **options), evaluate(apart, tensors, **options))


@pytest.mark.parametrize("name", ["zxbcdt", "conv1d_weight", "A", "D", "rmsnorm_weight"])
def test_expanded_sliced_and_misaligned_inputs(device, name):
    tensors, options = problem(device, extra=2)
    tensor = tensors[name]
    wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 5))
    wide[..., 3:-2] = tensor
    flat = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    for view in (
        wide[..., 3:-2],
        flat,
        tensor[:1].expand(tensor.shape),
        tensor.transpose(0, -1).contiguous().transpose(0, -1),
    ):
        got, expected = (
            mamba_split_conv1d_scan_combined(**tensors | {name: t}, **options, chunk_size=8)
            for t in (view, view.contiguous())
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    tensors, options = problem(device)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with context():
        out = mamba_split_conv1d_scan_combined(**leaves, **options, chunk_size=8)
    assert not out.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunk_size_never_changes_a_result(device, chunk_size):
    tensors, options = problem(device)
    got = mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=chunk_size)
    expected = mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=8)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_states_carry_on_where_the_convolution_is_one_tap(device):
    tensors, options = problem(device, length=12, out=False)
    tensors["conv1d_weight"] = tensors["conv1d_weight"][:, 3:]
    tensors["initial_states"] = torch.randn(2, 4, 6, 5, device=device)

    def whole(conv1d_weight, **rest):
        taps = F.pad(conv1d_weight, (3, 0))
        return mamba_split_conv1d_scan_combined(conv1d_weight=taps, **rest)

    def in_two(zxbcdt, initial_states, **rest):
        first, states = whole(zxbcdt=zxbcdt[:, :7], initial_states=initial_states, **rest)
        second, states = whole(zxbcdt=zxbcdt[:, 7:], initial_states=states, **rest)
        return torch.cat([first, second], dim=1), states

    options |= {"return_final_states": True}
    got = evaluate(whole, tensors, **options)
    assert got[0][1].dtype == torch.float32
    assert_equal(got, evaluate(in_two, tensors, **options))


def test_gradient_of_the_states_alone(device):
    tensors, options = problem(device)
    zxbcdt = tensors.pop("zxbcdt").requires_grad_()
    weight = tensors["outproj_weight"].requires_grad_()
    _, states = mamba_split_conv1d_scan_combined(
        zxbcdt, **tensors, **options, chunk_size=8, return_final_states=True
    )
    grads = torch.autograd.grad(states.sum(), (zxbcdt, weight), allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[0][..., :24].abs().max() == 0  # not of z
    assert grads[1] is None or not grads[1].any()


def test_autocast_casts_the_projection(device):
    tensors, options = problem(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        (out,), grads = evaluate(mamba_split_conv1d_scan_combined, tensors, **options)
    (exact,), expected = evaluate(mamba_split_conv1d_scan_combined, tensors, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        error = (grad - expected[name]).square().sum() / expected[name].square().sum()
        assert error < 1e-3
    tensors |= {"outproj_weight": None, "outproj_bias": None}
    with torch.autocast(device, dtype=torch.bfloat16):
        assert mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=8).dtype == (
            torch.float32
        )


def saved(function):
    """Bytes that the backward pass of function() keeps, and its result."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(sizes.values()), result


def test_nothing_but_the_arguments_is_kept(device):
    tensors, options = problem(device, length=300)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    given = sum(t.untyped_storage().nbytes() for t in leaves.values())
    kept, _ = saved(lambda: mamba_split_conv1d_scan_combined(**leaves, **options, chunk_size=8))
    assert kept == given


@pytest.mark.gpu
def test_memory_of_a_training_step():
    """Kept: nothing beside the arguments and the result. Most at once: 13 times the bytes of x."""
    heads, headdim, d_state, length = 24, 64, 128, 2048
    tensors, options = problem(
        "cuda", torch.bfloat16, heads, headdim, 1, d_state, length=length, out=False, norm=False
    )
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}

    def step():
        return mamba_split_conv1d_scan_combined(**leaves, **options, chunk_size=256)

    torch.autograd.grad(step().sum(), leaves.values())  # what libraries allocate once
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = step()
    x_bytes = 2 * length * heads * headdim * 2
    assert torch.cuda.memory_allocated() - before <= 1.01 * x_bytes
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, leaves.values(), torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 13 * x_bytes


@pytest.mark.parametrize("empty", [(0, 5), (2, 0)], ids=str)
def test_empty_batches_and_sequences(empty, device):
    tensors, options = problem(device, extra=2)
    tensors["zxbcdt"] = tensors["zxbcdt"][: empty[0], : empty[1]]
    (out, states), grads = evaluate(
        mamba_split_conv1d_scan_combined, tensors, **options, return_final_states=True
    )
    assert out.shape == (*empty, 9) and states.shape == (empty[0], 4, 6, 5)
    assert not any(grad.any() for name, grad in grads.items() if name != "outproj_bias")


def test_compiles_to_one_graph(device):
    tensors, options = problem(device, extra=2)
    compiled = torch.compile(mamba_split_conv1d_scan_combined, fullgraph=True, backend="aot_eager")
    assert_equal(
        evaluate(compiled, tensors, **options),
        evaluate(mamba_split_conv1d_scan_combined, tensors, **options),
    )


def test_the_class_takes_the_functions_arguments():
    tensors, options = problem(out=False, norm=False)
    names = ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D")
    arguments = (*(tensors[name] for name in names), 8, None, None, (0.0, math.inf), False)
    arguments += ("silu", None, 1e-6, None, None, 6, 2)
    (out,) = MambaSplitConv1dScanCombinedFn.apply(*arguments)
    expected = mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=8)
    assert torch.equal(out, expected)


def test_rmsnorm_eps_is_not_read_without_a_norm():
    """As transformers' FalconH1 calls it."""
    tensors, options = problem(norm=False)
    out = mamba_split_conv1d_scan_combined(**tensors, **options, chunk_size=8, rmsnorm_eps=None)
    assert out.isfinite().all()


def test_errors():
    tensors, options = problem(extra=2)

    def message(error=RuntimeError, **changes):
        with pytest.raises(error) as caught:
            mamba_split_conv1d_scan_combined(**{**tensors, **options, "chunk_size": 8, **changes})
        return str(caught.value)

    assert "needs headdim" in message(ValueError, headdim=None)
    assert "24 rows for x and 2 * 3 * d_state" in message(ngroups=3)
    assert "zxbcdt must have 24 + 44 + 4 features" in message(zxbcdt=tensors["zxbcdt"][..., 1:])
    assert "zxbcdt must have shape (B, L, F)" in message(zxbcdt=tensors["zxbcdt"][0])
    assert "dt_bias must have shape (4)" in message(dt_bias=tensors["dt_bias"][1:])
    assert "A must have shape (4)" in message(A=tensors["A"][1:])
    assert "rmsnorm_weight must have shape (24)" in message(
        rmsnorm_weight=tensors["rmsnorm_weight"][1:]
    )
    assert "outproj_weight must have shape (E, 26)" in message(
        outproj_weight=tensors["outproj_weight"][:, 1:]
    )
    assert "outproj_bias must have shape (9)" in message(outproj_bias=torch.zeros(3))
    assert "needs outproj_weight" in message(ValueError, outproj_weight=None)
    assert "activation" in message(NotImplementedError, activation="gelu")
    assert "seq_idx" in message(seq_idx=torch.zeros(2, 5, dtype=torch.int32))


NAMES = (
    "zxbcdt",
    "conv1d_weight",
    "weight",
    "conv1d_bias",
    "bias",
    "dt_bias",
    "dt",
    "A",
    "D",
    "initial_states",
    "rmsnorm_weight",
    "outproj_weight",
    "outproj_bias",
    "x",
    "tensors",
)


@st.composite
def bad_calls(draw):
    """Arguments by name."""
    tensors, options = problem(
        extra=draw(st.sampled_from([0, 3])),
        length=draw(st.integers(2, 9)),
        groups=draw(st.sampled_from([1, 2])),
        d_state=draw(st.integers(2, 5)),
        channels=draw(st.booleans()),
    )
    tensors["initial_states"] = torch.randn(
        2, 4, 6, (tensors["conv1d_bias"].numel() - 24) // (2 * options["ngroups"])
    )
    name, fault = draw(st.sampled_from(list(tensors))), draw(st.sampled_from(FAULTS))
    axes = {"zxbcdt": [2], "conv1d_weight": [0], "outproj_weight": [1]}.get(name)
    if name == "conv1d_weight" and fault in SHAPES:
        fault = "flat"  # one channel more or less may be another number of states
    if fault == "dtype":
        fault = "meta"  # parameters are converted
    return tensors | options | {name: spoil(draw, tensors[name], fault, axes)}


@thousand_examples
@given(bad_calls())
def test_generated_bad_calls_change_nothing(arguments):
    function = functools.partial(mamba_split_conv1d_scan_combined, chunk_size=8)
    assert_refused(function, names=NAMES, **arguments)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_conv1d_scan_in_both_directions(reverse, packed, recompute, device):
    """Backwards it is the mirror of the layer of the mirror."""
    tensors, options = problem(device, out=False, norm=False)
    z, xBC, dt = tensors["zxbcdt"].split([24, 44, 4], dim=-1)
    ids = None
    if packed:
        lengths = torch.tensor([1, 7, 2, 11])
        ids = torch.arange(4).repeat_interleave(lengths).expand(2, -1).to(device, torch.int32)
    weights = (tensors["conv1d_weight"], tensors["conv1d_bias"])
    rest = {"D": tensors["D"], "dt_bias": tensors["dt_bias"]} | options

    def mirror(tensor):
        return tensor.flip(1) if reverse and tensor is not None else tensor

    def function(xBC, dt, z, **keywords):
        arguments = (*weights, dt, tensors["A"], keywords.pop("chunk_size"))
        return conv1d_scan(xBC, *arguments, **rest, z=z, **keywords)

    def mirrored(xBC, dt, z, **keywords):
        out = function(mirror(xBC), mirror(dt), mirror(z), seq_idx=mirror(ids), **keywords)
        return mirror(out)

    given = {"xBC": xBC, "dt": dt, "z": z}
    got = evaluate(function, given, seq_idx=ids, reverse=reverse, recompute=recompute)
    assert_equal(got, evaluate(mirrored, given))


def test_conv1d_scan_ref_finds_headdim():
    tensors, _ = problem(dtype=torch.float64)
    z, xBC, dt = tensors["zxbcdt"].split([24, 44, 4], dim=-1)
    arguments = (xBC, tensors["conv1d_weight"], tensors["conv1d_bias"], dt, tensors["A"], 8)
    by_name = mamba_conv1d_scan_ref(*arguments, z=z, headdim=6, ngroups=2)
    assert by_name.shape == (2, 21, 4, 6)
    assert torch.equal(
        by_name, mamba_conv1d_scan_ref(*arguments, z=z.unflatten(2, (4, 6)), ngroups=2)
    )
    with pytest.raises(ValueError, match="headdim is needed"):
        mamba_conv1d_scan_ref(*arguments, ngroups=2)
