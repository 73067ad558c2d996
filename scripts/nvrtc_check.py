"""Compiles every .cu file with CUDA 12's compiler and headers, which need no toolkit: NVRTC, from PyPI.

python scripts/nvrtc_check.py                      # CUDA 12.9, for sm_75, sm_90 and sm_120
python scripts/nvrtc_check.py --cuda 12.8 --arch 75

NVRTC compiles device code only. The files go in whole and unchanged all the same: launchers compile as
device functions that launch kernels, and small stand-ins take the place of the standard library's
headers. So kernels, launches and runtime calls meet CUDA 12's front end, headers and ptxas; the host
compiler is not part of it. A warning fails, and so does a kernel that csrc/kernels.csv does not know. A
kernel that spills is told and does not fail: relocatable code, as it must be here, has a few registers
less than nvcc's.
"""

import argparse
import concurrent.futures
import csv
import ctypes
import functools
import itertools
import os
import re
import sys
import time

import _bootstrap as bootstrap
import _cubin as cubin
import _pypi as pypi

TABLE = bootstrap.ROOT / "csrc" / "kernels.csv"
PACKAGES = ("cuda-nvrtc", "cuda-runtime", "cuda-cccl")

# Standard headers: libcu++ has these under its own name, ...
FROM_LIBCUXX = (
    "array",
    "cstddef",
    "cstdint",
    "initializer_list",
    "limits",
    "type_traits",
    "utility",
)
# ... and of the others the sources use this much. Nothing here runs: it only has to compile.
STAND_INS = {
    "algorithm": "template <class T> constexpr const T& min(const T& a, const T& b) {"
    " return b < a ? b : a; }",
    "cmath": "using ::exp; using ::log1p;",
    "cstring": "using ::memcpy;",
    "mutex": "struct mutex {}; template <class> struct lock_guard { explicit lock_guard(mutex&) {} };",
    "string": "struct string { string(const char* = nullptr) {}"
    " string operator+(const string&) const { return {}; } };",
    "stdexcept": "struct string; struct runtime_error { explicit runtime_error(const string&) {} };",
    "sstream": "struct string; struct ostringstream { template <class T>"
    " ostringstream& operator<<(const T&) { return *this; } string str() const; };",
}
# Runtime functions that device code cannot call in earnest, declared as CUDA's own header does.
HOST_FUNCTIONS = ("cudaFuncSetAttribute",)

OPTIONS = (
    *("-std=c++17", "-default-device", "-rdc=true", "-include=host_functions.h"),
    "--ptxas-options=--warn-on-local-memory-usage",
    *("-Dthrow=for(;;)", "-DMAMBA_WITH_CUDA=1", "-DMAMBA_WITH_F16=1", "-DMAMBA_WITH_BF16=1"),
    f"-I{bootstrap.ROOT / 'csrc'}",
)

LIBRARY = "bin/nvrtc64_*0.dll" if bootstrap.WINDOWS else "lib/libnvrtc.so.*"


def headers(runtime_api):
    """{name: text} of the headers that NVRTC gets from memory. runtime_api: cuda_runtime_api.h's text."""
    found = {
        name: f"#pragma once\n#include <cuda/std/{name}>\nnamespace std {{ using namespace cuda::std; }}\n"
        for name in FROM_LIBCUXX
    }
    for name, text in STAND_INS.items():
        found[name] = f"#pragma once\nnamespace std {{ {text} }}\n"
    declarations = []
    for name in HOST_FUNCTIONS:
        match = re.search(rf"\bcudaError_t CUDARTAPI ({name}\([^)]*\));", runtime_api)
        if not match:
            raise ValueError(f"cuda_runtime_api.h declares no {name}")
        declarations.append(f'extern "C" cudaError_t {match[1]};\n')
    found["host_functions.h"] = "#include <cuda_runtime.h>\n" + "".join(declarations)
    return found


class Nvrtc:
    """NVRTC and the headers of one CUDA version, unpacked below build/."""

    def __init__(self, version):
        folder = bootstrap.ROOT / "build" / "tools" / f"cuda-{version}"
        pypi.unpack(folder, *(f"nvidia-{name}-cu12=={version}.*" for name in PACKAGES))
        nvidia = folder / "nvidia"
        (path,) = (nvidia / "cuda_nvrtc").glob(LIBRARY)
        if bootstrap.WINDOWS:
            os.add_dll_directory(str(path.parent))
        self.library = ctypes.CDLL(str(path))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        includes = [nvidia / part / "include" for part in ("cuda_runtime", "cuda_cccl")]
        api = (includes[0] / "cuda_runtime_api.h").read_text(encoding="utf-8")
        self.headers = headers(api)
        self.options = [*OPTIONS, *(f"-I{path}" for path in includes)]

    def compile(self, path, architecture):
        """(cubin or None, log) of one file."""
        names = [name.encode() for name in self.headers]
        texts = [text.encode() for text in self.headers.values()]
        options = [*self.options, f"-arch=sm_{architecture}"]
        options.append(f"-D__CUDA_ARCH_LIST__={architecture}0")
        program = ctypes.c_void_p()
        self._check(
            self.library.nvrtcCreateProgram(
                ctypes.byref(program),
                path.read_bytes(),
                str(path).encode(),
                len(names),
                _strings(texts),
                _strings(names),
            )
        )
        arguments = _strings([option.encode() for option in options])
        status = self.library.nvrtcCompileProgram(program, len(options), arguments)
        log = self._result(program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
        code = self._result(program, "CUBIN") if status == 0 else None
        self._check(self.library.nvrtcDestroyProgram(ctypes.byref(program)))
        return code, log

    def _result(self, program, what):
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status):
        if status:
            raise RuntimeError(self.library.nvrtcGetErrorString(status).decode())


def _strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def expected_kernels():
    """{(source, kernel)} of the committed table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {(row["source"], row["kernel"]) for row in csv.DictReader(file)}


def split_log(log, kernels):
    """(stack frames of kernels, the rest). Launchers' stacks are dropped: they run on the host."""
    frame = (
        r"^ptxas warning : Local memory used for function '(\S+)', size of stack frame: (\d+) .*$"
    )
    stacks = [
        f"{cubin.compact(name)} has {size} bytes on the stack"
        for name, size in re.findall(frame, log, re.MULTILINE)
        if name in kernels
    ]
    return stacks, re.sub(frame, "", log, flags=re.MULTILINE).strip()


@functools.cache
def _nvrtc(version):
    return Nvrtc(version)


def compile_source(version, source, architecture):
    """(names of the kernels, stacks, complaints) of one file below csrc/, in whatever process."""
    code, log = _nvrtc(version).compile(bootstrap.ROOT / "csrc" / source, architecture)
    kernels = cubin.kernels(code) if code else {}
    return ({cubin.compact(name) for name in kernels}, *split_log(log, kernels))


def compare(found, expected):
    """Sentences about {(source, kernel)} that only one of two sets holds."""
    missing = (f"{source}: {kernel} was not compiled" for source, kernel in expected - found)
    unknown = (f"{source}: {kernel} is not in {TABLE.name}" for source, kernel in found - expected)
    return sorted((*missing, *unknown))


def check(pool, version, sources, architecture, expected):
    """Compiles all sources for one architecture; how many complaints it printed."""
    started, complaints, found = time.monotonic(), [], set()
    repeat = itertools.repeat
    for source, (kernels, stacks, wrong) in zip(
        sources,
        pool.map(compile_source, repeat(version), sources, repeat(architecture)),
        strict=True,
    ):
        found |= {(source, kernel) for kernel in kernels}
        complaints += [f"{source}:\n{wrong}\n"] if wrong else []  # warnings are errors
        for stack in stacks:
            print(f"note: sm_{architecture} {source}: {stack}")
    complaints += compare(found, expected)
    for complaint in complaints:
        print(f"sm_{architecture} {complaint}")
    seconds = time.monotonic() - started
    print(
        f"sm_{architecture}: {len(sources)} files, {len(found)} kernels, {seconds:.0f} s",
        flush=True,
    )
    return len(complaints)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", default="12.9", help="12.8 or 12.9 (default: %(default)s)")
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[75, 90, 120], metavar="NUMBER", help="75, 90, ..."
    )
    options = parser.parse_args()
    with bootstrap.leg(f"NVRTC {options.cuda}"):
        _nvrtc(options.cuda)  # unpacked before the processes below look for it
    folder = bootstrap.ROOT / "csrc"
    sources = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.cu"))
    expected = expected_kernels()
    # processes, because NVRTC compiles one program at a time in each
    with concurrent.futures.ProcessPoolExecutor() as pool:
        complaints = sum(check(pool, options.cuda, sources, sm, expected) for sm in options.arch)
    if complaints:
        print(f"failed: {complaints} complaints of CUDA {options.cuda}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
