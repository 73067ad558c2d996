"""The check with CUDA 12's NVRTC: its headers, and that it finds mistakes, where NVRTC is unpacked."""

import re
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import nvrtc_check  # noqa: E402

CSRC = nvrtc_check.bootstrap.ROOT / "csrc"
RUNTIME_API = (
    "extern __host__ cudaError_t CUDARTAPI cudaFuncSetSharedMemConfig(const void *func, int config);\n"
    "extern __host__ __cudart_builtin__ cudaError_t CUDARTAPI cudaFuncSetAttribute(const void *func, "
    "enum cudaFuncAttribute attr, int value);\n"
)


def test_host_functions_are_declared_as_cudas_own_header_does():
    text = nvrtc_check.headers(RUNTIME_API)["host_functions.h"]
    assert (
        'extern "C" cudaError_t cudaFuncSetAttribute(const void *func, enum cudaFuncAttribute attr, '
        "int value);\n"
    ) in text
    with pytest.raises(ValueError, match="declares no cudaFuncSetAttribute"):
        nvrtc_check.headers("")


def test_every_standard_header_of_the_device_code_has_a_stand_in():
    included = set()
    for path in [*CSRC.glob("**/*.cu"), *CSRC.glob("**/*.cuh"), *CSRC.glob("core/**/*.h")]:
        if path.parent.name != "cpu":
            included |= set(re.findall(r"^#include <(\w+)>", path.read_text("utf-8"), re.MULTILINE))
    assert included <= set(nvrtc_check.headers(RUNTIME_API))


STACK = """\
ptxas warning : Local memory used for function '_Z6launchv', size of stack frame: 592 bytes
ptxas warning : Local memory used for function '_Z5twicePf', size of stack frame: 48 bytes
"""


def test_stacks_of_kernels_are_told_and_those_of_launchers_are_not():
    kernels = {"_Z5twicePf": (128, 0)}
    stacks = ["_Z5twicePf has 48 bytes on the stack"]
    assert nvrtc_check.split_log(STACK, kernels) == (stacks, "")
    assert nvrtc_check.split_log(STACK, {}) == ([], "")
    assert nvrtc_check.split_log(STACK + "x.cu(1): warning\n", {}) == ([], "x.cu(1): warning")


def test_a_kernel_more_or_less_than_the_table_is_a_complaint():
    one, two = ("a.cu", "scan<f32>"), ("b.cu", "scan<f16>")
    assert nvrtc_check.compare({one, two}, {one, two}) == []
    assert nvrtc_check.compare({one}, {one, two}) == ["b.cu: scan<f16> was not compiled"]
    assert nvrtc_check.compare({one, two}, {two}) == ["a.cu: scan<f32> is not in kernels.csv"]


def unpacked():
    tools = nvrtc_check.bootstrap.ROOT / "build" / "tools"
    libraries = tools.glob(f"cuda-*/nvidia/cuda_nvrtc/{nvrtc_check.LIBRARY}")
    return sorted({path.parents[3].name.removeprefix("cuda-") for path in libraries})


@pytest.fixture(scope="module")
def nvrtc():
    if not unpacked():
        pytest.skip("scripts/nvrtc_check.py has not unpacked NVRTC here")
    return nvrtc_check.Nvrtc(unpacked()[-1])


KERNEL = """
#include <array>
#include "core/error.h"
__global__ void twice(float* x) {{ {body} }}
void launch(float* x, int n) {{
  MAMBA_CHECK(n > 0, "n is ", n);
  twice<<<n, 32>>>(x);
}}
"""


@pytest.mark.parametrize(
    "body, stacks, complaint",
    [
        ("x[threadIdx.x] *= 2.0f;", 0, ""),
        ("float all[64]; all[int(x[0])] = 1.0f; x[1] = all[int(x[2])];", 1, ""),
        ("x[threadIdx.x] = y;", 0, 'identifier "y" is undefined'),
        ("int unused = 0;", 0, "never referenced"),
        ("__nanosleep_of_tomorrow(1);", 0, "is undefined"),
    ],
)
def test_it_compiles_host_launches_and_says_what_is_wrong(nvrtc, tmp_path, body, stacks, complaint):
    path = tmp_path / "twice.cu"
    path.write_text(KERNEL.format(body=body), encoding="utf-8")
    code, log = nvrtc.compile(path, 75)
    kernels = nvrtc_check.cubin.kernels(code) if code else {}
    found = nvrtc_check.split_log(log, kernels)
    assert len(found[0]) == stacks
    if complaint:
        assert complaint in found[1]
    else:
        assert found[1] == ""
        assert list(kernels) == ["_Z5twicePf"]
