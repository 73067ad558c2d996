"""The kernel report: what it reads out of recorded tool output, and each change that it must refuse."""

import struct
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _cubin as cubin  # noqa: E402
import kernel_report as report  # noqa: E402

SCAN = "_ZN12mamba_native14selective_scan4cuda10scan_lanesI6__halfLi4ELi1ELi4EEEvNS1_11ForwardArgsIT_EE"
CLEAR = "_ZN12mamba_native14selective_scan4cuda5clearENS1_8MatricesE"

# cuobjdump 13.5 --dump-resource-usage of a cubin, the second kernel's local array made up
RESOURCES = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {SCAN}:
  REG:115 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1024 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {CLEAR}:
  REG:26 STACK:48 SHARED:1024 LOCAL:16 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resource_usage():
    assert report.parse_resource_usage(RESOURCES) == {SCAN: (115, 0, 0), CLEAR: (26, 64, 1024)}


def test_seconds_are_the_last_compilation_of_each_cuda_file():
    log = (
        "# ninja log v5\n"
        "0\t9000\t1\ta/forward_f32.cu.o\tc0\n"
        "100\t2100\t2\ta/forward_f32.cu.o\tc1\n"
        "0\t500\t2\ta\\plan.cu.obj\tc2\n"
        "0\t70000\t3\ta/cpu.cpp.o\tc3\n"
    )
    assert report.parse_ninja_log(log) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "mangled, compact",
    [
        (SCAN, "scan_lanes<f16, 4, 1, 4>"),
        (CLEAR, "clear"),
        (
            "_ZN12mamba_native12state_update4cuda13update_kernelINS_8BFloat16ELi32ELi8ELb1EEEvNS0_6ParamsE",
            "update_kernel<bf16, 32, 8, true>",
        ),
        (
            "_ZN12mamba_native10layer_norm4cuda15backward_kernelIfLi2ELin1ELb0EEEvNS1_8BackwardE",
            "backward_kernel<f32, 2, -1, false>",
        ),
        (
            "_ZN12mamba_native4cuda39_GLOBAL__N__82f25fad_7_copy_cu_37580f9311copy_kernelENS_10TensorViewE",
            "copy_kernel",
        ),
        (
            "_ZN12mamba_native4cuda4scanI13__nv_bfloat16LNS_4ModeE1EEEvPT_",
            "scan<bf16, 1>",
        ),
        ("plain_c_kernel", "plain_c_kernel"),
        ("_ZN3foo3barIXsrT_EEEv", "_ZN3foo3barIXsrT_EEEv"),  # an expression: not read
    ],
)
def test_compact_names(mangled, compact):
    assert cubin.compact(mangled) == compact


def elf(sections):
    """A 64-bit ELF file of {name: content}."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (*sections, ".names"))
    header, body = struct.Struct("<IIQQQQIIQQ"), b""
    table = [header.pack(*[0] * 10)]
    for name, content in {**sections, ".names": names}.items():
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        table.append(header.pack(at, 1, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0))
        body += content
    start = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01", 2, 190, 1, 0, 0, 64 + len(body),
                        0, 64, 0, 0, 64, len(table), len(table) - 1)  # fmt: skip
    return start + body + b"".join(table)


def test_a_cubins_kernels():
    # an attribute with its value inside, another, and the launch bounds 640 x 1 x 1
    info = bytes.fromhex("03 19 f001  04 0a 0400 00000000  04 05 0c00 80020000 01000000 01000000")
    data = elf(
        {
            ".text.kernel": bytes(640),
            ".nv.info.kernel": info,
            ".nv.constant0.kernel": bytes(16),
            ".text.unbounded": bytes(128),
            ".nv.info.unbounded": info[:4],
            ".nv.constant0.unbounded": bytes(16),
            ".text.device_function": bytes(256),
        }
    )
    assert cubin.kernels(data) == {"kernel": (640, 640), "unbounded": (128, 0)}
    with pytest.raises(ValueError, match="expected a cubin"):
        cubin.kernels(b"MZ")


BASE = report.Kernel(
    90, "13.0", "scan/forward_f32.cu", "scan<f32>", 128, registers=64, stack=0, shared=0, sass=9984
)


def test_nothing_changed():
    assert report.changes([BASE], [BASE]) == []
    assert report.over_the_ceilings([BASE]) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"registers": 73}, "registers from 64 to 73, warps per multiprocessor from 32 to 24"),
        ({"stack": 8}, "stack from 0 to 8 bytes"),
        ({"sass": 11008}, "machine code from 9984 to 11008 bytes"),
        ({"kernel": "scan<f32, 2>"}, "scan<f32, 2> is new"),
        ({"source": "scan/backward_f32.cu"}, "scan/forward_f32.cu scan<f32> is gone"),
    ],
)
def test_what_must_not_pass_unseen(change, words):
    found = report.changes([BASE], [BASE._replace(**change)])
    assert any(words in sentence for sentence in found), found
    assert all("sm_90" in sentence for sentence in found)


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 60},
        {"sass": 10880},
        {"shared": 1024},
        {"cuda": "13.2", "registers": 255, "sass": 20000},  # another compiler's numbers
    ],
)
def test_what_may_move(change):
    assert report.changes([BASE], [BASE._replace(**change)]) == []


def test_small_kernels_may_grow_by_a_few_instructions():
    small = BASE._replace(sass=1024)
    assert report.changes([small], [small._replace(sass=1536)]) == []
    assert report.changes([small], [small._replace(sass=1664)])


def test_improvements_pass():
    worse = BASE._replace(registers=128, stack=8, sass=20000)
    assert report.changes([worse], [BASE]) == []


@pytest.mark.parametrize(
    "sm, threads, registers, warps",
    [
        (90, 128, 32, 64),
        (90, 128, 33, 48),
        (90, 1024, 32, 64),
        (90, 640, 48, 40),  # 40 warps fit: two blocks of 20
        (75, 128, 32, 32),
        (89, 128, 32, 48),
        (90, 0, 168, 12),
    ],
)
def test_warps_that_registers_allow(sm, threads, registers, warps):
    assert report.warps(BASE._replace(sm=sm, threads=threads, registers=registers)) == warps


def many(count, per_source):
    return [
        BASE._replace(source=f"{index // per_source}.cu", kernel=str(index))
        for index in range(count)
    ]


@pytest.mark.parametrize(
    "kernels, words",
    [
        (many(150, 10), "sm_90 has 150 kernels, 149 at most"),
        (many(21, 21), "sm_90 0.cu has 21 kernels, 20 at most"),
        ([BASE._replace(stack=8)], "8 bytes on the stack: it spills"),
    ],
)
def test_ceilings(kernels, words):
    (sentence,) = report.over_the_ceilings(kernels)
    assert words in sentence


def test_at_the_ceilings():
    assert report.over_the_ceilings(many(149, 20)) == []


TABLE = [BASE, BASE._replace(sm=75)]


def test_the_check_says_what_changed_and_how_to_accept_it(capsys):
    assert report.check([BASE], TABLE)
    assert capsys.readouterr().out == ""
    assert not report.check([BASE._replace(stack=8)], TABLE)
    output = capsys.readouterr().out
    assert "stack from 0 to 8 bytes" in output and "--update" in output


def test_an_architecture_without_rows_is_named_with_the_cure():
    with pytest.raises(SystemExit, match="--update"):
        report.check([BASE._replace(sm=120)], TABLE)


def test_another_toolkit_is_said_and_its_kernels_are_still_counted(capsys):
    other = BASE._replace(cuda="13.2", registers=200)
    assert report.check([other], TABLE)
    assert "another toolkit" in capsys.readouterr().out
    assert not report.check([other, other._replace(kernel="extra")], TABLE)


def test_a_build_folder_without_cuda_is_said(tmp_path):
    with pytest.raises(SystemExit, match="build it first"):
        report.read_build(tmp_path)


def test_the_committed_table():
    """Reads, holds the ceilings, and is written as --update would write it."""
    kernels = report.read_table()
    assert {kernel.sm for kernel in kernels} == {90}
    assert report.over_the_ceilings(kernels) == []
    assert kernels == sorted(kernels, key=report.Kernel.key)
    assert len({kernel.key() for kernel in kernels}) == len(kernels)
    root = report.bootstrap.ROOT / "csrc"
    assert all((root / kernel.source).is_file() for kernel in kernels)
    instantiated = {path.relative_to(root).as_posix() for path in root.glob("*/*_*.cu")}
    assert instantiated <= {kernel.source for kernel in kernels}


def test_the_table_reads_as_written(tmp_path):
    path = tmp_path / "kernels.csv"
    assert report.read_table(path) == []
    report.write_table(TABLE, path)
    assert report.read_table(path) == sorted(TABLE)
    assert b"\r" not in path.read_bytes()


def test_a_table_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text("sm,kernel\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="other columns"):
        report.read_table(path)
