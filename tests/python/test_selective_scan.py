"""selective_scan_fn against the reference, its identities and its graph."""

import pytest
import torch
from compare import DTYPES, judge
from mamba_ssm.native import ops
from mamba_ssm.ops.selective_scan_interface import (
    SelectiveScanFn,
    selective_scan_fn,
    selective_scan_ref,
)


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
):
    """Inputs of a scan as keyword arguments; the state's side is float32 (float64 for float64)."""
    state = torch.promote_types(dtype, torch.float32)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    def projection(name):
        if name in static:
            return randn(dim, d_state, dtype=state)
        return randn(batch, groups, d_state, length)

    tensors = {
        "u": randn(batch, dim, length),
        "delta": 0.5 * randn(batch, dim, length),
        "A": -torch.rand(dim, d_state, device=device).to(state) - 0.1,
        "B": projection("B"),
        "C": projection("C"),
        "D": randn(dim, dtype=state),
        "z": randn(batch, dim, length),
        "delta_bias": randn(dim, dtype=state) - 1.0,
        "initial_state": randn(batch, dim, d_state, dtype=state),
    }
    if layout == "time last but not dense":
        tensors["u"] = randn(batch, 2 * dim, length + 3)[:, dim:, 3:]
        tensors["z"] = randn(batch, length, dim).transpose(1, 2)
        tensors["B"] = randn(batch, length, groups, d_state).permute(0, 2, 3, 1)
    elif layout == "stride 0":
        tensors["u"] = randn(batch, 1, length).expand(-1, dim, -1)
        tensors["delta"] = randn(1, dim, length).expand(batch, -1, -1)
        tensors["z"] = randn(batch, dim, 1).expand(-1, -1, length)
    return {name: None if name in absent else tensor for name, tensor in tensors.items()}


def plain_scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
    """The formula one step at a time: parameters' gradients are summed over time in order, in the inputs' dtype.

    Autograd sums the reference's in pairs, which no kernel can afford and which would be too fine a yardstick.
    """
    batch, dim, length = u.shape
    repeat = [t.repeat_interleave(dim // t.shape[1], dim=1) if t.dim() == 4 else t for t in (B, C)]
    state = initial_state if initial_state is not None else u.new_zeros(batch, *A.shape)
    outs = []
    for t in range(length):
        step = delta[..., t] if delta_bias is None else delta[..., t] + delta_bias
        step = torch.nn.functional.softplus(step, threshold=20.0).unsqueeze(-1)
        b, c = (p[..., t] if p.dim() == 4 else p for p in repeat)
        state = torch.exp(step * A) * state + step * b * u[..., t, None]
        y = (state * c).sum(-1)
        y = y if D is None else y + D * u[..., t]
        outs.append(y if z is None else y * torch.nn.functional.silu(z[..., t]))
    return torch.stack(outs, -1), state


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
    "no initial state": {"absent": ("initial_state",)},
    "bare": {"absent": ("D", "z", "delta_bias", "initial_state")},
    "slices and transposes": {"layout": "time last but not dense"},
    "stride 0": {"layout": "stride 0"},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")] + [
    ("base", "f16"),
    ("base", "f64"),
]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
def test_outputs_and_gradients(device, row, dtype):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    options = {"delta_softplus": True, "return_last_state": True}
    judge(
        "selective_scan",
        dtype,
        lambda **tensors: selective_scan_fn(**tensors, **options),
        lambda **tensors: selective_scan_ref(**tensors, **options),
        problem(device, DTYPES[dtype], **ROWS[row]),
        plain_scan,
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


@pytest.mark.parametrize("route", ["eager", "registered"])
@pytest.mark.parametrize(
    "absent", [(), ("D", "z", "delta_bias", "initial_state")], ids=["all", "bare"]
)
@pytest.mark.parametrize("static", [(), ("B", "C")], ids=["varying", "static"])
def test_gradcheck(route, absent, static):
    tensors = problem(
        dtype=torch.float64, dim=4, length=5, d_state=3, groups=2, static=static, absent=absent
    )
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def function(*values):
        given = tensors | dict(zip(names, values, strict=True))
        if route == "eager":
            return selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
        return ops.selective_scan_forward(*given.values(), True)[:2]

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
    state, parts = tensors["initial_state"], []
    for begin, end in ((0, 1), (1, 130), (130, 301)):
        part = {
            name: t[..., begin:end] if name in ("u", "delta", "B", "C", "z") else t
            for name, t in tensors.items()
        }
        out, state = selective_scan_fn(**(part | {"initial_state": state}), **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(last, tensors["initial_state"])
    (out.sum() + last.sum()).backward()
    assert all(t.grad is None or t.grad.shape == t.shape for t in tensors.values())
    assert tensors["A"].grad.abs().sum() == 0


def test_gradient_of_the_last_state_alone(device):
    tensors = problem(device, length=10)
    tensors["u"].requires_grad_()
    _, last = selective_scan_fn(**tensors, return_last_state=True)
    (gradient,) = torch.autograd.grad(last.sum(), tensors["u"])
    assert gradient.abs().sum() > 0


def test_compiles_to_one_graph(device):
    tensors = {name: t.requires_grad_() for name, t in problem(device, length=33).items()}
    function = torch.compile(selective_scan_fn, fullgraph=True, backend="aot_eager")
    results = []
    for candidate in (selective_scan_fn, function):
        out, last = candidate(**tensors, delta_softplus=True, return_last_state=True)
        gradients = torch.autograd.grad(out.square().sum() + last.sum(), list(tensors.values()))
        results.append((out, last, *gradients))
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


def test_apply_takes_upstreams_positional_arguments(device):
    tensors = list(problem(device, length=9).values())
    out, last = SelectiveScanFn.apply(*tensors[:8], True, True)
    expected = selective_scan_ref(*tensors[:8], True, True)
    torch.testing.assert_close((out, last), expected, rtol=1e-4, atol=1e-4)


def test_complex_a_is_refused_by_name():
    tensors = problem(length=4)
    with pytest.raises(NotImplementedError, match="complex A"):
        selective_scan_fn(**(tensors | {"A": tensors["A"].to(torch.complex64)}))


@pytest.mark.gpu
def test_cuda_refuses_float64_by_name():
    with pytest.raises(RuntimeError, match="float64"):
        selective_scan_fn(**problem("cuda", torch.float64, length=4))
