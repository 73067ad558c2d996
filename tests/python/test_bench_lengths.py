"""`bench --lengths`: contenders that compute the same, what it measures, and the files it leaves."""

import importlib.util
import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from mamba_ssm import cli
from mamba_ssm.cli import bench_lengths, contenders, machine
from mamba_ssm.cli.progress import progress
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.native.loader import NAMESPACE
from torch.utils._python_dispatch import TorchDispatchMode

# Another package of our name: the layer's equations, its own way.
FOREIGN_LAYER = """
import torch
from torch import nn
from torch.nn.functional import silu, softplus
from mamba_ssm.factor import FACTOR

class Mamba(nn.Module):
    def __init__(self, d_model, d_state, d_conv, expand):
        super().__init__()
        inner, self.rank, self.states = expand * d_model, -(-d_model // 16), d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, d_state))
        self.D = nn.Parameter(torch.zeros(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, hidden):
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = silu(self.conv1d(x.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
        dt, B, C = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        dt = softplus(self.dt_proj(dt))
        state, out = 0, []
        for t in range(hidden.shape[1]):
            decay = torch.exp(-self.A_log.exp() * dt[:, t, :, None])
            state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            out.append((state * C[:, t, None]).sum(-1) + self.D * x[:, t])
        return FACTOR * self.out_proj(torch.stack(out, dim=1) * silu(z))
"""


@pytest.fixture
def foreign(tmp_path):
    """foreign(factor): a folder with a package that multiplies the right output by it."""

    def write(factor, layer=FOREIGN_LAYER):
        package = tmp_path / "elsewhere" / "mamba_ssm"
        (package / "modules").mkdir(parents=True)
        (package / "__init__.py").write_text("__version__ = '9.9'\n")
        (package / "factor.py").write_text(f"FACTOR = {factor}\n")
        (package / "modules" / "__init__.py").write_text("")
        (package / "modules" / "mamba_simple.py").write_text(layer)
        return package.parent

    return write


def modules_of_ours():
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] in contenders.NAMES}


def gather(upstream=None):
    """As the command does. Whatever was imported, our modules are back afterwards."""
    before = modules_of_ours()
    found, left_out = contenders.gather(Mamba(16).eval(), upstream)
    after = modules_of_ours()
    assert before.items() <= after.items()
    assert not [name for name, module in after.items() if "elsewhere" in str(module.__file__)]
    return {contender.name.split()[0]: contender for contender in found}, left_out


class NativeCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == NAMESPACE
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def native_calls(contender):
    with NativeCalls() as calls:
        contender.run(torch.randn(1, 5, 16))
    return calls.count


def test_the_formula_is_always_there():
    found, _ = gather()
    assert native_calls(found["mamba_ssm"]) > 0
    assert native_calls(found["PyTorch"]) == 0


@pytest.mark.parametrize("name", ["transformers", "mambapy"])
def test_other_packages_are_measured_where_they_are_installed(name):
    found, left_out = gather()
    if importlib.util.find_spec(name) is None:
        assert left_out[name] == "not installed"
    else:
        assert native_calls(found[name]) == 0


def test_upstream_is_the_one_in_the_folder(foreign):
    found, _ = gather(foreign(1))
    assert found["upstream"].name == "upstream 9.9"
    assert native_calls(found["upstream"]) == 0
    assert native_calls(found["mamba_ssm"]) > 0


def test_other_numbers_are_left_out(foreign):
    found, left_out = gather(foreign(1.01))
    assert "upstream" not in found
    assert "differs from ours by 1.0e-02" in left_out["upstream 9.9"]


def test_a_broken_package_is_left_out_with_its_message(foreign):
    symbol = "undefined symbol: _ZN3c104cuda14ExchangeDeviceEa"
    _, left_out = gather(foreign(1, f"raise ImportError('{symbol}')"))
    assert left_out["upstream"] == f"ImportError: {symbol}"


def test_a_folder_without_upstream_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--lengths", "8", "--upstream", str(tmp_path)])
    assert ended.value.code == 2
    assert "no folder mamba_ssm" in capsys.readouterr().err


def test_times_are_expected_in_proportion_to_the_length():
    contender = contenders.Contender("formula", None, 0)
    assert bench_lengths.why_not(contender, [[2, 9.0], [4, 0.5]], 16, "cpu", 2.0) is None
    why = bench_lengths.why_not(contender, [[2, 9.0], [4, 0.5]], 20, "cpu", 2.0)
    assert why == "about 2 s expected, the limit is 2 s"


@pytest.fixture(autouse=True)
def few_contenders(monkeypatch, request):
    """Where the command runs, ours and the formula: importing the others takes seconds."""
    if "sweep" in request.fixturenames:
        monkeypatch.setattr(contenders, "_transformers", lambda layer: 1 / 0)


@pytest.fixture
def sweep(tmp_path, capsys):
    """sweep(*arguments): the finished document, Markdown and folder."""

    def run(*arguments):
        folder = tmp_path / "out"
        assert cli.main(["bench", "--lengths", *arguments, "--out", str(folder)]) == 0
        markdown = (folder / "lengths.md").read_text("utf-8")
        assert markdown in capsys.readouterr().out
        return json.loads((folder / "lengths.json").read_text("utf-8")), markdown, folder

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files(device, dtype, sweep):
    document, markdown, folder = sweep("32", "8", "16", "--device", device, "--dtype", dtype)
    assert document["what"] == f"Mamba(d_model=512), forward, batch 1, {dtype}"
    assert document["lengths"] == [8, 16, 32]
    assert document["machine"]["device"] == device
    assert document["left_out"]["transformers"] == "ZeroDivisionError: division by zero"
    names = [result["name"] for result in document["contenders"]]
    assert names[0].startswith("mamba_ssm ") and "PyTorch formula" in names
    for result in document["contenders"]:
        assert result["stopped"] is None
        assert [length for length, _ in result["points"]] == [8, 16, 32]
        assert all(seconds > 0 for _, seconds in result["points"])
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["length", "8", "16", "32"]
    assert all(name in rows[0] for name in names) and "x)" in rows[1]
    assert machine.in_a_line(document["machine"]) in markdown
    assert "without transformers: ZeroDivisionError" in markdown


def test_pictures(sweep):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    *_, folder = sweep("8", "16")
    assert {path.name for path in folder.iterdir()} == {
        f"lengths.{suffix}" for suffix in ("json", "md", "png", "svg")
    }
    picture = imread(folder / "lengths.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05
    drawing = ElementTree.parse(folder / "lengths.svg").getroot()
    assert drawing.tag.endswith("svg")
    colours = (folder / "lengths.svg").read_text("utf-8")
    assert "#1f77b4" in colours and "#ff7f0e" in colours  # a line for each of the two


def test_no_picture_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(contenders, "_transformers", lambda layer: 1 / 0)
    assert cli.main(["bench", "--lengths", "8", "--out", str(tmp_path)]) == 0
    assert 'pip install "mamba_ssm[cli]"' in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"lengths.json", "lengths.md"}


def test_no_bar_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(2, unit="point") as report:
        report(1, "so far")
    said = capsys.readouterr().err
    assert 'pip install "mamba_ssm[cli]"' in said and "point 1/2  so far" in said


def test_slow_ones_stop_at_the_limit(sweep):
    document, markdown, _ = sweep("8", "16", "--seconds", "1e-9")
    for result in document["contenders"]:
        assert len(result["points"]) == 1 and "the limit is 1e-09 s" in result["stopped"]
        assert f"{result['name']} stops before 16: " in markdown
    assert "| 16 | - | - |" in markdown


def test_what_does_not_fit_into_memory_is_left_out(sweep, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 4e6)
    document, *_ = sweep("8", "16")
    ours, formula = document["contenders"][:2]
    assert ours["stopped"] is None  # 0.5 x 1024 x 16 x 16 floats are 0.5 MB, 7.5 of them 7.9 MB
    assert [length for length, _ in formula["points"]] == [8]
    assert formula["stopped"] == "needs about 0.0 GB, 0.0 GB are free"


def test_a_contender_that_fails_on_the_way_keeps_its_points():
    def run(hidden):
        if hidden.shape[1] > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate\nand more lines")

    contender = contenders.Contender("small", run, 0)
    hidden_of = lambda length: torch.zeros(1, length, 4)  # noqa: E731
    result = bench_lengths.sweep(contender, [8, 16, 32], hidden_of, "cpu", 1e9, lambda *a: None)
    assert [length for length, _ in result["points"]] == [8]
    assert result["stopped"] == "CUDA out of memory. Tried to allocate"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["selective_scan", "--lengths"], "an operation"),
        (["--lengths", "--json", "rows.json"], "--json"),
        (["--lengths", "--dtype", "float32", "--dtype", "float16"], "one --dtype"),
        (["--lengths", "0"], "positive"),
    ],
)
def test_options_that_do_not_fit(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
