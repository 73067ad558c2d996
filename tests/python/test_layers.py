"""mamba_ssm.layers: functions as modules."""

import inspect

import mamba_ssm
import pytest
import torch
from mamba_ssm import layers
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

FUNCTIONS = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    **{
        name: getattr(mamba_ssm, name)
        for name in (
            "falcon_mamba_inner_fn",
            "mamba_chunk_scan_combined",
            "mamba_inner_fn",
            "mamba_split_conv1d_scan_combined",
            "selective_scan_fn",
            "selective_state_update",
        )
    },
}


def test_every_function_has_its_layer():
    modules = {n for n, c in vars(layers).items() if inspect.isclass(c)}
    assert modules == {*FUNCTIONS} and mamba_ssm.layers is layers


@pytest.mark.parametrize("name", FUNCTIONS)
def test_name_and_parameters_are_the_functions(name):
    layer = getattr(layers, name)
    assert issubclass(layer, torch.nn.Module) and layer.__name__ == name
    itself, *parameters = inspect.signature(layer.forward).parameters.values()
    assert itself.name == "self"
    assert parameters == [*inspect.signature(FUNCTIONS[name]).parameters.values()]
    assert not [*layer().parameters()]


def test_a_layer_is_called_like_its_function(device):
    x, weight = torch.randn(2, 4, 6, device=device), torch.randn(4, 3, device=device)
    out = layers.causal_conv1d_fn()(x, weight, activation="silu")
    assert torch.equal(out, causal_conv1d_fn(x, weight, activation="silu"))
