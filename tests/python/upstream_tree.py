"""Small trees with the layout of mamba and causal-conv1d, and the constructs that
patches/*.toml edit, in the shape of each version. The code around them is made up: it does
nothing, but a C++ compiler takes it with what stubs() writes.
"""

import textwrap
from pathlib import Path

MAMBA = ("1.0.0", "1.2.0", "2.0.4", "2.1.0", "2.2.2", "2.2.4", "2.2.6", "2.3.0", "2.3.2", "2.4.0")
CONV = ("1.1.0", "1.2.2", "1.4.0", "1.5.2", "1.6.0", "1.6.1")

STATIC_SWITCH = r"""
#pragma once

#define BOOL_SWITCH(COND, CONST_NAME, ...)              \
    [&] {                                               \
        if (COND) {                                     \
            @constexpr bool CONST_NAME = true;          \
            return __VA_ARGS__();                       \
        }                                               \
        @constexpr bool CONST_NAME = false;             \
        return __VA_ARGS__();                           \
    }()
"""

COMMON = """
#pragma once

#ifndef USE_ROCM
    #include <cstddef>
#else
    #include <stddef.h>
#endif
@max@

template <typename Ktraits>
void move(typename Ktraits::BlockLoadT::TempStorage& smem) {
    float out = 0;
@statements@
}
"""
MAX = """
constexpr std::size_t custom_max(std::initializer_list<std::size_t> sizes) {
    return std::max(sizes);
}
template <typename T> constexpr T constexpr_min(T a, T b) {
    return std::min(a, b);
}
"""

KERNEL = """
#pragma once

#include <cmath>
#include <iostream>
#include <cub/cub.cuh>
#include "selective_scan.h"
#include "selective_scan_common.h"
#include "static_switch.h"

template <int kNRows_, bool kIsEvenLen_, bool kHasZ_>
struct @way@_traits {
    static constexpr int kNRows = kNRows_;
    using BlockLoadT = cub::BlockLoad<kIsEvenLen_>;
    using BlockScanT = cub::BlockScan<kHasZ_>;
    static constexpr int kSmemSize = @size@;
};

template <typename Ktraits>
__global__ void @way@_kernel(ParamsBase params) {
    typename Ktraits::BlockLoadT::TempStorage smem;
    constexpr float kLog2e = M_LOG2E;
    const float scale = kLog2e * params.delta;
    const float A_real = params.A_real * scale, A_imag = params.A_imag * scale;
    float out = A_real + A_imag;
@statements@
    move<Ktraits>(smem);
}

template <bool kIsComplex>
void @way@_launch(ParamsBase &params) {
@rows@
    BOOL_SWITCH(params.even, kIsEvenLen, [&] {
        BOOL_SWITCH(params.has_z, kHasZ, [&] {
            using Ktraits = @way@_traits<kNRows, kIsEvenLen, kHasZ>;
            constexpr int kSmemSize = Ktraits::kSmemSize;
            auto kernel = &@way@_kernel<Ktraits>;
@attribute@
            kernel(params);
        });
    });
}

void @way@_dispatch(ParamsBase &params) {
    #ifndef USE_ROCM
        if (params.seqlen <= 128) { return @way@_launch<true>(params); }
    #else
        if (params.seqlen <= 256) { return @way@_launch<true>(params); }
    #endif
    @way@_launch<false>(params);
}
"""
ATTRIBUTE = """
            if (kSmemSize >= 48 * 1024) {
                SET_SMEM(kernel, kSmemSize);
            }
"""
ATTRIBUTE_ROCM = """
            if (kSmemSize >= 48 * 1024) {
                #ifndef USE_ROCM
                SET_SMEM(kernel,
                    kSmemSize);
                #else
                SET_SMEM(
                    (void *) kernel, kSmemSize);
                std::cerr << "Warning: no such attribute, " << kSmemSize << std::endl;  // ROCm
                #endif
            }
"""

REVERSE_SCAN = """
#pragma once

#include <cub/cub.cuh>

template <int LENGTH, typename T>
__device__ @promise@ ThreadReverseScanInclusive(const T (&input)[LENGTH], T (&output)[LENGTH]) {
    T inclusive = input[LENGTH - 1];
    for (int i = LENGTH - 1; i >= 0; --i) {
        inclusive = inclusive + input[i];
        output[i] = inclusive;
    }@return@
}

template <typename T, int LOGICAL>
struct WarpReverseScan {
    unsigned lane_id = @lane@;
    T Scan(T value) { return value + T(lane_id); }
};

template <typename T, int THREADS>
struct BlockReverseScan {
    using WarpReverseScan = WarpReverseScan<T, 32>;
    T Scan(T value) {
        @sync@;
        value = WarpReverseScan().Scan(value);
        @sync@;
        return value;
    }
};
"""

HEADER = """
#pragma once

struct ParamsBase {
    @index@ batch, seqlen;
    bool even, has_z;
    float delta, A_real, A_imag;
    void *__restrict__ A_ptr;
    void *__restrict__ out_ptr;
};
"""

EXTENSION = """
#include <@torch@>
#include "selective_scan.h"

#define DISPATCH_WTYPE(COND, NAME, ...)                    \\
    if (COND) { __VA_ARGS__(c10::complex<float>()); }   \\
    else { __VA_ARGS__(float()); }

int scan_fwd(const at::Tensor &u, const @optional@<at::Tensor> &D) {
    if (D.has_value()) { @error@"not for '", u.get_device(), "'"); }
    Guard guard{@device@};
    DISPATCH_WTYPE(u.is_complex(), "scan_fwd", [&](auto weight) { (void) weight; });
    return 0;
}
int scan_bwd(const at::Tensor &u, const @optional@<at::Tensor> &D) {
    Guard guard{@device@};
    return scan_fwd(u, D);
}
"""

SETUP = '''
"""
from a docstring that has words of code in it
"""
from __future__ import annotations

import os
import sys
@packaging@
from setuptools import find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension

SKIP = @skip@
ext_modules = []


class CachedWheelsCommand:
    """Would download."""


if not SKIP:
    if CUDA_HOME is not None:
        bare_metal_version = Version("12.8")
    cc_flag = [@flags@]
    if bare_metal_version >= Version("11.8"):
        cc_flag += ["-gencode", "arch=compute_90,code=sm_90"]
    ext_modules.append(
        CUDAExtension(
            name="@name@",
            sources=["csrc/a.cpp"],
            extra_compile_args={
                "cxx": [@cxx@],
                "nvcc": ["-O3", @nvcc@"--use_fast_math"] + cc_flag + ["--threads", "4"],
            },
        )
    )

setup(
    name="@name@",
    packages=find_packages(),
    ext_modules=ext_modules,
    cmdclass={"bdist_wheel": CachedWheelsCommand, "build_ext": BuildExtension}
    if ext_modules
    else {"bdist_wheel": CachedWheelsCommand},
    install_requires=[
        "torch",
        @triton@,
    ],
)
'''

CONV_EXTENSION = """
#include <torch/extension.h>
#include "causal_conv1d.h"

void conv(const at::Tensor &x, const at::Tensor &dout, const at::Tensor &out) {
    TORCH_CHECK(x.stride(2) % 8 == 0 @and@ x.stride(0) % 8 == 0, "x: strides of 8 and 1");
    TORCH_CHECK(dout.stride(2) % 8 == 0 @and@ dout.stride(0) % 8 == 0, "dout");
    TORCH_CHECK(out.stride(2) % 8 == 0 @and@ out.stride(0) % 8 == 0, "out");
}
"""
CONV_HEADER = """
#pragma once

struct ConvParams {
    int batch;
    bool even, silu;
    void *__restrict__ x_ptr;
};
"""
CONV_KERNEL = """
#include <cmath>
#include <iostream>
#include <cub/cub.cuh>
#include "causal_conv1d.h"
@common@
#include "static_switch.h"

template <int kWidth_, bool kIsVecLoad_, bool kSilu_>
struct @way@_traits {
    using BlockLoadT = cub::BlockLoad<kIsVecLoad_>;
    static constexpr int kSmemSize = @size@;
};

template <typename Ktraits>
__global__ void @way@_kernel(ConvParams params) {
    typename Ktraits::BlockLoadT::TempStorage smem;
    float in = 0, out = 0;
@statements@
    (void) params;
}

void @way@_launch(ConvParams &params) {
    BOOL_SWITCH(params.even, kIsVecLoad, [&] {
        BOOL_SWITCH(params.silu, kSilu, [&] {
            using Ktraits = @way@_traits<4, kIsVecLoad, kSilu>;
            constexpr int kSmemSize = Ktraits::kSmemSize;
            auto kernel = &@way@_kernel<Ktraits>;
@attribute@
            kernel(params);
        });
    });
}
"""
ROCM_ONLY = """
            if (kSmemSize >= 48 * 1024) {
                SET_SMEM(ROCM_ONLY((void *)) kernel, kSmemSize);
            }
"""
ROCM_ONLY_MACRO = """

#ifndef USE_ROCM
#define ROCM_ONLY(x)
#else
#define ROCM_ONLY(x) x
#endif
"""

STUBS = {
    "cub/cub.cuh": """
        #pragma once
        #include <initializer_list>
        #define __device__
        #define __global__
        #define SET_SMEM(kernel, size) set_smem(kernel, size)
        template <typename K> void set_smem(K*, int) {}
        struct Index { unsigned x; };
        inline Index threadIdx;
        inline void __syncthreads() {}
        namespace cub {  // CUDA 13's: without LaneId and CTA_SYNC
        template <bool> struct BlockLoad {
            struct TempStorage { float x; };
            explicit BlockLoad(TempStorage&) {}
            float Load(const float* from, float* to) { return *to = *from; }
        };
        template <bool> struct BlockScan {
            explicit BlockScan(typename BlockLoad<true>::TempStorage&) {}
            explicit BlockScan(typename BlockLoad<false>::TempStorage&) {}
            float Load(const float* from, float* to) { return *to = *from; }
        };
        }
    """,
    "torch/extension.h": """
        #pragma once
        #include <optional>
        #include <iostream>
        #define TORCH_CHECK(condition, ...) check(condition, __VA_ARGS__)
        template <typename... T> void check(bool, T...) {}
        namespace at {
        struct Tensor {
            int get_device() const { return 0; }
            bool is_complex() const { return true; }
            int stride(int) const { return 8; }
        };
        }
        namespace c10 {  // a torch that has given up c10::optional and AT_ERROR
        using DeviceIndex = signed char;
        template <typename T> struct complex {};
        }
        struct Guard { c10::DeviceIndex index; };
    """,
    "torch/python.h": "#include <torch/extension.h>",
}


def _fill(template, **values):
    text = template.lstrip("\n")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value.strip("\n"))
    return text


def _statements(count, typename, kinds=("BlockLoadT", "BlockScanT")):
    """`count` calls of a dependent type, every third one assigned."""
    for i in range(count):
        result = "out = " if i % 3 == 2 else ""
        yield f"    {result}{typename}Ktraits::{kinds[i % len(kinds)]}(smem).Load(&out, &out);"


def _setup(version, name, mamba):
    old = ("53", "62", "70") if version < (2, 2, 6) else ("75",)
    gencode = [f'"-gencode", "arch=compute_{a},code=sm_{a}"' for a in (*old, "80")]
    skip = 'os.getenv("MAMBA_SKIP_CUDA_BUILD", "FALSE") == "TRUE"'
    if version >= (2, 4):
        skip = 'os.getenv("MAMBA_KEEP_CUDA_BUILD", "FALSE") != "TRUE"'
    triton = '# "triton"' if version == (2, 2, 4) else '"triton"'
    if version >= (2, 3, 2):
        triton = '"triton>=3.5.0", "tilelang==0.1.8", "quack-kernels>=0.3.4"'
    return _fill(
        SETUP,
        name=name,
        packaging="from packaging.version import Version",
        skip=skip if mamba else "False",
        flags=", ".join(gencode),
        cxx='"-O3", "-std=c++17"' if mamba else '"-O3"',
        nvcc='"-std=c++17", ' if mamba else "",
        triton=triton if mamba else '"packaging"',
    )


def numbers(version):
    return tuple(map(int, version.split(".")))


def mamba(version):
    """{name: text} of a tree like that version's."""
    at = numbers(version)
    old, rocm, newest = at <= (2, 0, 4), at >= (2, 2), at >= (2, 3, 2)
    typename = "" if old else "typename "
    size = (
        "std::max({4, 8}) + std::min(1, 2)" if old else "custom_max({4, 8}) + constexpr_min(1, 2)"
    )
    moves = "\n".join(_statements(8, typename, ["BlockLoadT"]))
    files = {
        "static_switch.h": STATIC_SWITCH.lstrip("\n").replace("@", ""),
        "selective_scan_common.h": _fill(COMMON, max="" if old else MAX, statements=moves),
        "selective_scan.h": _fill(HEADER, index="uint64_t" if newest else "unsigned"),
    }
    files["selective_scan.h"] = files["selective_scan.h"].replace("uint64_t", "unsigned long long")
    for way, count in (("fwd", 1), ("bwd", 14)):
        files[f"selective_scan_{way}_kernel.cuh"] = _fill(
            KERNEL,
            statements="\n".join(_statements(count, typename)),
            rows="    constexpr int kNRows = 1;" if way == "fwd" else "",
            attribute=ATTRIBUTE_ROCM if rocm else ATTRIBUTE,
            way=way,
            size=size,
        ).replace("<kNRows,", "<kNRows," if way == "fwd" else "<1,")
    names = at < (2, 2, 6)
    files["reverse_scan.cuh"] = _fill(
        REVERSE_SCAN,
        promise="T" if old else "void",
        **{"return": ""},
        lane="cub::LaneId()" if names else "threadIdx.x % 32",
        sync="cub::CTA_SYNC()" if names else "__syncthreads()",
    )
    before = at <= (2, 2, 2)
    files["selective_scan.cpp"] = _fill(
        EXTENSION,
        torch="torch/extension.h" if before else "torch/python.h",
        optional="c10::optional" if before else "std::optional",
        error="AT_ERROR(" if before else "TORCH_CHECK(false, ",
        device="(char)u.get_device()" if before else "c10::DeviceIndex(u.get_device())",
    )
    files = {f"csrc/selective_scan/{name}": text for name, text in files.items()}
    files["mamba_ssm/__init__.py"] = f'__version__ = "{version}"\n'
    files["setup.py"] = _setup(at, "mamba_ssm", True)
    if at >= (2, 2, 4):
        files["pyproject.toml"] = '[project]\ndependencies = [\n    "torch",\n    "triton",\n]\n'
    return files


def conv(version):
    at = numbers(version)
    old = at < (1, 4)
    size = "std::max({4, 8})" if old else "custom_max({4, 8})"
    word = "and" if (1, 2) <= at < (1, 6, 1) else "&&"
    attribute = ATTRIBUTE if old else ROCM_ONLY if at >= (1, 6, 1) else ATTRIBUTE_ROCM
    files = {
        "csrc/static_switch.h": STATIC_SWITCH.lstrip("\n").replace("@", "static "),
        "csrc/causal_conv1d.h": CONV_HEADER.lstrip("\n"),
        "csrc/causal_conv1d.cpp": _fill(CONV_EXTENSION, **{"and": word}),
        "causal_conv1d/__init__.py": f'__version__ = "{version}"\n',
        "setup.py": _setup((2, 0) if at < (1, 5, 3) else (2, 3), "causal_conv1d", False),
    }
    if not old:
        macro = ROCM_ONLY_MACRO if at >= (1, 6, 1) else ""
        files["csrc/causal_conv1d_common.h"] = "#pragma once\n" + MAX + macro
    for way, count in (("fwd", 4), ("bwd", 7)):
        files[f"csrc/causal_conv1d_{way}.cu"] = _fill(
            CONV_KERNEL,
            common="" if old else '#include "causal_conv1d_common.h"',
            statements="\n".join(_statements(count, "" if old else "typename ", ["BlockLoadT"])),
            attribute=attribute,
            way=way,
            size=size,
        )
    return files


def write(root, files, end="\n"):
    """The files below `root`, every line with this end."""
    for name, text in files.items():
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("\n", end).encode())
    return Path(root)


def stubs(root):
    """Headers that the sources include; what torch and CUDA have is made up there."""
    return write(root, {name: textwrap.dedent(text) for name, text in STUBS.items()})


def tree(root, project, version, end="\n"):
    return write(root, (mamba if project == "mamba" else conv)(version), end)


RELEASES = [("mamba", version) for version in MAMBA]
RELEASES += [("causal-conv1d", version) for version in CONV]
