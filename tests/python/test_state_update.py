"""selective_state_update against the reference and against the scan."""

import pytest
import torch
from compare import DTYPES, FORWARD_SLACK, assert_close, convert
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update,
    selective_state_update_ref,
)


def problem(
    device="cpu",
    dtype=torch.float32,
    batch=8,
    heads=None,
    dim=256,
    d_state=16,
    groups=1,
    absent=(),
    tie=False,
    state_dtype=None,
):
    """Inputs of a step; without heads in Mamba-1's form. The parameters are float32, as clients keep them."""
    wide = torch.promote_types(dtype, torch.float32)
    per_head = () if heads is None else (heads,)
    per_group = () if heads is None else (groups,)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, device=device).to(dtype)

    tensors = {
        "state": randn(batch, *per_head, dim, d_state, dtype=state_dtype or dtype),
        "x": randn(batch, *per_head, dim),
        "dt": randn(batch, *per_head, dim),
        "A": -torch.rand(*per_head, dim, d_state, device=device).to(wide) - 0.5,
        "B": randn(batch, *per_group, d_state),
        "C": randn(batch, *per_group, d_state),
        "D": randn(*per_head, dim, dtype=wide),
        "z": randn(batch, *per_head, dim),
        "dt_bias": randn(*per_head, dim, dtype=wide) - 2.0,
    }
    if tie:  # Mamba-2's calls: one decay, step and skip a head
        tensors["A"] = tensors["A"][:, :1, :1].expand(-1, dim, d_state)
        tensors["dt"] = tensors["dt"][:, :, :1].expand(-1, -1, dim)
        tensors["D"] = tensors["D"][:, :1].expand(-1, dim)
        tensors["dt_bias"] = tensors["dt_bias"][:, :1].expand(-1, dim)
    return {name: None if name in absent else tensor for name, tensor in tensors.items()}


ROWS = {
    "base": {},
    "batch 1": {"batch": 1},
    "one channel": {"dim": 1, "batch": 200},
    "channels fill no vector": {"dim": 253},
    "many channels": {"dim": 2064},
    "d_state 1": {"d_state": 1},
    "d_state 8": {"d_state": 8},
    "d_state 64": {"d_state": 64},
    "d_state 96": {"d_state": 96},
    "d_state 256": {"d_state": 256},
    "no gate": {"absent": ("z",)},
    "no D": {"absent": ("D",)},
    "no bias": {"absent": ("dt_bias",)},
    "bare": {"absent": ("z", "D", "dt_bias")},
    "float32 state": {"state_dtype": torch.float32},
    "heads": {"heads": 4},
    "heads in groups": {"heads": 4, "groups": 2},
    "a group a head": {"heads": 4, "groups": 4},
    "tied heads": {"heads": 4, "groups": 2, "dim": 64, "tie": True},
    "tied heads, d_state 128": {"heads": 4, "dim": 64, "d_state": 128, "tie": True},
}
CASES = [(row, dtype) for row in ROWS for dtype in ("f32", "bf16")]
CASES += [("base", "f16"), ("tied heads", "f16"), ("base", "f64")]


@pytest.mark.parametrize("row, dtype", CASES, ids=[f"{row}-{dtype}" for row, dtype in CASES])
@pytest.mark.parametrize("softplus", [True, False])
def test_state_and_output(device, row, dtype, softplus):
    if device == "cuda" and dtype == "f64":
        pytest.skip("CUDA has no float64 kernels")
    tensors = problem(device, DTYPES[dtype], **ROWS[row])
    if not softplus:
        tensors["dt"] = tensors["dt"].abs()
    results = []
    for wide in (torch.float64, torch.float32):
        copies = convert(tensors, wide)
        out = selective_state_update_ref(**copies, dt_softplus=softplus)
        results.append((out, copies["state"]))
    out = selective_state_update(**tensors, dt_softplus=softplus)
    for name, got, truth, yardstick in zip(
        ("out", "state"), (out, tensors["state"]), *results, strict=True
    ):
        assert_close("selective_state_update", dtype, name, got, truth, yardstick, FORWARD_SLACK)


def test_reference_by_hand():
    """A = ln 1/2 and dt = 1: the state 4 becomes 4 / 2 + 1 * 3 * 2 = 8; out = (8 * 5 + 10 * 2) silu(0)."""
    state = torch.tensor([[[4.0]]])
    arguments = (
        torch.tensor([[2.0]]),
        torch.ones(1, 1),
        torch.tensor([[0.5]]).log(),
        torch.tensor([[3.0]]),
        torch.tensor([[5.0]]),
        torch.tensor([10.0]),
    )
    torch.testing.assert_close(
        selective_state_update_ref(state, *arguments), torch.tensor([[60.0]])
    )
    torch.testing.assert_close(state, torch.tensor([[[8.0]]]))
    assert selective_state_update_ref(state, *arguments, z=torch.zeros(1, 1)).item() == 0


def test_output_comes_from_the_unrounded_state(device):
    """In bfloat16 256 + 1 is 256, yet the output has to see the 1."""
    state = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16, device=device)
    one = torch.ones(1, 1, device=device)
    for update in (selective_state_update, selective_state_update_ref):
        out = update(state.clone(), one, one, torch.zeros(1, 1, device=device), one, one)
        assert out.item() == 257


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gathered_rows(device, index_dtype):
    tensors = problem(device, batch=4, heads=2)
    pool = torch.randn(7, 2, 256, 16, device=device)
    before = pool.clone()
    indices = torch.tensor([5, -1, 0, 3], dtype=index_dtype, device=device)
    live = indices >= 0
    rows = indices[live].long()
    gathered = {
        name: t[live] if name in ("x", "dt", "B", "C", "z") else t for name, t in tensors.items()
    }
    gathered["state"] = pool[rows]
    expected = selective_state_update(**gathered)
    out = selective_state_update(**(tensors | {"state": pool}), state_batch_indices=indices)
    assert torch.equal(out[live], expected) and torch.equal(pool[rows], gathered["state"])
    assert out[~live].abs().sum() == 0
    untouched = [i for i in range(7) if i not in rows.tolist()]
    assert torch.equal(pool[untouched], before[untouched])


def test_strided_state_is_updated_in_place(device):
    tensors = problem(device)
    strided = torch.zeros(8, 16, 256, device=device).transpose(1, 2)
    strided.copy_(tensors["state"])
    out = selective_state_update(**(tensors | {"state": strided}))
    expected = selective_state_update(**tensors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(strided, tensors["state"])


def test_step_by_step_is_the_scan(device):
    tensors = problem(device)
    length = 9
    u, delta, z = (torch.randn(8, 256, length, device=device) for _ in range(3))
    B, C = (torch.randn(8, 16, length, device=device) for _ in range(2))
    whole, last = selective_scan_fn(
        u,
        delta,
        tensors["A"],
        B,
        C,
        tensors["D"],
        z,
        tensors["dt_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    state = torch.zeros(8, 256, 16, device=device)
    steps = [
        selective_state_update(
            state,
            u[..., t],
            delta[..., t],
            tensors["A"],
            B[..., t],
            C[..., t],
            tensors["D"],
            z[..., t],
            tensors["dt_bias"],
            dt_softplus=True,
        )
        for t in range(length)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_compiles_to_one_graph(device):
    tensors = problem(device)
    compiled_state = tensors["state"].clone()
    expected = selective_state_update(**tensors)
    function = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**(tensors | {"state": compiled_state})), expected)
    assert torch.equal(compiled_state, tensors["state"])
