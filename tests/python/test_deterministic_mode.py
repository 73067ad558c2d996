"""Who decides whether operations must repeat their bits, and the workspaces for it."""

import pytest
import torch
from mamba_ssm.utils.determinism import (
    alloc_tile_workspace,
    finalize_tile_workspace,
    set_deterministic_mode,
    use_deterministic_mode,
)


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    set_deterministic_mode(None)
    torch.use_deterministic_algorithms(before)


def test_torchs_switch_decides():
    for value in (True, False):
        torch.use_deterministic_algorithms(value)
        assert use_deterministic_mode() is value


@pytest.mark.parametrize(
    "text, expected", [("1", True), ("1yes", True), ("0", False), ("on", False)]
)
def test_the_environment_overrules_torch(monkeypatch, text, expected):
    monkeypatch.setenv("MAMBA_DETERMINISTIC", text)
    torch.use_deterministic_algorithms(not expected)
    assert use_deterministic_mode() is expected


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "")
    torch.use_deterministic_algorithms(True)
    assert use_deterministic_mode() is True


def test_the_program_overrules_both(monkeypatch):
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")
    set_deterministic_mode(False)
    assert use_deterministic_mode() is False
    set_deterministic_mode(None)
    assert use_deterministic_mode() is True


def test_tile_workspaces():
    assert alloc_tile_workspace(None, 3, torch.float32, "cpu", True) == (None, 0)
    assert finalize_tile_workspace(None, True) is None
    tiles, stride = alloc_tile_workspace((2, 5), 3, torch.float32, "cpu", True)
    assert tiles.shape == (2, 5, 3) and stride == 1 and not tiles.any()
    tiles += torch.tensor([1.0, 2.0, 4.0])
    assert (finalize_tile_workspace(tiles, True) == 7).all()
    shape = alloc_tile_workspace((2, 5), 3, torch.float32, "cpu", True, zero_init=False)[0].shape
    assert shape == (2, 5, 3)
    plain, stride = alloc_tile_workspace((2, 5), 3, torch.bfloat16, "cpu", False)
    assert plain.shape == (2, 5) and plain.dtype == torch.bfloat16 and stride == 0
    assert finalize_tile_workspace(plain, False) is plain
