"""The command line: its help without torch, its tables, its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mamba_ssm import cli
from mamba_ssm._version import __version__
from mamba_ssm.cli import bench, bench_cases
from mamba_ssm.cli.bench_cases import Case, Machine

SOURCES = Path(cli.__file__).resolve().parents[2]
MACHINE = Machine("test", bandwidth=1e12, exps=2e12, slots=4e12, source="made up")


def without_torch(*arguments):
    """Runs the command line in a Python that cannot import torch."""
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'mamba_ssm'\n"
        f"sys.path.insert(0, {str(SOURCES)!r})\n"
        "import runpy; runpy.run_module('mamba_ssm', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], *([name, "--help"] for name in cli.COMMANDS)]
)
def test_help_needs_no_torch(arguments):
    result = without_torch(*arguments)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m mamba_ssm" in result.stdout


def test_help_teaches():
    text = without_torch("--help").stdout
    for command in cli.COMMANDS:
        assert f"python -m mamba_ssm {command}" in text
    assert "from mamba_ssm import Mamba" in text


def test_version():
    assert without_torch("--version").stdout.strip() == f"mamba_ssm {__version__}"


def test_missing_torch_is_one_sentence():
    result = without_torch("demo", "--steps", "1")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        'torch is not installed; install it with: pip install "torch>=2.10"'
    ]


def test_unknown_command_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dance"])
    assert "demo" in capsys.readouterr().err


def test_unknown_operation_lists_the_known(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "attention"])
    assert ended.value.code == 2
    assert "selective_scan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("toaster", "toaster"), ("meta", "cpu and cuda"), ("cuda:99", "--device cuda:99: t")],
)
@pytest.mark.parametrize("command", ["demo", "bench"])
def test_unusable_device_is_one_sentence(command, name, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--device", name])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_upstream_rows_are_default_gpu_rows():
    names = {case.name for case in bench_cases.gpu_cases(["float32", "bfloat16"])}
    assert set(bench_cases.UPSTREAM) <= names


def test_floor_by_hand():
    # 2 x 3 x 5 elements of float32, 4 states: 4 tensors of 4 bytes and 4 x 4 / 256 bytes of states;
    # 4 + 4 exps; 5.5 x 4 + 40 instructions.
    case = Case("selective_scan", "fwd", "float32", 2, 3, 5, 4)
    assert bench_cases.work(case) == (30 * 16.0625, 30 * 8, 30 * 16, 30 * 62)
    assert bench_cases.floor(case, MACHINE) == (30 * 16.0625 / 1e12, "memory")
    slow_exp = Machine("test", 1e12, 1e11, 4e12, "")
    assert bench_cases.floor(case, slow_exp) == (30 * 8 / 1e11, "exp")
    cpu = Machine("test", 1e12, None, 1e12, "")  # 10 instructions an exp
    assert bench_cases.floor(case, cpu) == (30 * (16 + 80) / 1e12, "arithmetic")


def test_floor_of_heads_by_hand():
    # 3 x 128 x 5 elements of 2 bytes in 2 heads; dt of a head, B and C of 16 states for all.
    case = Case("ssd", "fwd", "bfloat16", 3, 128, 5, 16, headdim=64)
    assert case.name == "ssd/bfloat16/B3H2P64L5N16/fwd"
    shared = 3 * 5 * (2 + 2 * 16) * 2
    assert bench_cases.work(case)[0] == 3 * 5 * 2 * 128 * 2 + shared
    backward = bench_cases.replace(case, direction="bwd")
    states = 3 * 5 * 128 * 16 * 4 / 256
    assert bench_cases.work(backward)[0] == 3 * 5 * 3 * 128 * 2 + 2 * shared + states
    split = bench_cases.replace(case, op="split_conv")
    assert bench_cases.work(split)[0] == 3 * 5 * 3 * 128 * 2 + shared
    update = Case("state_update", "fwd", "bfloat16", 3, 128, states=16, headdim=64)
    assert update.name == "state_update/bfloat16/B3H2P64N16/fwd"
    assert bench_cases.work(update)[0] == 2 * 3 * 128 * 16 * 2
    # Memory binds the layer of mamba2-2.7b on an H200.
    large = Case("ssd", "fwd", "bfloat16", 8, 5120, 2048, 128, headdim=64)
    machine = Machine("H200", 4.3e12, 4.18e12, 33.45e12, "")
    assert bench_cases.floor(large, machine) == (pytest.approx(80.6e-6, rel=0.02), "memory")


def test_unknown_machine_has_no_floor():
    case = Case("causal_conv1d", "bwd", "bfloat16", 1, 8, 8, layout="bdl")
    assert bench_cases.floor(case, Machine("new", None, None, None, "")) is None


def test_reference_runs_on_a_cut_shape():
    large = Case("selective_scan", "bwd", "bfloat16", 8, 5120, 65536, 16)
    assert large.for_reference() == Case("selective_scan", "bwd", "bfloat16", 1, 1536, 2048, 16)
    chunked = Case("ssd", "bwd", "bfloat16", 8, 5120, 32768, 128, headdim=64)
    cut = Case("ssd", "bwd", "bfloat16", 1, 1536, 2048, 128, headdim=64)
    assert chunked.for_reference() == cut
    small = Case("selective_scan", "fwd", "float32", 1, 64, 100, 16)
    assert small.for_reference() == small


def test_row_with_and_without_upstream():
    row = {"case": "a", "reference_case": "b", "us": 2.0, "gb_per_s": 3.0, "speed_up": 4.0}
    assert bench.format_row(row).split() == [
        "a",
        "-",
        "2.00",
        "-",
        "-",
        "-",
        "3.0",
        "4.0*",
        "-",
        "-",
    ]
    row.update(reference_case="a", share=0.5, upstream_us=3.0, upstream_ratio=1.5)
    assert bench.format_row(row).split()[-5:] == ["50%", "3.0", "4.0", "3.0", "1.50"]


def test_ratios_by_hand():
    def row(direction, isa, us):
        return {"case": f"{bench.RATIO_SCAN}/{direction}", "isa": isa, "us": us}

    rows = [row("fwd", "plain", 30e3), row("fwd", "avx2", 3e3), row("bwd", "avx2", 9e3)]
    rows.append({"case": bench.REFERENCE_SCAN, "isa": "avx2", "us": 1.0, "speed_up": 60.0})
    assert bench.ratios(rows) == {
        "plain loop, G state elements/s": pytest.approx(1536 * 512 * 16 / 30e-3 / 1e9),
        "avx2: scan forward over the plain loop": 10.0,
        "avx2: scan backward / forward": 3.0,
        "avx2: scan forward over selective_scan_ref, L 2048": 60.0,
    }


@pytest.fixture
def small_cases(monkeypatch):
    """Every operation and direction of `bench`, at sizes that take no time."""

    def shrink(case):
        length = case.length if case.length == 1 else 32
        return bench_cases.replace(case, dim=64, length=length, batch=1)

    for name in ("cpu_cases", "gpu_cases"):
        original = getattr(bench_cases, name)
        cases = lambda dtypes, original=original: list(  # noqa: E731
            dict.fromkeys(map(shrink, original(dtypes)))
        )
        monkeypatch.setattr(bench_cases, name, cases)


def test_bench_measures_every_operation(device, small_cases, tmp_path, capsys, monkeypatch):
    from mamba_ssm.cli import bench_timing

    monkeypatch.setattr(bench, "ISAS", ("plain", "sse2", "avx2", "avx512"))
    monkeypatch.setattr(bench, "run_isa", lambda isa, options: [])  # other processes: test below
    monkeypatch.setattr(bench_timing, "machine", lambda device: MACHINE)
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "--device", device, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["case"].split("/")[0] for row in rows} == set(bench.OPERATIONS)
    assert {row["case"].split("/")[-1] for row in rows} == {"fwd", "bwd"}
    for row in rows:
        assert row["us"] > 0 and row["speed_up"] > 0 and row["floor_us"] > 0
    table = capsys.readouterr().out
    assert all(row["case"] in table for row in rows)


def test_plain_loop_runs_in_a_process_of_its_own():
    options = bench_options("--threads", "1")
    rows = bench.run_isa("plain", options)
    assert [(row["case"], row["isa"]) for row in rows] == [(f"{bench.RATIO_SCAN}/fwd", "plain")]


def bench_options(*arguments):
    return cli.build_parser().parse_args(["bench", *arguments])
