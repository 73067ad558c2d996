"""Generated bad calls of selective_scan_fn; other operations have theirs in their own files."""

import torch
from bad_calls import FAULTS, assert_refused, spoil, thousand_examples
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_states?", "tensors")


@st.composite
def bad_scans(draw):
    """Arguments by position."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    batch, dim, length = draw(st.integers(2, 3)), 4, draw(st.integers(2, 9))
    d_state = draw(st.integers(2, 5))
    forms = [(dim, d_state), (batch, d_state, length), (batch, 2, d_state, length)]

    def projection():
        shape = draw(st.sampled_from(forms))
        return torch.randn(shape).to(torch.float32 if len(shape) == 2 else dtype)

    steps = (batch, dim, length)
    arguments = {
        "u": torch.randn(steps).to(dtype),
        "delta": torch.randn(steps).to(dtype),
        "A": -torch.rand(dim, d_state),
        "B": projection(),
        "C": projection(),
        "D": torch.randn(dim),
        "z": torch.randn(steps).to(dtype),
        "delta_bias": torch.randn(dim),
        "delta_softplus": draw(st.booleans()),
        "return_last_state": draw(st.booleans()),
        "initial_state": torch.randn(batch, dim, d_state),
    }
    present = [name for name, a in arguments.items() if isinstance(a, torch.Tensor)]
    name, fault = draw(st.sampled_from(present)), draw(st.sampled_from(FAULTS))
    tensor = arguments[name]
    axes = None
    if name in ("B", "C"):
        axes = [axis for axis in range(tensor.dim()) if tensor.dim() < 4 or axis != 1]
    if fault == "dtype" and (name not in ("u", "delta", "z", "B", "C") or tensor.dim() == 2):
        fault = "meta"  # parameters are converted
    return [*(arguments | {name: spoil(draw, tensor, fault, axes)}).values()]


@thousand_examples
@given(bad_scans())
def test_generated_bad_scans_change_nothing(arguments):
    assert_refused(selective_scan_fn, *arguments, names=NAMES)
