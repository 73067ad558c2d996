"""torch.func.vmap over every operation is the loop over its mapped dimension, values and gradients."""

import pytest
import torch
from mamba_ssm.native.loader import NAMESPACE
from mamba_ssm.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layernorm_gated import layernorm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch.utils._python_dispatch import TorchDispatchMode

V, B, D, L, N, G, W = 3, 2, 4, 7, 5, 2, 3
P = 6  # channels of a head of the chunked scan, which has D heads


def scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, True, True, initial_state)


def reverse_scan(*arguments):
    return selective_scan_fn(*arguments, True, reverse=True)


def complex_scan(u, delta, A, B, C, D, z, delta_bias, initial_state):
    A, initial_state = torch.complex(A, A.sin()), torch.complex(initial_state, -initial_state)
    C = torch.complex(C, C.sin()) if C.dim() == 2 else C
    out, last_state = scan(u, delta, A, B, C, D, z, delta_bias, initial_state)
    return out, torch.view_as_real(last_state)


def chunked_scan(x, dt, A, B, C, D, z, dt_bias, initial_states=None, reverse=False):
    return mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size=4,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        return_final_states=True,
        reverse=reverse,
    )


def reverse_chunked_scan(*arguments):
    return chunked_scan(*arguments, reverse=True)


def conv(x, weight, bias, initial_states):
    return causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states=True, activation="silu"
    )


def packed_conv(x, weight, bias, seq_idx):
    return causal_conv1d_fn(x.mT.contiguous().mT, weight, bias, seq_idx)


def gated_norm(x, weight, bias, z):
    return layernorm_fn(x, weight, bias, z, group_size=3)


SCAN = {
    "u": (B, D, L),
    "delta": (B, D, L),
    "A": (D, N),
    "B": (B, G, N, L),
    "C": (B, G, N, L),
    "D": (D,),
    "z": (B, D, L),
    "delta_bias": (D,),
    "initial_state": (B, D, N),
}
COMPLEX = SCAN | {"B": (B, G, N, 2 * L), "C": (B, G, N, 2 * L)}
CHUNKED = {
    "x": (B, L, D, P),
    "dt": (B, L, D),
    "A": (D,),
    "B": (B, L, G, N),
    "C": (B, L, G, N),
    "D": (D,),
    "z": (B, L, D, P),
    "dt_bias": (D,),
    "initial_states": (B, D, P, N),
}
CONV = {"x": (B, D, L), "weight": (D, W), "bias": (D,), "initial_states": (B, D, W - 1)}
NORM = {"x": (B, 6), "weight": (6,), "bias": (6,), "residual": (B, 6)}
GATED = {"x": (B, 6), "weight": (6,), "bias": (6,), "z": (B, 6)}
# name: (function, shapes, how many calls of the forward operation a mapped one takes)
CASES = {
    "scan_batch": (scan, SCAN, "u delta B C z initial_state", 1),
    "scan_one_input": (scan, SCAN, "u", 1),
    "scan_parameters": (scan, SCAN, "A D delta_bias", 1),
    "scan_all": (scan, SCAN, " ".join(SCAN), 1),
    "reverse_scan": (reverse_scan, dict(list(SCAN.items())[:8]), "u delta B C z", 1),
    "scan_static_B": (scan, SCAN | {"B": (D, N)}, "u B", 1),
    "complex_scan_batch": (complex_scan, COMPLEX, "u delta B C z initial_state", 1),
    "complex_scan_all": (complex_scan, COMPLEX, " ".join(COMPLEX), 1),
    "complex_scan_static_C": (complex_scan, COMPLEX | {"C": (D, N)}, "u C", 1),
    "chunked_scan_batch": (chunked_scan, CHUNKED, "x dt B C z initial_states", 1),
    "chunked_scan_one_input": (chunked_scan, CHUNKED, "x", 1),
    "chunked_scan_parameters": (chunked_scan, CHUNKED, "A D dt_bias", 1),
    "chunked_scan_all": (chunked_scan, CHUNKED, " ".join(CHUNKED), 1),
    "chunked_scan_D_per_channel": (chunked_scan, CHUNKED | {"D": (D, P)}, "x D", 1),
    "reverse_chunked_scan": (reverse_chunked_scan, dict(list(CHUNKED.items())[:8]), "x dt B C", 1),
    "conv_batch": (conv, CONV, "x initial_states", 1),
    "conv_parameters": (conv, CONV, "weight bias", 1),
    "conv_all": (conv, CONV, " ".join(CONV), 1),
    "layer_norm_rows": (layer_norm_fn, NORM, "x residual", 1),
    "layer_norm_parameters": (layer_norm_fn, NORM, "weight bias", V),
    "gated_norm_rows": (gated_norm, GATED, "x z", 1),
    "gated_norm_gate": (gated_norm, GATED, "z", 1),
    "gated_norm_parameters": (gated_norm, GATED, "weight", V),
    "rms_norm_residual": (rms_norm_fn, NORM, "residual", 1),
}


def draw(shapes, mapped, device):
    """Tensors of these shapes, the mapped ones with a dimension of V more, and their in_dims."""
    tensors, in_dims = [], []
    for i, (name, shape) in enumerate(shapes.items()):
        if name in mapped:
            dim = i % (len(shape) + 1)  # anywhere
            shape = (*shape[:dim], V, *shape[dim:])
        else:
            dim = None
        tensor = torch.randn(shape, device=device)
        tensors.append(-tensor.abs() if name == "A" else tensor)
        in_dims.append(dim)
    return tensors, tuple(in_dims)


def pick(tensors, in_dims, i):
    return [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]


def tuples(results):
    return results if isinstance(results, tuple) else (results,)


def assert_close(got, expected):
    """A kernel of another size may sum in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class CallsOf(TorchDispatchMode):
    def __init__(self, ending):
        super().__init__()
        self.ending, self.count = ending, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == NAMESPACE and function._opname.endswith(self.ending)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=CASES)
def case(request, device):
    function, shapes, mapped, calls = CASES[request.param]
    return function, *draw(shapes, mapped.split(), device), calls


def test_values(case):
    function, tensors, in_dims, calls = case
    with CallsOf("_forward") as forward:
        mapped = torch.func.vmap(function, in_dims)(*tensors)
    assert forward.count == calls
    for i in range(V):
        expected = function(*pick(tensors, in_dims, i))
        for got, one in zip(tuples(mapped), tuples(expected), strict=True):
            assert_close(got[i], one)


def test_gradients_of_each_entry(case):
    """vmap of grad: every tensor's gradient, apart for each entry even where the entries share the tensor."""
    function, tensors, in_dims, _ = case

    def loss(*tensors):
        return sum(result.square().sum() for result in tuples(function(*tensors)))

    gradient = torch.func.grad(loss, argnums=tuple(range(len(tensors))))
    mapped = torch.func.vmap(gradient, in_dims)(*tensors)
    for i in range(V):
        leaves = [t.detach().clone().requires_grad_() for t in pick(tensors, in_dims, i)]
        for got, one in zip(mapped, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(got[i], one, rtol=1e-4, atol=1e-4)


def test_gradients_through_a_mapped_function(case):
    """grad of vmap: shared tensors collect over the entries."""
    function, tensors, in_dims, _ = case

    def loss(mapped, tensors):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        if mapped:
            results = tuples(torch.func.vmap(function, in_dims)(*leaves))
        else:
            each = [tuples(function(*pick(leaves, in_dims, i))) for i in range(V)]
            results = [torch.stack(parts) for parts in zip(*each, strict=True)]
        return torch.autograd.grad(sum(r.square().sum() for r in results), leaves)

    for got, one in zip(loss(True, tensors), loss(False, tensors), strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


def test_packed_sequences_of_their_own(device):
    x, weight, bias = torch.randn(V, B, D, L), torch.randn(D, W), torch.randn(D)
    seq_idx = torch.arange(V)[:, None, None] + torch.tensor([0, 0, 0, 1, 1, 2, 2])
    seq_idx = (seq_idx // 2).expand(V, B, L).to(device, torch.int32)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    for in_dims in ((0, None, None, 0), (0, 0, 0, 0)):
        tensors = [t if t.dim() > 2 else t.expand(V, *t.shape) for t in (x, weight, bias, seq_idx)]
        tensors = [t if d is not None else t[0] for t, d in zip(tensors, in_dims, strict=True)]
        mapped = torch.func.vmap(packed_conv, in_dims)(*tensors)
        for i in range(V):
            torch.testing.assert_close(mapped[i], packed_conv(*pick(tensors, in_dims, i)))


PACKED = {"u": (1, D, 9), "delta": (1, D, 9), "A": (D, N), "B": (1, G, N, 9), "C": (1, G, N, 9)}


@pytest.mark.parametrize("mapped", ["u delta B C", "A", "u"])
@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_scans(device, how, mapped):
    """A last state for each sequence where cu_seqlens bounds them, one for each row otherwise."""
    index = [0, 0, 0, 0, 1, 1, 1, 1, 1]
    packing = {"cu_seqlens": [0, 4, 4, 9], "seq_idx": [index]}
    packing = {how: torch.tensor(packing[how], dtype=torch.int32, device=device)}

    def scan(u, delta, A, B, C):
        return selective_scan_fn(
            u, delta, A, B, C, delta_softplus=True, return_last_state=True, **packing
        )

    tensors, in_dims = draw(PACKED, mapped.split(), device)
    got = torch.func.vmap(scan, in_dims)(*tensors)
    for i in range(V):
        expected = scan(*pick(tensors, in_dims, i))
        assert expected[1].shape[0] == (3 if how == "cu_seqlens" else 1)
        for one, other in zip(got, expected, strict=True):
            assert_close(one[i], other)


def test_steps_change_the_mapped_states(device):
    x = torch.randn(V, B, D, device=device)
    weight = torch.randn(D, W, device=device)
    A, BC = -torch.rand(D, N, device=device), torch.randn(B, N, device=device)
    states = torch.zeros(V, B, D, W, device=device), torch.zeros(V, B, D, N, device=device)

    def step(x, conv_state, state):
        x = causal_conv1d_update(x, conv_state, weight)
        return selective_state_update(state, x, x.sigmoid(), A, BC, BC)

    expected_states = [state.clone() for state in states]
    for _ in range(2):
        mapped = torch.func.vmap(step)(x, *states)
        expected = [step(x[i], *(state[i] for state in expected_states)) for i in range(V)]
        torch.testing.assert_close(mapped, torch.stack(expected))
    for state, expected in zip(states, expected_states, strict=True):
        assert state.any() and torch.equal(state, expected)


CHUNKED_ROW = {
    "x": (1, 9, D, P),
    "dt": (1, 9, D),
    "A": (D,),
    "B": (1, 9, G, N),
    "C": (1, 9, G, N),
}


@pytest.mark.parametrize("mapped", ["x dt B C", "A", "x"])
@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_chunked_scans(device, how, mapped):
    """States for each sequence where cu_seqlens bounds them, for each row otherwise."""
    packing = {
        "cu_seqlens": {"cu_seqlens": [0, 4, 4, 9]},
        "seq_idx": {"seq_idx": [[0, 0, 0, 0, 1, 1, 1, 1, 1]]},
    }[how]
    packing = {n: torch.tensor(v, dtype=torch.int32, device=device) for n, v in packing.items()}
    wanted = "return_varlen_states" if how == "cu_seqlens" else "return_final_states"

    def scan(*tensors):
        return mamba_chunk_scan_combined(*tensors, 4, dt_softplus=True, **packing, **{wanted: True})

    tensors, in_dims = draw(CHUNKED_ROW, mapped.split(), device)
    got = torch.func.vmap(scan, in_dims)(*tensors)
    for i in range(V):
        expected = scan(*pick(tensors, in_dims, i))
        assert expected[1].shape[0] == (3 if how == "cu_seqlens" else 1)
        for one, other in zip(got, expected, strict=True):
            assert_close(one[i], other)


def test_a_state_that_is_not_mapped_cannot_be_changed(device):
    x, state = torch.randn(V, B, D, device=device), torch.zeros(B, D, W, device=device)
    with pytest.raises(RuntimeError, match="conv_state is changed in place"):
        torch.func.vmap(causal_conv1d_update, (0, None, None))(
            x, state, torch.randn(D, W, device=device)
        )
    assert not state.any()


def test_varlen_states(device):
    x = torch.randn(V, 9, D, device=device)
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    mapped = torch.func.vmap(lambda x: causal_conv1d_varlen_states(x, bounds, 3))(x)
    for i in range(V):
        assert torch.equal(mapped[i], causal_conv1d_varlen_states(x[i], bounds, 3))


def test_dropout_of_a_mapped_norm_is_refused_or_drawn_as_vmap_is_told(device):
    x, weight = torch.randn(V, B, 6, device=device), torch.ones(6, device=device)

    def norm(x):
        return rms_norm_fn(x, weight, None, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(norm)(x)
    same = torch.func.vmap(norm, randomness="same")(x[:1].expand(V, B, 6))
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(norm, randomness="different")(x[:1].expand(V, B, 6))
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize(
    "function, shapes, names",
    [(scan, SCAN, "u delta B C z"), (chunked_scan, CHUNKED, "x dt B C z")],
    ids=["scan", "chunked_scan"],
)
def test_a_mapped_scan_compiles(device, function, shapes, names):
    """The transform is traced, and the operation's rule with it."""
    tensors, in_dims = draw(shapes, names.split(), device)
    mapped = torch.func.vmap(function, in_dims)
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), mapped(*tensors))
