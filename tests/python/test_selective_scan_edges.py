"""selective_scan_fn at its edges: a test for each case and for each fault of upstream that concerns it."""

import inspect

import pytest
import torch
from compare import DTYPES, judge
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from test_selective_scan import TIMED, plain_scan, problem, sequences

OPTIONS = {"delta_softplus": True, "return_last_state": True}


def assert_reference(tensors, dtype="f32", **options):
    judge(
        "selective_scan",
        dtype,
        lambda **t: selective_scan_fn(**t, **OPTIONS, **options),
        lambda **t: selective_scan_ref(**t, **OPTIONS, **options),
        tensors,
        plain_scan,
    )


def gradients(tensors, used=("out", "last_state"), **options):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = dict(
        zip(
            ("out", "last_state"),
            selective_scan_fn(**leaves, **OPTIONS, **options),
            strict=True,
        )
    )
    loss = sum(results[name].square().sum() for name in used)
    return torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)


# ---- cases ----


@pytest.mark.parametrize("static", [(), ("B",), ("C",), ("B", "C")], ids=str)
def test_one_step(device, static):
    assert_reference(problem(device, length=1, static=static))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [{"length": 0}, {"batch": 0}, {"length": 0, "batch": 0}], ids=str)
def test_no_steps_or_no_batch(device, size, reverse):
    tensors = problem(device, **size)
    out, last_state = selective_scan_fn(**tensors, **OPTIONS, reverse=reverse)
    assert out.shape == tensors["u"].shape
    assert torch.equal(last_state, tensors["initial_states"])
    for name, gradient in zip(tensors, gradients(tensors, reverse=reverse), strict=True):
        assert gradient.shape == tensors[name].shape
        expected = 2 * tensors[name] if name == "initial_states" else torch.zeros_like(gradient)
        assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("d_state", [1, 2, 3, 5, 7, 15, 17, 31, 33, 255, 256, 257, 600])
def test_any_d_state(device, d_state):
    assert_reference(problem(device, dim=4, length=33, d_state=d_state))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 8, 12, 24])
def test_any_divisor_of_the_channels_may_be_the_groups(device, groups):
    assert_reference(problem(device, groups=groups, length=40))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("boundary", [1, 2, 7, 8, 9, 255, 256, 257, 298])
def test_seq_idx_boundaries_anywhere(device, boundary, reverse):
    """Also beside the first one: a sequence of one step; and a tail of -1."""
    tensors = problem(device, length=300)
    del tensors["initial_states"]
    index = torch.zeros(2, 300, dtype=torch.int32, device=device)
    index[:, boundary:] = 1
    index[:, boundary + 1 :] = 2
    index[1, 299:] = -1
    out = selective_scan_fn(**tensors, delta_softplus=True, seq_idx=index, reverse=reverse)
    for row in range(2):
        cuts = [0, boundary, boundary + 1, 299, 300] if row else [0, boundary, boundary + 1, 300]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            if begin == end:
                continue
            part = {
                n: t[row : row + 1, ..., begin:end] if n in TIMED else t for n, t in tensors.items()
            }
            expected = selective_scan_fn(**part, delta_softplus=True, reverse=reverse)
            got = out[row : row + 1, :, begin:end]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_repeated_lengths_are_empty_sequences(device):
    tensors, bounds = sequences(device, [0, 5, 0, 0, 4, 0])
    _, last_states = selective_scan_fn(**tensors, **OPTIONS, cu_seqlens=bounds)
    for empty in (0, 2, 3, 5):
        assert torch.equal(last_states[empty], tensors["initial_states"][empty])
    del tensors["initial_states"]
    _, last_states = selective_scan_fn(**tensors, **OPTIONS, cu_seqlens=bounds)
    assert not last_states[[0, 2, 3, 5]].any() and last_states[[1, 4]].any()


def test_initial_states_without_a_gradient_get_none(device):
    tensors = problem(device, length=20)
    leaves = {n: t if n == "initial_states" else t.requires_grad_() for n, t in tensors.items()}
    selective_scan_fn(**leaves, delta_softplus=True).sum().backward()
    assert tensors["initial_states"].grad is None and tensors["u"].grad.abs().sum() > 0
    zeros = tensors | {"initial_states": torch.zeros_like(tensors["initial_states"])}
    absent = selective_scan_fn(**{**tensors, "initial_states": None}, **OPTIONS)
    for one, other in zip(selective_scan_fn(**zeros, **OPTIONS), absent, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C", "A", "initial_states"])
def test_expanded_sliced_and_misaligned_inputs(device, dtype, name):
    tensors = problem(device, DTYPES[dtype], length=70)
    tensor = tensors[name]
    wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 5))
    wide[..., 3:-2] = tensor
    flat = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    expanded = tensor[:1].expand(tensor.shape)
    for view in (wide[..., 3:-2], flat, expanded, tensor.mT.contiguous().mT):
        assert_reference(tensors | {name: view}, dtype)


@pytest.mark.parametrize("used", ["out", "last_state"])
def test_gradient_through_one_result_alone(device, used):
    tensors = problem(device, length=70)
    whole = gradients(tensors)
    alone = gradients(tensors, (used,))
    other = gradients(tensors, ("last_state" if used == "out" else "out",))
    for together, one, rest in zip(whole, alone, other, strict=True):
        torch.testing.assert_close(together, one + rest, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_no_graph(device, context):
    tensors = {name: t.requires_grad_() for name, t in problem(device, length=9).items()}
    with context():
        out, last_state = selective_scan_fn(**tensors, **OPTIONS)
    assert not out.requires_grad and not last_state.requires_grad


def test_autocast_takes_dtypes_as_given(device):
    tensors = problem(device, length=20)
    expected = selective_scan_fn(**tensors, **OPTIONS)
    with torch.autocast(device, torch.bfloat16):
        got = selective_scan_fn(**tensors, **OPTIONS)
    assert got[0].dtype == torch.float32
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_one_step_after_the_other_is_the_scan(device):
    tensors = problem(device, length=12)
    out, last_state = selective_scan_fn(**tensors, **OPTIONS)
    outs, state = [], tensors.pop("initial_states")
    for t in range(12):
        step = {n: x[..., t : t + 1] if n in TIMED else x for n, x in tensors.items()}
        each, state = selective_scan_fn(**step, **OPTIONS, initial_states=state)
        outs.append(each)
    torch.testing.assert_close(torch.cat(outs, -1), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last_state, rtol=1e-4, atol=1e-5)


def test_groups_are_expanded_projections(device):
    tensors = problem(device, groups=4, length=40)
    each = tensors | {n: tensors[n].repeat_interleave(6, dim=1) for n in ("B", "C")}
    for one, other in zip(
        selective_scan_fn(**tensors, **OPTIONS), selective_scan_fn(**each, **OPTIONS), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
def test_signatures_are_upstreams(function):
    upstreams = (
        "u delta A B C D=None z=None delta_bias=None delta_softplus=False return_last_state=False"
    )
    parameters = list(inspect.signature(function).parameters.values())
    names = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(names[:10]) == upstreams
    assert names[10:] == ["initial_states=None", "seq_idx=None", "cu_seqlens=None", "reverse=False"]


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
@pytest.mark.parametrize("value", [None, 1.0, [1.0]])
def test_what_is_no_tensor_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a tensor"):
        selective_scan_fn(**problem(length=4) | {name: value})


# ---- faults of upstream ----


@pytest.mark.parametrize("length", [5, 256, 300])
def test_upstream_fault_3_last_state_of_a_static_B(device, length):
    tensors = problem(device, length=length, static=("B",))
    _, last_state = selective_scan_fn(**tensors, **OPTIONS)
    varying = tensors["B"][None, :, :, None].expand(2, -1, -1, length).contiguous()
    every = tensors["C"].expand(-1, 24, -1, -1)
    _, expected = selective_scan_fn(**tensors | {"B": varying, "C": every}, **OPTIONS)
    torch.testing.assert_close(last_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [255, 256, 257])
def test_upstream_fault_3_gradient_of_the_last_state(device, length):
    assert_reference(problem(device, length=length))
    assert all(g.abs().sum() > 0 for g in gradients(problem(device), ("last_state",))[:4])


def test_upstream_fault_3_tail_of_a_chunk(device):
    """What lies behind the last step takes no part, whatever length the memory has."""
    tensors = problem(device, length=300)
    for length in (1, 9, 255, 256, 257, 299):
        cut = {n: t[..., :length] if n in TIMED else t for n, t in tensors.items()}
        dense = {n: t.contiguous() for n, t in cut.items()}
        for one, other in zip(
            selective_scan_fn(**cut, **OPTIONS), selective_scan_fn(**dense, **OPTIONS), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 70000])
def test_upstream_fault_5_more_channels_than_a_grid_has_rows(device, groups):
    assert_reference(problem(device, batch=1, dim=70000, length=3, d_state=2, groups=groups))
