"""Good calls on the CPU with one argument spoilt. An operation must refuse each by name and change nothing."""

import sys

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

SHAPES = ("longer", "shorter", "deeper", "flat")
FAULTS = (*SHAPES, "dtype", "meta")
NO_FLOATS = (torch.int64, torch.bool, torch.complex64)  # dtypes that no operation computes in
NO_INDICES = (torch.float32, torch.bool, torch.complex64)
ERRORS = (RuntimeError, ValueError, TypeError)

# Under Wine an exception takes so long that the tests of Windows draw a hundred.
thousand_examples = settings(
    max_examples=100 if sys.platform == "win32" else 1000, deadline=None, derandomize=True
)


def spoil(draw, tensor, fault, axes=None, dtypes=NO_FLOATS):
    """The tensor with one of FAULTS.

    axes: those that may become longer or shorter by one, all by default; dtypes: those that do not fit.
    """
    if fault in ("longer", "shorter"):
        axis = draw(st.sampled_from([*range(tensor.dim())] if axes is None else axes))
        if fault == "shorter":
            return tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
    if fault == "deeper":
        return tensor.unsqueeze(-1)
    if fault == "flat":
        return tensor.flatten() if tensor.dim() > 1 else tensor[0]
    if fault == "dtype":
        return tensor.to(draw(st.sampled_from(dtypes)))
    assert fault == "meta"
    return tensor.to("meta")


def assert_refused(function, *args, names, errors=ERRORS, **kwargs):
    """function(*args, **kwargs) raises an error that names one of `names`; every tensor keeps its bits."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    tensors = [t for t in tensors if t.device.type != "meta"]
    before = [t.clone() for t in tensors]
    with pytest.raises(errors, match=rf"\b({'|'.join(names)})\b"):
        function(*args, **kwargs)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
