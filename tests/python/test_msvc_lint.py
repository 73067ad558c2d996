"""The lint for cl.exe: every rule finds what it names, and nothing in code that does without."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import msvc_lint  # noqa: E402
from _msvc_lint import clang, cross, tokens  # noqa: E402
from _msvc_lint.rules import RULES  # noqa: E402
from _msvc_lint.source import Code, Tree  # noqa: E402

LIBCLANG = clang.load()

# rule: file, bad, good; or the files of both as dicts. A line with <- is a finding, no other is.
SAMPLES = {
    "constexpr-in-lambda": (
        "a.cpp",
        r"""
        #define SWITCH(condition, NAME, ...)      \
          [&] {                                   \
            if (condition) {                      \
              constexpr bool NAME = true; /* <- */\
              return __VA_ARGS__();               \
            }                                     \
            constexpr bool NAME = false;   /* <- */\
            return __VA_ARGS__();                 \
          }()
        template <int rows, bool even> struct Traits {};
        template <class T> void run(T);
        void f(bool even) {
          constexpr int kRows = 1;
          [&] {
            run(Traits<kRows, true>());  // <-
            [&] { run(Traits<kRows + 1, false>()); }();  // <-
          }();
        }
        """,
        r"""
        #define SWITCH(condition, NAME, ...)       \
          [&] {                                    \
            static constexpr bool NAME = true;     \
            return __VA_ARGS__();                  \
          }()
        constexpr int kWidth = 4;
        template <int rows> struct Traits {};
        template <class T> void run(T);
        template <class T> int sum(int n) {
          static constexpr int kRows = 1;
          constexpr int kStep = 2;
          auto body = [&](int i) {
            if constexpr (kStep > 1) run(Traits<kRows>());
            run(Traits<kWidth>());
            return i < kStep && n > kStep;
          };
          for (int i = 0; i < kStep; ++i) body(i);
          return n;
        }
        """,
    ),
    "lambda-around-launch": (
        "a.cu",
        r"""
        #define LAUNCH(...) [&] { cudaLaunchKernel(__VA_ARGS__); }()  // <-
        __global__ void kernel(int n);
        template <class F> void with(F f);
        void launch(int n) {
          with([&](int m) {  // <-
            kernel<<<1, 32>>>(m);
          });
          auto twice = [](int m) { return 2 * m; };  // <-
          kernel<<<1, 32>>>(twice(n));
        }
        """,
        r"""
        __global__ void kernel(int* values);
        void launch(int* values, int at) {
          int first[1] = {values[at]};
          kernel<<<1, 32>>>(values + first[0]);
        }
        """,
    ),
    "directive-in-macro-arguments": (
        "a.cpp",
        r"""
        #define twice(...) __VA_ARGS__ __VA_ARGS__
        void f(int n) {
          BOOL_SWITCH(n > 1, kMany, [&] {
        #ifndef USE_ROCM  // <-
            g<kMany>();
        #else  // <-
            h<kMany>();
        #endif  // <-
          });
          twice(n +=
        #pragma unroll  // <-
                1;)
        }
        """,
        r"""
        #define twice(...) \
          __VA_ARGS__ __VA_ARGS__
        int plain(int a,
        #if defined(MANY)
                  int b,
        #endif
                  int c);
        #ifndef USE_ROCM
        void f(int n) { twice(n += 1;) }
        #endif
        """,
    ),
    "math-constant": (
        "a.cpp",
        r"""
        #include <cmath>
        constexpr float kLog2e = M_LOG2E;  // <-
        #define TURN (2 * M_PI)  // <-
        """,
        r"""
        // M_PI
        #include <cmath>
        #define M_SQRT2 1.41421356237309504880
        constexpr double kRoot = M_SQRT2;
        constexpr double M_Y = 1;
        """,
    ),
    "alternative-token": (
        "a.cpp",
        r"""
        bool f(int a, int b) { return a % 8 == 0 and not b; }  // <-
        #if defined(A) or defined(B)  // <-
        #endif
        """,
        r"""
        // this and that
        #if !defined(A)
        #error neither this nor that: do or do not
        #endif
        const char* text = "and" R"x(or " not)x";
        """,
    ),
    "ciso646-include": ("a.cpp", "#include <ciso646>  // <-\n", "#include <cstddef>\n"),
    "long": (
        "a.cpp",
        r"""
        long a;  // <-
        unsigned long int b;  // <-
        void f(const long*);  // <-
        auto c = 1L << 40;  // <-
        auto d = 0xffUL;  // <-
        """,
        r"""
        long long a;
        unsigned long long int b = 1ull;
        auto c = 1LL << 40;
        long double e = 1.0L;
        auto f = 0xfLL + 1'000'000;
        """,
    ),
    "posix-type": (
        "a.cpp",
        "ssize_t read_some();  // <-\nuint count;  // <-\nu_int32_t word;  // <-\n",
        "using uint = unsigned;\nuint count;\nstruct P { int uchar; };\n",
    ),
    "posix-header": (
        "a.cpp",
        "#include <unistd.h>  // <-\n#include <sys/mman.h>  // <-\n#include <dlfcn.h>  // <-\n",
        """
        #include <sys/stat.h>
        #if defined(_WIN32) && !defined(__MINGW32__)
        #include <io.h>
        #else
        #include <unistd.h>
        #endif
        #ifdef __linux__
        #include <dlfcn.h>
        #endif
        """,
    ),
    "gnu-attribute": (
        "a.cpp",
        """
        __attribute__((noinline)) void f();  // <-
        #if defined(__GNUC__)
        #define PACKED __attribute__((packed))  // <-
        #endif
        """,
        "[[nodiscard]] int f();\nalignas(16) float x[4];\n",
    ),
    "gnu-builtin": (
        "a.cpp",
        "int f(unsigned x) { return __builtin_popcount(x); }  // <-\n",
        "int count(unsigned x);\nint f(unsigned x) { return count(x); }\n",
    ),
    "int128": (
        "a.cpp",
        "unsigned __int128 wide;  // <-\n",
        "unsigned long long low, high;\n",
    ),
    "statement-expression": (
        "a.cpp",
        "int f(int x) { return ({ int y = x; y + 1; }); }  // <-\n",
        """
        struct P { int a; };
        int g(P);
        int f(int x) { return g({x}) + g({}); }
        #define EACH(...) __VA_ARGS__
        void h() { EACH({ f(1); }) }
        """,
    ),
    "inline-asm": (
        "a.cuh",
        """
        inline void pause() { asm volatile("pause"); }  // <-
        """,
        """
        __device__ float ex2(float x) {
          float y;
          asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
          return y;
        }
        #define BOTH __host__ __device__
        BOTH inline void pause() { asm volatile("" ::: "memory"); }
        """,
    ),
    "restrict-in-host-header": (
        "a.h",
        "struct P { float* __restrict__ x; };  // <-\n",
        "struct P { float* __restrict x; };\n",
    ),
    "non-ascii": (
        "a.cpp",
        'const char* text = "\u00b5";  // <-\n',
        'const char* text = "\\u00b5";\n',
    ),
    "warning-directive": ("a.cpp", "#warning old  // <-\n", '#pragma message("old")\n'),
    "min-max-macro": (
        "a.cpp",
        """
        #include <windows.h>  // <-
        int f(int a, int b) { return std::min(a, b); }  // <-
        int g() { return std::numeric_limits<int>::max(); }  // <-
        """,
        """
        #define NOMINMAX
        #include <windows.h>
        int f(int a, int b) { return std::min(a, b); }
        """,
    ),
    "printf-length": (
        "a.cpp",
        r"""
        void f(Size n) {
          std::printf("%s: %ld\n", name, n);  // <-
          snprintf(buffer, 8, "%-5zd", n);  // <-
        }
        """,
        r"""
        void f(Size n) {
          std::printf("%s: %" PRId64 " %zu %lld %d%%\n", name, n, n, n);
          say("%ld");
        }
        """,
    ),
    "variable-length-array": (
        "a.cpp",
        """
        float f(int n) {
          float x[n];  // <-
          return x[0];
        }
        """,
        """
        constexpr int kMost = 4;
        template <int COUNT> float f(int n) {
          float x[kMost * COUNT] = {};
          return x[n];
        }
        """,
    ),
    "zero-length-array": (
        "a.h",
        """
        struct Node { int size; float values[0]; };  // <-
        constexpr int kNone = 0;
        struct Empty { int size; float values[kNone]; };  // <-
        """,
        """
        struct Node { int size; float values[1]; };
        inline float f(const float* a, const float* b) { return a[0] * b[0]; }
        """,
    ),
    "empty-initialiser": (
        {"a.cpp": "static const int kRows[] = {};  // <-\n", "a.c": "int x[3] = {};  // <-\n"},
        {
            "a.cpp": """
            static const int kRows[3] = {};
            static const int kTable[] = {
            #include "rows.inc"
            };
            """,
            "rows.inc": "1, 2, 3,\n",
            "a.c": "int x[3] = {0};\n",
        },
    ),
    "designated-initialiser": (
        "a.cpp",
        """
        struct P { int a, b; };
        P p = {.a = 1, .b = 2};  // <-
        """,
        """
        struct P { float a, b; };
        P p = {.5f, 2};
        void f() { p.a = 1, p.b = 2; }
        """,
    ),
    "missing-typename": (
        "a.h",
        """
        struct Base { using Block = int; };
        template <class Traits> void f(int n) {
          Traits::Block(n).load();  // <-
          int m = Traits::Block{n};  // <-
        }
        """,
        """
        struct Base { using Block = int; static constexpr int kSize = 1; };
        template <class Traits> struct Next : Traits::Block {};
        template <class Traits> void f(int n) {
          typename Traits::Block(n).load();
          using Block = typename Traits::Block;
          Block(n + Traits::kSize + Traits::Block::kMore).load();
        }
        """,
    ),
    "missing-return": (
        "a.h",
        """
        template <class T> T last(const T* values, int n) {  // <-
          T inclusive = values[0];
          for (int i = 1; i < n; ++i) inclusive = inclusive + values[i];
        }
        template <int LENGTH, class T> T scan(T (&values)[LENGTH]) {  // <-
          for (int i = LENGTH - 1; i > 0; --i) values[i - 1] = values[i - 1] + values[i];
        }
        struct P {
          virtual const int& size() const noexcept {}  // <-
          auto data() -> float* {}  // <-
        };
        #define LOG(text) say(text)
        int P::logged() { LOG("logged"); }  // <-
        """,
        """
        #include <functional>
        [[noreturn]] void fail();
        #define REFUSE() fail()
        struct P : Q {
          P() : Q(1), a{2} {}
          ~P() {}
          operator bool() const { return true; }
          auto none() {}
          auto nothing() -> void {}
          std::function<void()> make() { return nullptr; }
          int end() { fail(); }
          int ever() { for (;;) {} }
          int bad() { throw 1; }
          int worse() { REFUSE(); }
          int a;
        };
        P::P(int) {}
        inline void* none() { UNREACHABLE(); }
        TEST(Room, holds) { call({P().data(), {1, 2}}); }
        """,
    ),
    "torch-in-cu": (
        {
            "a.cu": '#include <torch/extension.h>  // <-\n#include "a.cuh"\n',
            "a.cuh": '#include "common.h"\n',
            "common.h": "#include <c10/util/complex.h>  // <-\n",
        },
        {"a.cu": "#include <cuda_runtime.h>\n", "a.cpp": "#include <torch/extension.h>\n"},
    ),
    "constexpr-dim3": (
        "a.cu",
        "void f() { constexpr dim3 block(128); }  // <-\n",
        "void f() { const dim3 block(128); }\nconstexpr int rows(dim3);\n",
    ),
    "std-array-in-device": (
        "a.cu",
        """
        #include <array>
        struct Params { std::array<float, 4> scale; };
        template <class T> __device__ T first(const std::array<T, 2>& values) {
          return values[0];  // <-
        }
        __global__ void kernel(Params params, float* out) {
          out[0] = params.scale[1];  // <-
        }
        """,
        """
        #include <array>
        struct Params { float scale[4]; std::array<float, 4> host; };
        __global__ void kernel(Params params, float* out) { out[0] = params.scale[1]; }
        float last(Params params) { return params.host[3]; }
        """,
    ),
    "global-template-across-units": (
        {
            "a.cuh": """
            template <class T>
            __global__ void __launch_bounds__(128) kernel(T* x);  // <-
            """,
            "a.cu": """
            #include "a.cuh"
            template __global__ void kernel<float>(float*);  // <-
            extern template void kernel<double>(double*);  // <-
            """,
        },
        {
            "a.cuh": """
            template <class T> __global__ void kernel(T* x) { x[0] = T(1); }
            template <class T> void launch(T* x) { kernel<T><<<1, 1>>>(x); }
            """,
            "a.cu": """
            #include "a.cuh"
            template void launch<float>(float*);
            """,
        },
    ),
}


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_text(textwrap.dedent(content), encoding="utf-8")


def lines_found(folder, rules=RULES):
    _, found = msvc_lint.lint([folder], rules, LIBCLANG)
    return {
        name: {(Path(path).name, line) for path, line, _, _ in places}
        for name, places in found.items()
    }


def marked(folder):
    return {
        (path.name, number)
        for path in folder.iterdir()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if "<-" in line
    }


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_every_rule_finds_its_bad_sample_and_passes_its_good_one(tmp_path, name):
    rule = next(rule for rule in RULES if rule.name == name)
    if rule.clang and LIBCLANG is None:
        pytest.skip(f"needs {clang.PACKAGE}")
    *file, bad, good = SAMPLES[name]
    for kind, sample in (("bad", bad), ("good", good)):
        (tmp_path / kind).mkdir()
        write(tmp_path / kind, {file[0]: sample} if file else sample)
    assert lines_found(tmp_path / "bad", [rule]) == {name: marked(tmp_path / "bad")}
    assert marked(tmp_path / "bad")
    assert lines_found(tmp_path / "good") == {}


def test_names_are_those_of_the_samples():
    names = [rule.name for rule in RULES]
    assert sorted(names) == sorted(SAMPLES)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)


def test_what_only_the_compiler_header_may_say(tmp_path):
    words = (
        "#define A __attribute__((noinline))\n#define R __restrict__\n#define B __builtin_trap\n"
    )
    write(tmp_path, {"other.h": words})
    assert set(lines_found(tmp_path)) == {
        *("gnu-attribute", "gnu-builtin", "restrict-in-host-header")
    }
    (tmp_path / "core").mkdir()
    (tmp_path / "other.h").rename(tmp_path / "core" / "compiler.h")
    assert lines_found(tmp_path) == {}


def test_the_build_may_define_what_protects(tmp_path):
    write(tmp_path, {"a.cpp": "double x = std::max(M_PI, 1.0);\n"})
    assert set(lines_found(tmp_path)) == {"math-constant", "min-max-macro"}
    write(tmp_path, {"setup.py": "flags = ['-DNOMINMAX', '-D_USE_MATH_DEFINES']\n"})
    assert lines_found(tmp_path) == {}


# The shapes that are known to stop cl.exe in CUDA extensions written for Linux.
FOREIGN = {
    "static_switch.h": r"""
        #define BOOL_SWITCH(COND, CONST_NAME, ...)           \
            [&] {                                            \
                if (COND) {                                  \
                    constexpr bool CONST_NAME = true;        \
                    return __VA_ARGS__();                    \
                } else {                                     \
                    constexpr bool CONST_NAME = false;       \
                    return __VA_ARGS__();                    \
                }                                            \
            }()
        """,
    "scan_common.h": r"""
        #include <c10/util/BFloat16.h>
        struct Params { void *__restrict__ u; };
        template <int kThreads> struct Traits {
            using BlockLoad = cub::BlockLoad<float, kThreads>;
        };
        template <typename T, int N> __device__ T reverse_scan(T (&input)[N], T (&output)[N]) {
            T inclusive = input[N - 1];
            #pragma unroll
            for (int i = N - 1; i >= 0; --i) { inclusive += input[i]; output[i] = inclusive; }
        }
        """,
    "scan_kernel.cuh": r"""
        #include "scan_common.h"
        #include "static_switch.h"
        template <typename Ktraits> __global__ void scan_kernel(Params params) {
            constexpr float kLog2e = M_LOG2E;
            Ktraits::BlockLoad(smem).Load(params.u, items);
        }
        template <int kThreads> void scan_launch(Params &params, cudaStream_t stream) {
            constexpr int kRows = 1;
            BOOL_SWITCH(params.length % kThreads == 0, kEven, [&] {
                BOOL_SWITCH(params.has_z, kHasZ, [&] {
                    auto kernel = &scan_kernel<Traits<kRows>>;
                    #ifndef USE_ROCM
                    cudaFuncSetAttribute(kernel, attribute, std::max(size, limit));
                    #endif
                    kernel<<<grid, kThreads, size, stream>>>(params);
                });
            });
        }
        """,
    "scan.cpp": r"""
        #include <torch/extension.h>
        void check(at::Tensor x) { TORCH_CHECK(x.stride(0) % 8 == 0 and x.stride(1) == 1, "bad"); }
        """,
}


def test_a_foreign_tree_lights_up(tmp_path):
    write(tmp_path, FOREIGN)
    assert set(lines_found(tmp_path)) == {
        *("constexpr-in-lambda", "lambda-around-launch", "directive-in-macro-arguments"),
        *("math-constant", "alternative-token", "missing-typename", "missing-return"),
        *("restrict-in-host-header", "torch-in-cu", "min-max-macro"),
    }


def test_any_bytes_are_read(tmp_path):
    """Broken nesting, other encodings, no end of line: findings perhaps, never an exception."""
    contents = [
        *(b"", b"\x00\xff\xfe long", "long x;\r\n".encode("utf-16"), b"long \xe4;", b'"', b'R"x('),
        *(
            b"}}])",
            b"((([[{",
            b"#",
            b"#define",
            b"#if\n#else\n#endif\n#endif",
            b"/*",
            b"template <",
        ),
        *(
            b"#define F(",
            b"[&]",
            b"[&](",
            b"int f() -> ",
            b"std::array<",
            b"operator",
            b"constexpr",
        ),
        *(b"using A", b"typedef", b"__global__", b"template __global__", b"a \\\nlong \\\r\n b;"),
    ]
    for i, content in enumerate(contents):
        for suffix in ("c", "cc", "cxx", "hpp", "cu", "CUH"):
            (tmp_path / f"{i}.{suffix}").write_bytes(content)
    found = lines_found(tmp_path)
    assert ("2.cc", 1) in found["long"] and ("3.hpp", 1) in found["long"]
    assert ("24.cu", 2) in found["long"]


def test_tokens():
    text = 'a //x \\\n y\n"\\"//" R"(")" \'"\' 1\'000.5e-3f x>>=1 /* " */ b\n#d /*\n*/ e \\\n f\ng'
    code, directives = tokens.lex(text)
    assert [token.text for token in code] == [
        *("a", '"\\"//"', 'R"(")"', "'\"'", "1'000.5e-3f", "x", ">>=", "1", "b", "g")
    ]
    assert [(d.name, d.spelling(), d.before) for d in directives] == [("d", "ef", 9)]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("#if 0\na\n#else\nb\n#endif\nc", "b c"),
        ("#ifdef _MSC_VER\na\n#elif defined(X)\nb\n#else\nc\n#endif", "a"),
        ("#ifndef _WIN32\n#ifdef X\na\n#endif\nb\n#else\nc\n#endif", "c"),
        ("#if defined(X)\na\n#else\nb\n#endif", "a b"),
        ("#if defined(_WIN32) && !defined(__MINGW32__)\na\n#else\nb\n#endif", "a"),
        ("#if defined(__GNUC__) || defined(__clang__)\na\n#endif\nb", "b"),
        ("#if defined(X) && defined(__GNUC__)\na\n#else\nb\n#endif", "b"),
        ("#if X > 3\na\n#elif 1\nb\n#else\nc\n#endif", "a b"),
    ],
)
def test_branches_that_cl_compiles(text, seen):
    code, _ = tokens.for_cl(*tokens.lex(text))
    assert " ".join(token.text for token in code) == seen


def test_brackets_across_branches():
    code, directives = tokens.lex("f(\n#ifdef A\nif (a) {\n#else\nif (b) {\n#endif\n} ) ;")
    pairs = Code(code, directives).partner
    assert pairs[1] == len(code) - 2


def test_lambdas_are_told_from_arrays():
    text = "a[i] (b) { } ; delete[] p; int x[] = {1}; auto [c, d] = e; [[maybe_unused]] int f; "
    text += "g([&] { }, [=, x](int) mutable -> int { }, [] <class T>(T) { }, [] LAMBDA(T) { });"
    assert len(Code(tokens.lex(text)[0]).lambdas) == 4


def test_our_own_sources_pass():
    folders = [ROOT / folder for folder in msvc_lint.FOLDERS]
    tree, found = msvc_lint.lint(folders, RULES, LIBCLANG)
    assert len(tree.sources) > 100
    assert not found, found


def run(*arguments):
    command = [sys.executable, ROOT / "scripts" / "msvc_lint.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tmp_path):
    write(tmp_path, {"a.cpp": "int x;\nunsigned long y = a and b;\n"})
    result = run(tmp_path, "--text-only")
    assert result.returncode == 1
    assert f"{tmp_path.as_posix()}/a.cpp:2:10: long: unsigned long\n" in result.stdout
    assert (
        "    why:  32 bits on Windows" in result.stdout
        and "    cure: std::int64_t" in result.stdout
    )
    assert "alternative-token" in result.stdout
    only = run(tmp_path, "--rule", "long").stdout
    assert "long:" in only and "alternative-token" not in only
    assert run(tmp_path, "--rule", "int128").returncode == 0
    assert run(tmp_path, "--rule", "lnog").returncode == 2
    assert "not there" in run(tmp_path / "nowhere").stderr
    (tmp_path / "empty").mkdir()
    assert "no C++ or CUDA source" in run(tmp_path / "empty").stderr


def test_list():
    result = run("--list")
    assert result.returncode == 0
    assert all(f"{rule.name}\n    why:  {rule.reason}\n" in result.stdout for rule in RULES)


def test_without_libclang_it_says_what_was_not_checked(tmp_path, monkeypatch, capsys):
    write(tmp_path, {"a.cpp": "int x;\n"})
    monkeypatch.setattr(clang, "load", lambda: None)
    monkeypatch.setattr(sys, "argv", ["msvc_lint.py", str(tmp_path)])
    assert msvc_lint.main() == 2
    output = capsys.readouterr().out
    assert "variable-length-array" in output and clang.PACKAGE in output
    monkeypatch.setattr(sys, "argv", ["msvc_lint.py", str(tmp_path), "--text-only"])
    assert msvc_lint.main() == 0


def test_flags_of_a_linux_build_that_hold_for_windows():
    command = "ccache c++ -DA=1 -I/a -isystem /b -O3 -mavx2 -std=gnu++17 -fPIC -Wno-x -o o -c s.cpp"
    assert cross._portable(command.split()) == [
        *("-DA=1", "-I/a", "-isystem", "/b", "-mavx2", "-std=gnu++17")
    ]


@pytest.mark.skipif(
    not (shutil.which(cross.GCC) and cross._newest_clang()), reason="needs clang++ and mingw-w64"
)
def test_clang_for_windows_refuses_what_gcc_lets_pass(tmp_path, capsys):
    folder = tmp_path / "csrc" / "torch"
    folder.mkdir(parents=True)
    write(
        folder, {"library.cpp": "#include <cstdint>\nstd::int64_t f(long long x) { return x; }\n"}
    )
    entry = {"file": str(folder / "library.cpp"), "command": f"c++ -std=c++17 -DA=1 -I{tmp_path}"}
    (tmp_path / "compile_commands.json").write_text(json.dumps([entry]))
    assert cross.check(tmp_path, tmp_path, ["csrc"]) == 0
    bad = {
        "cut.cpp": "int f(long long x) { return x; }\n",
        "vla.cpp": "int f(int n) { int x[n]; return sizeof(x) > 4; }\n",
        "undefined.cpp": "#if NOT_THERE\n#endif\n",
        "linux.cpp": "#include <unistd.h>\n#include <sys/mman.h>\n",
    }
    write(folder, bad)
    assert cross.check(tmp_path, tmp_path, ["csrc"]) == len(bad)
    with pytest.raises(cross.NotReady, match="cmake --preset nowhere"):
        cross.check(tmp_path, tmp_path / "nowhere", ["csrc"])
    output = capsys.readouterr().out
    assert all(f"csrc/torch/{name}:\n" in output for name in bad)


def test_build_files_above_a_folder_count_up_to_its_repository(tmp_path):
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    folder = tmp_path / "repository" / "a" / "b"
    folder.mkdir(parents=True)
    write(tmp_path, {"setup.py": "-DOUTSIDE"})
    write(tmp_path / "repository", {"CMakeLists.txt": "-DINSIDE"})
    tree = Tree([folder])
    assert tree.build_defines("INSIDE") and not tree.build_defines("OUTSIDE")
