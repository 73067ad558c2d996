"""libclang's part: the rules that need types. It needs no header but the tree's own: the standard
library and CUDA are replaced by the few words below, and what stays unknown is passed over."""

import re
from pathlib import Path

from .source import CUDA_SUFFIXES, HEADER_SUFFIXES

PACKAGE = "libclang==18.1.1"
KEEP_GOING = 0x200  # CXTranslationUnit_KeepGoing: a header that is not there ends nothing

PRELUDE = r"""
namespace std {
typedef decltype(sizeof(0)) size_t;
typedef long long ptrdiff_t, int64_t, intmax_t, intptr_t;
typedef unsigned long long uint64_t, uintmax_t, uintptr_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
template <class T, size_t N> struct array {
  T elements[N ? N : 1];
  HOST T& operator[](size_t i);
  HOST const T& operator[](size_t i) const;
  static constexpr size_t size() { return N; }
};
template <class T> struct vector {
  vector(size_t = 0, T = T());
  T& operator[](size_t i);
  T* data() const;
  size_t size() const;
};
template <class T> struct optional { T value; };
struct string { string(const char* = 0); const char* c_str() const; };
template <class T> T min(T, T);
template <class T> T max(T, T);
}
using std::size_t; using std::ptrdiff_t;
using std::int64_t; using std::uint64_t; using std::int32_t; using std::uint32_t;
using std::int16_t; using std::uint16_t; using std::int8_t; using std::uint8_t;
"""
CUDA_PRELUDE = r"""
#define HOST __attribute__((host))
#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDACC__ 1
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  __host__ __device__ dim3(unsigned = 1, unsigned = 1, unsigned = 1);
};
typedef struct CUstream_st* cudaStream_t;
extern "C" int cudaConfigureCall(dim3, dim3, decltype(sizeof(0)) = 0, cudaStream_t = 0);
extern "C" int __cudaPushCallConfiguration(dim3, dim3, decltype(sizeof(0)) = 0, cudaStream_t = 0);
extern __device__ const uint3 threadIdx, blockIdx;
extern __device__ const dim3 blockDim, gridDim;
"""
ARGUMENTS = ("-nostdinc", "-nostdinc++", "-ferror-limit=0", "-fms-extensions", "-D_WIN32")
CPP = ("-xc++", "-std=c++17", "--target=x86_64-pc-windows-msvc", "-DHOST=")
CUDA = ("-xcuda", "-std=c++17", "-nocudainc", "-nocudalib", "--cuda-device-only")


def load():
    """The module of libclang, or None where it is not installed."""
    try:
        from clang import cindex

        cindex.Index.create()
    except (ImportError, OSError):
        return None
    return cindex


def findings(cindex, tree, rules):
    """(path, line, column, rule, message) of what clang says for these rules."""
    index = cindex.Index.create()
    known = {source.path: source for source in tree.sources}
    folders = {root if root.is_dir() else root.parent for root in tree.roots}
    includes = [f"-I{folder}" for root in folders for folder in (root, root.parent)]
    includes += sorted({f"-I{f}/include" for f in folders if (f / "include").is_dir()})
    options = [o for r in rules for o in r.clang if _is_option(o)]
    seen = set()
    found = set()
    # headers last, and only those that no source includes
    for source in sorted(tree.sources, key=lambda s: s.suffix in HEADER_SUFFIXES):
        if source.path in seen or source.suffix == ".inc":
            continue
        cuda = source.suffix in CUDA_SUFFIXES
        prelude = Path("/msvc_lint_prelude.h")
        unit = index.parse(
            str(source.path),
            args=[
                *ARGUMENTS,
                *(CUDA if cuda else CPP),
                *includes,
                "-include",
                str(prelude),
                *(f"-W{option}" for option in options),
            ],
            unsaved_files=[(str(prelude), (CUDA_PRELUDE if cuda else "") + PRELUDE)],
            options=KEEP_GOING,
        )
        seen.update(Path(i.include.name).resolve() for i in unit.get_includes())
        said, misread = [], set()
        for diagnostic in unit.diagnostics:
            place = diagnostic.location
            path = Path(place.file.name).resolve() if place.file else None
            rule = _rule_of(diagnostic, rules)
            if rule is not None and path in known:
                said.append((path, place.line, place.column, rule.name, diagnostic.spelling))
            elif diagnostic.severity >= diagnostic.Error:  # clang guesses on in this line
                misread.add((path, place.line))
        found.update(finding for finding in said if finding[:2] not in misread)
    return sorted(found)


def _rule_of(diagnostic, rules):
    option = diagnostic.option.removeprefix("-W")
    for rule in rules:
        for pattern in rule.clang:
            matched = option == pattern
            if not _is_option(pattern):
                matched = re.search(pattern, diagnostic.spelling) is not None
            if matched:
                return rule
    return None


def _is_option(text):
    """Whether a rule means a -W option; everything else is part of a message."""
    return re.fullmatch(r"[\w+-]+", text) is not None
