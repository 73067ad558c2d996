"""The functions as modules without parameters, called like them: what `layers` is in kernels of the Hugging Face hub.

A class has its function's name, and its forward the function's parameters.
"""

import inspect

import torch

from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn as _causal_conv1d_fn
from mamba_ssm.ops.causal_conv1d import causal_conv1d_update as _causal_conv1d_update
from mamba_ssm.ops.mamba_inner import mamba_inner_fn as _mamba_inner_fn
from mamba_ssm.ops.mamba_split import (
    mamba_split_conv1d_scan_combined as _mamba_split_conv1d_scan_combined,
)
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as _selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import (
    selective_state_update as _selective_state_update,
)
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined as _mamba_chunk_scan_combined,
)


def _layer(name, function):
    def forward(self, *args, **kwargs):
        return function(*args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    forward.__signature__ = inspect.Signature([itself, *parameters])
    members = {"forward": forward, "__doc__": function.__doc__, "__module__": __name__}
    return type(name, (torch.nn.Module,), members)


causal_conv1d_fn = _layer("causal_conv1d_fn", _causal_conv1d_fn)
causal_conv1d_update = _layer("causal_conv1d_update", _causal_conv1d_update)
falcon_mamba_inner_fn = _layer("falcon_mamba_inner_fn", _mamba_inner_fn)
mamba_inner_fn = _layer("mamba_inner_fn", _mamba_inner_fn)
mamba_chunk_scan_combined = _layer("mamba_chunk_scan_combined", _mamba_chunk_scan_combined)
mamba_split_conv1d_scan_combined = _layer(
    "mamba_split_conv1d_scan_combined", _mamba_split_conv1d_scan_combined
)
selective_scan_fn = _layer("selective_scan_fn", _selective_scan_fn)
selective_state_update = _layer("selective_state_update", _selective_state_update)
