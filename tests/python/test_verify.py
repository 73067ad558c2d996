"""`verify`: it passes on sound layers, and fails on every kind of unsound one."""

import dataclasses
import io
import json
import types

import pytest
import torch
from mamba_ssm import cli
from mamba_ssm.cli import formulas, machine, verify, verify_layers
from mamba_ssm.cli.verify import CHECKS, Check
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.bimamba import BiMamba
from mamba_ssm.modules.mamba_simple import Mamba

TINY = Check("mamba_simple", "Mamba", {"d_model": 16, "d_state": 4}, (2, 9, 16))


def tiny(check):
    return dataclasses.replace(check, arguments={"d_model": 16}, shape=(2, 9, 16))


@pytest.fixture
def tiny_checks(monkeypatch):
    """The layers of Mamba-1 at sizes that take no time."""
    checks = [tiny(check) for check in CHECKS if check.oracle == "formula"]
    monkeypatch.setattr(verify, "CHECKS", checks)
    return checks


def run(path, *arguments):
    status = cli.main(["verify", "--json", str(path), *arguments])
    return status, json.loads(path.read_text("utf-8"))


def test_the_scripts_of_the_field_are_checked():
    shapes = {check.name: check.shape for check in CHECKS}
    assert shapes["Mamba(d_model=64, d_state=16, d_conv=4, expand=2)"] == (2, 128, 64)
    assert shapes["Mamba(d_model=512)"] == (1, 100, 512)
    assert shapes["Mamba2(d_model=512)"] == (1, 1024, 512)
    assert shapes["BiMamba2(d_model=64)"] == (1, 15360, 64)


def test_every_layer_agrees(device, tiny_checks, tmp_path, capsys):
    status, document = run(tmp_path / "rows.json", "--device", device)
    assert status == 0 and document["failed"] == 0
    expected = [(check.name, part) for check in tiny_checks for part in check.parts]
    assert [(row["layer"], row["part"]) for row in document["rows"]] == expected
    for row in document["rows"]:
        assert row["device"] == device and row["passed"]
        assert 0 < row["error"] <= row["allowed"] and row["seconds"] > 0
    (described,) = document["machines"]
    assert described["device"] == device and described["torch"] == torch.__version__
    assert described["library"]["cpu_isa"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(expected) + 1
    assert lines[-1].startswith(f"{len(expected)} checks passed")


def test_json_alone_is_all_there_is(tiny_checks, capsys):
    assert cli.main(["verify", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_every_device_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert verify.choose_devices(None) == ["cpu", "cuda:0", "cuda:1"]
    assert verify.choose_devices(["cpu"]) == ["cpu"]


class WrongForward(Mamba):
    def forward(self, hidden, **kwargs):
        return super().forward(hidden, **kwargs) * 1.001


class WrongBackward(Mamba):
    def forward(self, hidden, **kwargs):
        return super().forward(hidden, **kwargs) + 0.01 * (hidden - hidden.detach())


class WrongStep(Mamba):
    def step(self, hidden, conv_state, ssm_state):
        out = super().step(hidden, conv_state, ssm_state)
        ssm_state.mul_(0.9)
        return out


class RaisingStep(Mamba):
    def step(self, hidden, conv_state, ssm_state):
        raise RuntimeError("no kernel image is available for execution on the device")


class NotANumber(Mamba):
    def step(self, hidden, conv_state, ssm_state):
        out, *states = super().step(hidden, conv_state, ssm_state)
        return out.index_fill(2, torch.tensor([3]), torch.nan), *states


@pytest.mark.parametrize(
    ("layer", "failed"),
    [
        (WrongForward, {"forward", "backward"}),
        (WrongBackward, {"backward"}),
        (WrongStep, {"step"}),
        (RaisingStep, {"step"}),
        (NotANumber, {"step"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_fails(layer, failed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "CHECKS", [TINY])
    monkeypatch.setattr(mamba_simple, "Mamba", layer)
    status, document = run(tmp_path / "rows.json", "--device", "cpu")
    assert status == 1 and document["failed"] == len(failed)
    assert {row["part"] for row in document["rows"] if not row["passed"]} == failed
    text = capsys.readouterr().out
    assert f"{len(failed)} of 3 checks failed" in text
    assert ("no kernel image" in text) == (layer is RaisingStep)


class WrongInFloat32(Mamba):
    def forward(self, hidden, **kwargs):
        out = super().forward(hidden, **kwargs)
        return out * 1.001 if out.dtype == torch.float32 else out


@pytest.mark.parametrize(("layer", "passes"), [(Mamba, True), (WrongInFloat32, False)])
def test_the_loops_are_an_oracle_too(layer, passes):
    """For layers without a formula: float64 on the CPU runs the library's reference."""
    check = dataclasses.replace(TINY, oracle="loops")
    rows = {row["part"]: row for row in verify_layers.rows(check, layer, ["cpu"])}
    assert rows["forward"]["passed"] is passes
    assert rows["step"]["passed"] and rows["step"]["oracle"] == "loops"


def test_layers_appear_when_they_exist(monkeypatch):
    name = "mamba_ssm.modules.from_the_future"
    check = Check("from_the_future", "Mamba2", {}, (1, 1, 1))
    assert check.find() is None
    module = types.ModuleType(name)
    monkeypatch.setitem(__import__("sys").modules, name, module)
    assert check.find() is None
    module.Mamba2 = Mamba
    assert check.find() is Mamba


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "options"),
    [(Mamba, {}), (BiMamba, {}), (BiMamba, {"tie_weights": True, "divide_out": True})],
)
def test_formulas_are_the_layers(layer, options, bias):
    model = layer(16, d_state=4, bias=bias, **options).double()
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(
        formulas.of_mamba(model, hidden), model(hidden), rtol=1e-6, atol=1e-8
    )


def test_deviation_by_hand():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert verify_layers.deviation(torch.tensor([1.5, -4.0]), truth) == 0.125
    assert verify_layers.deviation(torch.tensor([1.0, torch.nan]), truth) == float("inf")
    assert verify_layers.deviation(torch.tensor([1.0]), truth) == float("inf")


def test_consoles_without_check_marks_get_words():
    row = {"device": "cpu", "layer": "Mamba()", "shape": [1, 2, 3], "part": "step"}
    row |= {"seconds": 0.25e-3, "error": 1.25e-7, "allowed": 1e-5, "oracle": "formula"}
    line = verify.format_row(row | {"passed": True}, mark=False)
    assert line.split() == "ok cpu Mamba() 1x2x3 step 0.250 1.2e-07 1e-05 formula".split()
    assert verify.format_row(row | {"passed": False}, mark=True).startswith("\u2717")
    for encoding, marks in (("cp1252", False), ("cp437", False), ("utf-8", True)):
        assert verify.can_mark(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) is marks


def test_machine_is_described(device):
    description = machine.describe(device)
    assert len(description["processor"]) > 3 and description["cores"] >= 1
    assert description["free_bytes"] > 1 << 20
    assert ("gpu" in description) == (device == "cuda")
    line = machine.in_a_line(description)
    assert description.get("gpu", description["processor"]) in line
    assert description["platform"] in line and torch.__version__ in line
