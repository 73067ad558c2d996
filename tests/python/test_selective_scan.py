"""selective_scan_fn against the reference, its identities and its graph."""

import functools
import itertools

import pytest
import torch
from compare import DTYPES, judge
from mamba_ssm.native import ops
from mamba_ssm.native import selective_scan as native
from mamba_ssm.ops.selective_scan_interface import (
    SelectiveScanFn,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.utils.determinism import set_deterministic_mode


@pytest.fixture
def deterministic():
    set_deterministic_mode(True)
    yield
    set_deterministic_mode(None)


def problem(
    device="cpu",
    dtype=torch.float32,
    batch=2,
    dim=24,
    length=120,
    d_state=16,
    groups=1,
    static=(),
    absent=(),
    layout=None,
    complex_a=False,
):
    """Inputs of a scan as keyword arguments; the state's side is float32 (float64 for float64), or complex."""
    real = torch.promote_types(dtype, torch.float32)
    state = real.to_complex() if complex_a else real
    pairs = 2 if complex_a else 1

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device, dtype=dtype if dtype.is_complex else None).to(
            dtype
        )

    def projection(name):
        if name in static:
            return randn(dim, d_state, dtype=state)
        return randn(batch, groups, d_state, pairs * length)

    tensors = {
        "u": randn(batch, dim, length),
        "delta": 0.5 * randn(batch, dim, length),
        "A": -torch.rand(dim, d_state, device=device).to(state) - 0.1,
        "B": projection("B"),
        "C": projection("C"),
        "D": randn(dim, dtype=real),
        "z": randn(batch, dim, length),
        "delta_bias": randn(dim, dtype=real) - 1.0,
        "initial_states": randn(batch, dim, d_state, dtype=state),
    }
    if complex_a:  # a state turns by several radians a step
        tensors["A"] = torch.complex(tensors["A"].real, 3 * randn(dim, d_state, dtype=real))
    if layout == "time last but not dense":
        tensors["u"] = randn(batch, 2 * dim, length + 3)[:, dim:, 3:]
        tensors["z"] = randn(batch, length, dim).transpose(1, 2)
        tensors["B"] = randn(batch, pairs * length, groups, d_state).permute(0, 2, 3, 1)
    elif layout == "stride 0":
        tensors["u"] = randn(batch, 1, length).expand(-1, dim, -1)
        tensors["delta"] = randn(1, dim, length).expand(batch, -1, -1)
        tensors["z"] = randn(batch, dim, 1).expand(-1, -1, length)
    return {name: None if name in absent else tensor for name, tensor in tensors.items()}


def plain_scan(u, delta, A, B, C, D, z, delta_bias, initial_states, reverse=False, seq_idx=None):
    """The formula one step at a time: gradients are summed over time and channels in order, in the inputs' dtype.

    Autograd sums the reference's in pairs, which no kernel can afford and which would be too fine a yardstick.
    """
    batch, dim, length = u.shape
    if A.is_complex():
        B, C = (
            torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) if t.dim() == 4 else t
            for t in (B, C)
        )
    repeat = [
        t.index_select(1, torch.arange(dim) // (dim // t.shape[1])) if t.dim() == 4 else t
        for t in (B, C)
    ]
    state = initial_states if initial_states is not None else A.new_zeros(batch, *A.shape)
    outs = [None] * length
    order = range(length - 1, -1, -1) if reverse else range(length)
    for t in order:
        if seq_idx is not None and t != order[0]:
            same = seq_idx[:, t] == seq_idx[:, t - order.step]
            state = torch.where(same[:, None, None], state, 0)
        step = delta[..., t] if delta_bias is None else delta[..., t] + delta_bias
        step = torch.nn.functional.softplus(step, threshold=20.0).unsqueeze(-1)
        b, c = (p[..., t] if p.dim() == 4 else p for p in repeat)
        state = torch.exp(step * A) * state + step * b * u[..., t, None]
        y = (state * c).sum(-1)
        y = 2 * y.real if A.is_complex() else y
        y = y if D is None else y + D * u[..., t]
        outs[t] = y if z is None else y * torch.nn.functional.silu(z[..., t])
    return torch.stack(outs, -1) if length else u, state


# Each row changes one thing of the base.
ROWS = {
    "base": {},
    "length 1": {"length": 1},
    "one step short of a checkpoint": {"length": 255},
    "one checkpoint": {"length": 256},
    "one step past a checkpoint": {"length": 257},
    "several checkpoints and a ragged tail": {"length": 777},
    # Without D and delta_bias: their gradients would be one sum each that may cancel to nothing.
    "one channel": {"dim": 1, "absent": ("D", "delta_bias")},
    "channels fill no vector": {"dim": 13},
    "batch 1": {"batch": 1},
    "d_state 1": {"d_state": 1},
    "d_state 8": {"d_state": 8},
    "d_state 64": {"d_state": 64},
    "d_state 96": {"d_state": 96},
    "d_state 256": {"d_state": 256, "length": 40},
    "groups": {"groups": 2},
    "a group a channel": {"groups": 24},
    "static B": {"static": ("B",)},
    "static C": {"static": ("C",)},
    "static B and C": {"static": ("B", "C")},
    "no D": {"absent": ("D",)},
    "no gate": {"absent": ("z",)},
    "no bias": {"absent": ("delta_bias",)},
    "no initial state": {"absent": ("initial_states",)},
    "bare": {"absent": ("D", "z", "delta_bias", "initial_states")},
    "slices and transposes": {"layout": "time last but not dense"},
    "stride 0": {"layout": "stride 0"},
    "reverse": {"reverse": True},
    "reverse, slices and transposes": {"reverse": True, "layout": "time last but not dense"},
    "reverse, several checkpoints": {"reverse": True, "length": 777},
    "complex A": {"complex_a": True},
    "complex A, length 1": {"complex_a": True, "length": 1},
    "complex A, several checkpoints and a ragged tail": {"complex_a": True, "length": 777},
    "complex A, channels fill no vector": {"complex_a": True, "dim": 13},
    "complex A, d_state 1": {"complex_a": True, "d_state": 1},
    "complex A, d_state 40": {"complex_a": True, "d_state": 40},
    "complex A, groups": {"complex_a": True, "groups": 2},
    "complex A, a group a channel": {"complex_a": True, "groups": 24},
    "complex A, static B": {"complex_a": True, "static": ("B",)},
    "complex A, static C": {"complex_a": True, "static": ("C",)},
    "complex A, static B and C": {"complex_a": True, "static": ("B", "C")},
    "complex A, bare": {
        "complex_a": True,
        "absent": ("D", "z", "delta_bias", "initial_states"),
    },
    "complex A, slices and transposes": {
        "complex_a": True,
        "layout": "time last but not dense",
    },
    "complex A, reverse": {"complex_a": True, "reverse": True},
    "complex A, reverse, several checkpoints": {
        "complex_a": True,
        "reverse": True,
        "length": 777,
    },
    "complex A, reverse, static B and C": {
        "complex_a": True,
        "reverse": True,
        "static": ("B", "C"),
    },
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")] + [
    ("base", "f16"),
    ("base", "f64"),
    ("complex A", "f16"),
    ("complex A", "f64"),
]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
def test_outputs_and_gradients(device, row, dtype):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    changes = dict(ROWS[row])
    reverse = changes.pop("reverse", False)
    options = {"delta_softplus": True, "return_last_state": True, "reverse": reverse}
    judge(
        "selective_scan",
        dtype,
        lambda **tensors: selective_scan_fn(**tensors, **options),
        lambda **tensors: selective_scan_ref(**tensors, **options),
        problem(device, DTYPES[dtype], **changes),
        functools.partial(plain_scan, reverse=reverse),
    )


def test_without_softplus_and_without_last_state(device):
    tensors = problem(device, length=70, absent=("delta_bias",))
    tensors["delta"] = tensors["delta"].abs()
    judge(
        "selective_scan",
        "f32",
        lambda **t: (selective_scan_fn(**t, return_last_state=None),),
        lambda **t: (selective_scan_ref(**t),),
        tensors,
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize(
    "absent", [(), ("D", "z", "delta_bias", "initial_states")], ids=["all", "bare"]
)
@pytest.mark.parametrize(
    "static", [(), ("B",), ("C",), ("B", "C")], ids=["varying", "static B", "static C", "static"]
)
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_gradcheck(route, absent, static, reverse, complex_a):
    sizes = {"dim": 4, "length": 5, "d_state": 3, "groups": 2}
    tensors = problem(
        dtype=torch.float64, static=static, absent=absent, complex_a=complex_a, **sizes
    )
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        given = tensors | dict(zip(names, values, strict=True))
        if route == "eager":
            return selective_scan_fn(
                **given, delta_softplus=True, return_last_state=True, reverse=reverse
            )
        u, delta, A, B, C, *rest, initial = given.values()
        A, B, C, initial = native.as_parts(A, B, C, initial)
        inputs = (u, delta, A, B, C, *rest, initial)
        return ops.selective_scan_forward(*inputs, True, reverse=reverse)[:2]

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in names])


def test_reference_by_hand():
    """d_state 1, A = ln 1/2, so that delta = 1 halves the state; u = 1, 2, 3, B = 2, C = 3, D = 10."""
    out, last = selective_scan_ref(
        torch.tensor([[[1.0, 2.0, 3.0]]]),
        torch.ones(1, 1, 3),
        torch.tensor([[0.5]]).log(),
        torch.tensor([[2.0]]),
        torch.tensor([[3.0]]),
        D=torch.tensor([10.0]),
        return_last_state=True,
    )
    torch.testing.assert_close(out, torch.tensor([[[16.0, 35.0, 55.5]]]))
    torch.testing.assert_close(last, torch.tensor([[[8.5]]]))


def test_split_with_carried_state_is_the_whole(device):
    tensors = problem(device, length=301)
    options = {"delta_softplus": True, "return_last_state": True}
    whole, last = selective_scan_fn(**tensors, **options)
    state, parts = tensors["initial_states"], []
    for begin, end in ((0, 1), (1, 130), (130, 301)):
        part = {
            name: t[..., begin:end] if name in ("u", "delta", "B", "C", "z") else t
            for name, t in tensors.items()
        }
        out, state = selective_scan_fn(**(part | {"initial_states": state}), **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


TIMED = ("u", "delta", "B", "C", "z")  # what has a time axis


def flipped(tensors):
    return {name: t.flip(-1) if name in TIMED and t.dim() > 2 else t for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("length", [1, 77, 264, 600])
@pytest.mark.parametrize("static", [(), ("B", "C")], ids=["varying", "static"])
def test_reverse_is_flip_scan_flip(device, dtype, length, static):
    tensors = problem(device, DTYPES[dtype], length=length, static=static)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    options = {"delta_softplus": True, "return_last_state": True}
    out, last = selective_scan_fn(**leaves, **options, reverse=True)
    flipped_out, expected_last = selective_scan_fn(**flipped(leaves), **options)
    expected_out = flipped_out.flip(-1)
    cotangents = torch.randn_like(out), torch.randn_like(last)
    results, expected = (
        [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]
        for outputs in ((out, last), (expected_out, expected_last))
    )
    for result, wanted in zip(results, expected, strict=True):
        # CUDA sums across channels in any order, which may turn one rounding of a bfloat16 gradient.
        rtol = 1e-3 if result.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(result, wanted, rtol=rtol, atol=1e-4 * wanted.abs().max().item())


LENGTHS = {
    "one sequence": [70],
    "one step each": [1] * 9,
    "empty ones first, between and last": [0, 5, 0, 0, 1, 30, 0],
    "beside the borders of tiles": [1, 126, 1, 1, 127, 1, 255, 256, 9],
}


def sequences(device, lengths, padding=0, **changes):
    """(inputs of one packed row, its cu_seqlens); `initial_states` has a row for each sequence."""
    tensors = problem(device, batch=1, length=sum(lengths) + padding, **changes)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    if tensors["initial_states"] is not None:
        shape = (len(lengths), *tensors["initial_states"].shape[1:])
        tensors["initial_states"] = torch.randn(shape, device=device, dtype=tensors["A"].dtype)
    return tensors, bounds


def steps(tensors, name, begin, end):
    """The steps of one of the tensors; all of it where it has none."""
    t = tensors[name]
    if t is None or name not in TIMED or t.dim() == 2:
        return t
    width = t.shape[-1] // tensors["u"].shape[-1]
    return t[..., width * begin : width * end]


def separate(function, tensors, bounds, **options):
    """One call for each sequence, empty ones too: (out, last_state) put together."""
    outs, last_states = [], []
    for s, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        part = {name: steps(tensors, name, begin, end) for name in tensors}
        if part["initial_states"] is not None:
            part["initial_states"] = part["initial_states"][s : s + 1]
        out, last_state = function(**part, **options, return_last_state=True)
        outs.append(out)
        last_states.append(last_state)
    return torch.cat(outs, -1), torch.cat(last_states)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_packed_is_separate(device, complex_a, dtype, lengths, reverse):
    tensors, bounds = sequences(device, lengths, dtype=DTYPES[dtype], complex_a=complex_a)
    judge(
        "selective_scan",
        dtype,
        lambda **t: selective_scan_fn(
            **t,
            delta_softplus=True,
            return_last_state=True,
            cu_seqlens=bounds,
            reverse=reverse,
        ),
        lambda **t: separate(
            selective_scan_ref, t, bounds.cpu(), delta_softplus=True, reverse=reverse
        ),
        tensors,
        lambda **t: separate(
            lambda return_last_state, **part: plain_scan(**part), t, bounds.cpu(), reverse=reverse
        ),
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("static", [(), ("B", "C")], ids=["varying", "static"])
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_indices_of_every_batch_entry(device, complex_a, static, reverse):
    tensors = problem(device, length=300, static=static, complex_a=complex_a)
    seq_idx = torch.zeros(2, 300, dtype=torch.int32, device=device)
    seq_idx[0, 100:] = 1
    seq_idx[0, 255:] = 7
    seq_idx[1, 256:] = -1
    options = {"delta_softplus": True, "return_last_state": True, "reverse": reverse}
    judge(
        "selective_scan",
        "f32",
        lambda **t: selective_scan_fn(**t, **options, seq_idx=seq_idx),
        lambda **t: selective_scan_ref(**t, **options, seq_idx=seq_idx.cpu()),
        tensors,
        functools.partial(plain_scan, reverse=reverse, seq_idx=seq_idx.cpu()),
    )


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_gradcheck_packed(complex_a, route, reverse):
    sizes = {"dim": 2, "d_state": 2, "complex_a": complex_a}
    tensors, bounds = sequences("cpu", [2, 0, 1, 3], 1, dtype=torch.float64, **sizes)
    index = torch.tensor([[0, 0, 2, 3, 3, 3, 4]], dtype=torch.int32)

    def function(*values):
        given = dict(zip(tensors, values, strict=True))
        if route == "eager":
            return selective_scan_fn(
                **given,
                delta_softplus=True,
                return_last_state=True,
                cu_seqlens=bounds,
                reverse=reverse,
            )
        u, delta, A, B, C, *rest, initial = values
        A, B, C, initial = native.as_parts(A, B, C, initial)
        inputs = (u, delta, A, B, C, *rest, initial)
        return ops.selective_scan_forward(*inputs, True, index, 4, reverse)[:2]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_steps_beyond_the_last_sequence_are_padding(device):
    tensors, bounds = sequences(device, [6, 4], padding=5)
    tensors["u"][..., 10:] = float("nan")
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    options = {"delta_softplus": True, "return_last_state": True, "cu_seqlens": bounds}
    out, last = selective_scan_fn(**leaves, **options)
    cut = {name: t[..., :10] if name in TIMED else t for name, t in leaves.items()}
    expected_out, expected_last = selective_scan_fn(**cut, **options)
    torch.testing.assert_close(out[..., :10], expected_out)
    torch.testing.assert_close(last, expected_last)
    gradients = torch.autograd.grad(
        out[..., :10].square().sum() + last.sum(), [leaves["initial_states"], leaves["delta"]]
    )
    expected = torch.autograd.grad(
        expected_out.square().sum() + expected_last.sum(),
        [leaves["initial_states"], leaves["delta"]],
    )
    torch.testing.assert_close(gradients[0], expected[0])
    torch.testing.assert_close(gradients[1][..., :10], expected[1][..., :10])


def test_int64_lengths_are_as_good(device):
    tensors, bounds = sequences(device, [3, 0, 9])
    results = (
        selective_scan_fn(**tensors, return_last_state=True, cu_seqlens=each)
        for each in (bounds, bounds.long())
    )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"cu_seqlens": torch.tensor([0.0, 12.0])}, TypeError, "int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, "must have shape"),
        ({"cu_seqlens": torch.tensor([[0, 12]])}, ValueError, "must have shape"),
        ({"cu_seqlens": torch.tensor([1, 12])}, ValueError, "must start at 0"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 12])}, ValueError, "never fall"),
        ({"cu_seqlens": torch.tensor([0, 13])}, ValueError, "12 steps at most"),
        (
            {"cu_seqlens": torch.tensor([0, 12]), "seq_idx": torch.zeros(1, 12)},
            ValueError,
            "seq_idx or cu_seqlens, got both",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 12])}, RuntimeError, "initial_state must have shape"),
        ({"seq_idx": torch.zeros(1, 12)}, RuntimeError, "seq_idx must be int32"),
        ({"seq_idx": torch.zeros(1, 11, dtype=torch.int32)}, RuntimeError, "seq_idx must have"),
    ],
)
def test_bad_packing_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan_fn(**problem(batch=1, length=12), **change)


def test_batch_with_lengths_is_refused():
    with pytest.raises(ValueError, match="with u of batch 1"):
        selective_scan_fn(**problem(length=12), cu_seqlens=torch.tensor([0, 12]))


def test_three_dimensional_projection_is_one_group(device):
    tensors = problem(device, length=20)
    squeezed = tensors | {"B": tensors["B"].squeeze(1), "C": tensors["C"].squeeze(1)}
    assert torch.equal(selective_scan_fn(**squeezed), selective_scan_fn(**tensors))


def test_parameters_of_another_dtype_are_cast_and_get_their_gradient_back(device):
    tensors = problem(device, torch.bfloat16, length=20)
    half = {name: tensors[name].to(torch.bfloat16).requires_grad_() for name in ("D", "delta_bias")}
    out = selective_scan_fn(**(tensors | half), delta_softplus=True)
    expected = selective_scan_fn(
        **(tensors | {name: t.detach().float() for name, t in half.items()}), delta_softplus=True
    )
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.abs().sum() > 0 for t in half.values())


@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}], ids=["length", "batch"])
def test_empty(device, size):
    tensors = problem(device, **size)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    out, last = selective_scan_fn(**tensors, return_last_state=True)
    assert out.shape == tensors["u"].shape
    torch.testing.assert_close(last, tensors["initial_states"])
    (out.sum() + last.sum()).backward()
    assert all(t.grad is None or t.grad.shape == t.shape for t in tensors.values())
    assert tensors["A"].grad.abs().sum() == 0


def test_gradient_of_the_last_state_alone(device):
    tensors = problem(device, length=10)
    tensors["u"].requires_grad_()
    _, last = selective_scan_fn(**tensors, return_last_state=True)
    (gradient,) = torch.autograd.grad(last.sum(), tensors["u"])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "several, in reverse"])
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_compiles_to_one_graph(device, packed, complex_a):
    options = {"delta_softplus": True, "return_last_state": True}
    if packed:
        tensors, bounds = sequences(device, [13, 0, 20], complex_a=complex_a)
        options |= {"cu_seqlens": bounds, "reverse": True}
    else:
        tensors = problem(device, length=33, complex_a=complex_a)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    function = torch.compile(selective_scan_fn, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (selective_scan_fn, function):
        out, last = candidate(**tensors, **options)
        loss = out.square().sum() + last.abs().sum()
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        results.append((out, last, *gradients))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


def gradients_of(tensors, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, last = selective_scan_fn(**leaves, delta_softplus=True, return_last_state=True, **options)
    loss = out.square().sum() + last.abs().sum()
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    return [out, last, *wanted]


@pytest.mark.parametrize("case", ["several groups", "static", "packed, in reverse"])
@pytest.mark.parametrize("complex_a", [False, True], ids=["real", "complex"])
def test_deterministic_mode_repeats_its_bits(device, deterministic, complex_a, case):
    changes = {"batch": 3, "dim": 96, "length": 700, "complex_a": complex_a}
    options = {}
    if case == "static":
        changes["static"] = ("B", "C")
    elif case == "several groups":
        changes["groups"] = 8
    else:
        index = torch.arange(700, device=device, dtype=torch.int32) // 130
        options = {"reverse": True, "seq_idx": index.expand(3, -1)}
    tensors = problem(device, torch.bfloat16, **changes)
    first = gradients_of(tensors, **options)
    for _ in range(99 if device == "cuda" else 2):
        for once, again in zip(first, gradients_of(tensors, **options), strict=True):
            assert torch.equal(once, again)


@pytest.mark.gpu
def test_deterministic_sums_go_through_segments_of_time(deterministic):
    """Workspaces stay near 256 MB: here those of 20 tiles of 256 steps would be larger."""
    tensors = problem("cuda", torch.float32, dim=2048, length=20 * 256 - 3)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = gradients_of(tensors)
    tensors_alone = sum(t.nbytes for t in got) * 4
    assert torch.cuda.max_memory_allocated() - before < tensors_alone + (300 << 20)
    set_deterministic_mode(False)
    for one, other in zip(got, gradients_of(tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_apply_takes_upstreams_positional_arguments(device):
    tensors = list(problem(device, length=9).values())
    out, last = SelectiveScanFn.apply(*tensors[:8], True, True)
    expected = selective_scan_ref(*tensors[:8], True, True)
    torch.testing.assert_close((out, last), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("static", [(), ("B",), ("B", "C")], ids=["varying", "static B", "static"])
def test_complex_without_imaginary_parts_is_twice_real(device, dtype, static):
    """out = 2 C h + D u: the real scan with 2 C. Real numbers get the real part of the gradients."""
    tensors = problem(device, DTYPES[dtype], length=300, static=static)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}

    def widened(name):
        t = leaves[name]
        if t.dim() == 4:
            return torch.stack([t, torch.zeros_like(t)], -1).flatten(-2)
        return t.to(torch.complex64)

    wide = {name: widened(name) for name in ("A", "B", "C", "initial_states")}
    options = {"delta_softplus": True, "return_last_state": True}
    out, last = selective_scan_fn(**(leaves | wide), **options)
    expected_out, expected_last = selective_scan_fn(**(leaves | {"C": 2 * leaves["C"]}), **options)
    assert last.dtype == torch.complex64 and not last.imag.any()
    cotangents = torch.randn_like(out), torch.randn_like(expected_last)
    results, expected = (
        [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]
        for outputs in ((out, last.real), (expected_out, expected_last))
    )
    for result, wanted in zip(results, expected, strict=True):
        rtol = 1e-3 if result.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(result, wanted, rtol=rtol, atol=1e-4 * wanted.abs().max().item())


def test_conjugated_views_are_as_good(device):
    """`A.conj()` is a view whose memory holds A."""
    tensors = problem(device, length=9, static=("B", "C"), complex_a=True)
    names = ("A", "B", "C", "initial_states")
    views = {name: tensors[name].conj() for name in names}
    resolved = {name: tensors[name].conj().resolve_conj() for name in names}
    assert torch.equal(*(selective_scan_fn(**(tensors | t)) for t in (views, resolved)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"B": (2, 1, 16, 12)}, r"B must have shape .* \(batch, groups, d_state, 24\), got"),
        ({"C": (2, 3, 16, 24)}, r"C must have shape|3 groups of C|B has 1 groups"),
        ({"A": (24, 8)}, r"must have shape"),
        ({"initial_states": (2, 24, 8)}, r"initial_state must have shape \(2, 24, 16, 2\)"),
    ],
    ids=["not interleaved", "other groups", "other states", "initial state"],
)
def test_bad_shapes_with_complex_a_are_refused_by_name(change, message):
    tensors = problem(length=12, complex_a=True)
    (name, shape), *_ = change.items()
    with pytest.raises(RuntimeError, match=message):
        selective_scan_fn(**(tensors | {name: torch.ones(shape, dtype=tensors[name].dtype)}))


def test_complex_b_for_real_a_is_refused():
    tensors = problem(length=12, static=("B",))
    with pytest.raises(RuntimeError, match="B"):
        ops.selective_scan_forward(*(tensors | {"B": tensors["B"] + 0j}).values(), True)


@pytest.mark.gpu
def test_cuda_refuses_float64_by_name():
    with pytest.raises(RuntimeError, match="float64"):
        selective_scan_fn(**problem("cuda", torch.float64, length=4))
