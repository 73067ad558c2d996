"""What configuring says of a machine that cannot build: what it found, what it wants, what to do.

Each check is a CMake function, run here in script mode on recorded texts; nothing is compiled.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = Path(__file__).resolve().parents[2] / "csrc" / "cmake"

pytestmark = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")

PROMPT = "x64 Native Tools Command Prompt"


def report(result):
    return result.returncode == 0, " ".join((result.stdout + result.stderr).split())


def cmake(folder, module, *lines, **environment):
    """Runs CMake commands after a module; returns (succeeded, everything printed, on one line)."""
    script = folder / "script.cmake"
    lines = (
        "cmake_minimum_required(VERSION 3.25)",
        *[line for line in lines if line.startswith("set(")],
        f'include("{MODULES.as_posix()}/{module}.cmake")',
        *[line for line in lines if not line.startswith("set(")],
    )
    script.write_text("\n".join(lines), encoding="utf-8")
    env = {name: text for name, text in os.environ.items() if name not in ("CUDAHOSTCXX", "LIB")}
    command = ["cmake", "-P", script]
    return report(subprocess.run(command, env=env | environment, capture_output=True, text=True))


def value(name, text):
    return f"set({name} [==[{text}]==])"


# The lines that decide, as crt/host_config.h of each CUDA has them.
def header(visual_studio, gcc, horizon, clang):
    return f"""
#if __GNUC__ > {gcc}
#endif /* __GNUC__ > {gcc} */
#if defined(__HORIZON__)
#if (__clang_major__ >= {horizon}) || (__clang_major__ < 3)
#endif /* __HORIZON__  */

#if defined(__clang__) && !defined(__ibmxl_vrm__) && !defined(__ICC)

#if (__clang_major__ >= {clang}) || (__clang_major__ < 3)
#endif
#if defined(_WIN32)

#if _MSC_VER < {visual_studio[0]} || _MSC_VER >= {visual_studio[1]}

#endif /* (_MSC_VER < 1910 || _MSC_VER >= {visual_studio[1]}) */
#endif /* _WIN32 */
"""


HEADERS = {
    "11.8": header((1910, 1940), 11, 15, 15),
    "12.9": header((1910, 1950), 14, 20, 20),
    "13.0": header((1920, 1950), 15, 21, 21),
    "13.5": header((1920, 1960), 16, 22, 23).replace("\n", "\r\n"),
}


def host_compiler(folder, cuda, compiler, version, text=None):
    (folder / "crt").mkdir()
    text = HEADERS[cuda] if text is None else text
    (folder / "crt" / "host_config.h").write_bytes(text.encode())
    return cmake(
        folder,
        "CudaHostCompiler",
        value("CUDAToolkit_VERSION", cuda),
        value("CUDAToolkit_INCLUDE_DIRS", folder.as_posix()),
        value("CMAKE_CXX_COMPILER", "/tools/compiler"),
        value("CMAKE_CXX_COMPILER_ID", compiler),
        value("CMAKE_CXX_COMPILER_VERSION", f"{version}.1.0"),
        value("MSVC", int(compiler == "MSVC")),
        value("MSVC_VERSION", version),
    )


@pytest.mark.parametrize(
    ("cuda", "compiler", "version"),
    [
        ("11.8", "MSVC", 1939),
        ("12.9", "MSVC", 1910),
        ("13.0", "MSVC", 1920),
        ("13.0", "MSVC", 1944),
        ("13.0", "MSVC", 1949),
        ("13.5", "MSVC", 1950),
        ("13.5", "MSVC", 1959),
        ("13.0", "GNU", 15),
        ("13.5", "GNU", 16),
        ("13.0", "Clang", 20),
        ("13.5", "Clang", 22),
        ("13.0", "NVHPC", 99),  # unknown to the header: nvcc judges it
    ],
)
def test_a_compiler_that_the_toolkit_accepts(tmp_path, cuda, compiler, version):
    good, output = host_compiler(tmp_path, cuda, compiler, version)
    assert good, output


@pytest.mark.parametrize(
    ("cuda", "compiler", "version", "message"),
    [
        (
            "13.0",
            "MSVC",
            1950,
            "CUDA 13.0 accepts Visual Studio 2019 to 2022 (_MSC_VER from 1920 to below 1950); you "
            "have 2026 (1950, /tools/compiler). Use preset x64-release-v143 or CUDA >= 13.2.",
        ),
        ("12.9", "MSVC", 1951, "Visual Studio 2017 to 2022 (_MSC_VER from 1910 to below 1950)"),
        (
            "13.0",
            "MSVC",
            1916,
            "you have 2017 (1916, /tools/compiler). Install Visual Studio 2022.",
        ),
        (
            "13.5",
            "MSVC",
            1900,
            "you have before 2017 (1900, /tools/compiler). Install Visual Studio",
        ),
        ("13.5", "MSVC", 1960, "you have after 2026 (1960, /tools/compiler). Use preset"),
        ("13.5", "MSVC", 1960, "Use preset x64-release-v143 or a newer CUDA."),
        ("11.8", "MSVC", 1944, "(1944, /tools/compiler). Use CUDA >= 13.2."),  # v143 is too new
        (
            "13.0",
            "GNU",
            16,
            "CUDA 13.0 accepts g++ up to 15; you have 16 (/tools/compiler). Choose another with "
            "-DCMAKE_CXX_COMPILER=g++-15, or take a newer CUDA.",
        ),
        ("13.5", "GNU", 17, "-DCMAKE_CXX_COMPILER=g++-16"),
        ("13.0", "Clang", 21, "accepts clang++ up to 20; you have 21"),
        ("13.5", "Clang", 23, "-DCMAKE_CXX_COMPILER=clang++-22"),
    ],
)
def test_a_compiler_out_of_the_toolkits_range(tmp_path, cuda, compiler, version, message):
    good, output = host_compiler(tmp_path, cuda, compiler, version)
    assert not good and message in output, output


def test_the_users_own_host_compiler_is_left_to_nvcc(tmp_path):
    good, output = cmake(
        tmp_path, "CudaHostCompiler", value("CMAKE_CUDA_FLAGS", "-allow-unsupported-compiler")
    )
    assert good, output


INSTALLED = Path("/usr/local/cuda/include/crt/host_config.h")


@pytest.mark.skipif(not INSTALLED.is_file(), reason=f"no {INSTALLED}")
@pytest.mark.parametrize(
    ("compiler", "names"), [("MSVC", "Visual Studio"), ("GNU", "g++"), ("Clang", "clang++")]
)
def test_the_installed_header_has_the_recorded_form(tmp_path, compiler, names):
    text = INSTALLED.read_text(encoding="utf-8")
    good, output = host_compiler(tmp_path, "0.0", compiler, 9999, text)
    assert not good and re.search(rf"accepts {re.escape(names)} (\d+ to|up to) \d+", output), output


@pytest.mark.parametrize("text", ["75", "75-real;120", "90a;121-virtual", "all-major", "OFF"])
def test_architectures_given_to_cmake_itself(tmp_path, text):
    check = f'mamba_check_architectures("{text}" "75;80;90;120;121")'
    good, output = cmake(tmp_path, "CudaArchitectures", check)
    assert good, output


@pytest.mark.parametrize(
    ("text", "named"),
    [("80;52", '"52"'), ("103a-real", '"103a-real"'), ("70-virtual", '"70-virtual"')],
)
def test_an_architecture_that_this_nvcc_cannot_build(tmp_path, text, named):
    check = f'mamba_check_architectures("{text}" "70;75;80;90;120")'
    good, output = cmake(tmp_path, "CudaArchitectures", check)
    assert not good
    assert f'CUDA architecture {named} of "{text}" cannot be built' in output
    assert "the kernels need 75 or newer, and this nvcc builds 70, 75, 80, 90, 120." in output


def toolkit(folder, *files):
    for file in files:
        path = folder / "cuda" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    return f'"{(folder / "cuda" / "bin").as_posix()}" "{(folder / "cuda" / "include").as_posix()}"'


CICC = "nvvm/bin/cicc.exe" if sys.platform == "win32" else "nvvm/bin/cicc"
CRT = "include/crt/host_config.h"


@pytest.mark.parametrize("version", ["12.8.93", "13.0.88"])
def test_a_whole_cuda(tmp_path, version):
    folders = toolkit(tmp_path, CRT, CICC)
    good, output = cmake(tmp_path, "CudaParts", f"mamba_check_cuda_parts({version} {folders})")
    assert good, output


@pytest.mark.parametrize(
    ("version", "files", "lacks", "windows", "apt"),
    [
        ("13.0.88", [CICC], "include/crt/host_config.h.", "crt_13.0", "cuda-crt-13-0."),
        ("13.0.88", [CRT], "nvvm/bin/cicc.", "nvvm_13.0", "cuda-nvvm-13-0."),
        (
            "13.4.1",
            [],
            " and nvvm/bin/cicc.",
            "crt_13.4 nvvm_13.4",
            "cuda-crt-13-4 cuda-nvvm-13-4.",
        ),
        ("12.8.93", [CRT], "nvvm/bin/cicc.", "nvcc_12.8", "cuda-nvvm-12-8."),
    ],
)
def test_a_part_of_cuda_that_is_missing(tmp_path, version, files, lacks, windows, apt):
    folders = toolkit(tmp_path, *files)
    good, output = cmake(tmp_path, "CudaParts", f"mamba_check_cuda_parts({version} {folders})")
    assert not good
    assert f"has nvcc but lacks {'' if files else CRT}{lacks}" in output
    assert f"add {windows} (or all" in output and f"apt install {apt}" in output


def prompt(folder, *lines, compiler="cl.exe", generator="Ninja", host=1, installed=True, **more):
    """mamba_check_prompt with cl.exe on PATH and its variables set, unless told otherwise."""
    environment = {"INCLUDE": "C:/include", "LIB": "C:/lib", "VSCMD_ARG_TGT_ARCH": "x64"} | more
    if installed:
        (folder / "cl.exe").touch(mode=0o755)
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    return cmake(
        folder,
        "Toolset",
        value("CMAKE_HOST_WIN32", host),
        value("CMAKE_GENERATOR", generator),
        value("CMAKE_CXX_COMPILER", compiler),
        "mamba_check_prompt()",
        **environment,
        PATH=path,
    )


NO_STUDIO = {"INCLUDE": "", "LIB": "", "VSCMD_ARG_TGT_ARCH": ""}


def test_a_prompt_with_visual_studio(tmp_path):
    good, output = prompt(tmp_path)
    assert good, output
    good, output = prompt(tmp_path, VSCMD_ARG_TGT_ARCH="")  # loaded by vcvars of another kind
    assert good, output


@pytest.mark.parametrize(
    "other",
    [
        {"generator": "Visual Studio 17 2022"},
        {"compiler": "clang-cl.exe"},
        {"compiler": "g++"},
        {"compiler": ""},
        {"host": 0},
    ],
    ids=str,
)
def test_who_needs_no_prompt(tmp_path, other):
    good, output = prompt(tmp_path, installed=False, **NO_STUDIO, **other)
    assert good, output


@pytest.mark.parametrize("target", ["x86", "arm64"])
def test_a_prompt_for_another_target(tmp_path, target):
    good, output = prompt(tmp_path, VSCMD_ARG_TGT_ARCH=target)
    assert not good
    assert f"This prompt compiles for {target}, and torch for Windows is x64." in output
    assert PROMPT in output


@pytest.mark.skipif(bool(shutil.which("cl")), reason="cl is on PATH")
def test_no_compiler_on_path(tmp_path):
    good, output = prompt(tmp_path, installed=False, **NO_STUDIO)
    assert not good
    assert (
        "The compiler cl.exe is not on PATH: no Visual Studio is loaded in this prompt." in output
    )
    assert PROMPT in output and "python scripts/test.py" in output


@pytest.mark.parametrize("variable", ["INCLUDE", "LIB"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiler_without_vcvars(tmp_path, variable, whole):
    compiler = (tmp_path / "cl.exe").as_posix() if whole else "cl.exe"
    good, output = prompt(tmp_path, compiler=compiler, **{variable: ""})
    assert not good
    assert f"{variable} is empty" in output and "vcvars64.bat has not run" in output
    assert PROMPT in output


def target(folder, bytes, architecture=None):
    msvc = [value("MSVC", 1), value("MSVC_CXX_ARCHITECTURE_ID", architecture)]
    return cmake(
        folder,
        "Toolset",
        value("CMAKE_SIZEOF_VOID_P", bytes),
        *(() if architecture is None else msvc),
        "mamba_check_target()",
    )


def test_a_compiler_for_64_bits(tmp_path):
    assert target(tmp_path, 8)[0]
    assert target(tmp_path, 8, "")[0]  # a compiler that does not say
    assert target(tmp_path, 8, "x64")[0]


@pytest.mark.parametrize(
    ("bytes", "architecture", "named"),
    [(4, None, "32 bits"), (4, "X86", "32 bits"), (8, "ARM64", "ARM64")],
)
def test_a_compiler_for_another_target(tmp_path, bytes, architecture, named):
    good, output = target(tmp_path, bytes, architecture)
    assert not good and f"compiles for {named}, and torch has 64 bits" in output
    assert PROMPT in output and "-m32" in output


STORE = r"C:\Users\Jane\AppData\Local\Microsoft\WindowsApps\python.exe"


@pytest.mark.parametrize("path", [STORE, STORE.replace("\\", "/"), STORE.lower()])
def test_the_stores_python(tmp_path, path):
    good, output = cmake(tmp_path, "Toolset", f"mamba_check_python([==[{path}]==])")
    assert not good
    assert f"{path} is the Microsoft Store's Python" in output
    assert "python.org" in output and "-DPython_EXECUTABLE=" in output
    assert "App execution aliases" in output


@pytest.mark.parametrize("path", [r"C:\Python313\python.exe", "/usr/bin/python3", ""])
def test_any_other_python(tmp_path, path):
    good, output = cmake(tmp_path, "Toolset", f"mamba_check_python([==[{path}]==])")
    assert good, output


def project(folder, *lines, options=(), **environment):
    """Configures a project without languages."""
    text = ("cmake_minimum_required(VERSION 3.25)", "project(test LANGUAGES NONE)", *lines)
    (folder / "CMakeLists.txt").write_text("\n".join(text), encoding="utf-8")
    command = ["cmake", "-G", "Ninja", "-S", folder, "-B", folder / "build", *options]
    env = os.environ | environment
    return report(subprocess.run(command, env=env, capture_output=True, text=True))


needs_ninja = pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not on PATH")


def find_python(folder, *options, **environment):
    lines = (f'include("{MODULES.as_posix()}/Toolset.cmake")', "mamba_find_python()")
    return project(folder, *lines, options=options, **environment)


@needs_ninja
def test_python_is_found(tmp_path):
    good, output = find_python(tmp_path, f"-DPython_EXECUTABLE={sys.executable}")
    assert good, output
    good, output = find_python(tmp_path)
    assert good, output


@needs_ninja
@pytest.mark.skipif(sys.platform == "win32", reason="finds a Python in the registry")
def test_the_stores_alias_is_named_where_no_python_is_found(tmp_path):
    alias = tmp_path / "WindowsApps" / "python"
    alias.parent.mkdir()
    alias.touch(mode=0o755)  # like the alias: there, and no program
    for tool in ("cmake", "ninja"):
        (alias.parent / tool).symlink_to(shutil.which(tool))
    nowhere = "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"
    good, output = find_python(tmp_path, nowhere, PATH=str(alias.parent))
    assert not good and f"{alias} is the Microsoft Store's Python" in output


@needs_ninja
def test_the_stores_alias_is_named_where_it_was_given(tmp_path):
    alias = tmp_path / "WindowsApps" / "python.exe"
    good, output = find_python(tmp_path, f"-DPython_EXECUTABLE={alias.as_posix()}")
    assert not good and f"{alias.as_posix()} is the Microsoft Store's Python" in output


def runtime_library(folder, *options, ops="MultiThreadedDLL", core="MultiThreadedDLL"):
    return project(
        folder,
        "add_custom_target(ops)",
        f"set_target_properties(ops PROPERTIES MSVC_RUNTIME_LIBRARY {ops})",
        "add_custom_target(core)",
        f"set_target_properties(core PROPERTIES MSVC_RUNTIME_LIBRARY {core})",
        f'include("{MODULES.as_posix()}/RuntimeLibrary.cmake")',
        "mamba_check_runtime_library(ops core)",
        options=options,
    )


@needs_ninja
@pytest.mark.parametrize(
    "option",
    [
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_MSVC_RUNTIME_LIBRARY=MultiThreadedDLL",
        "-DCMAKE_CXX_FLAGS=/MD /MP",
    ],
)
def test_the_runtime_library_of_torch(tmp_path, option):
    good, output = runtime_library(tmp_path, option)
    assert good, output


@needs_ninja
@pytest.mark.parametrize(
    ("options", "properties", "named"),
    [
        (
            [],
            {"ops": "MultiThreadedDebugDLL"},
            "MSVC_RUNTIME_LIBRARY of ops is MultiThreadedDebugDLL",
        ),
        ([], {"core": "MultiThreaded"}, "MSVC_RUNTIME_LIBRARY of core is MultiThreaded."),
        ([], {"ops": '"MultiThreaded$<$<CONFIG:Debug>:Debug>DLL"'}, "of ops is MultiThreaded$<$<"),
        (
            ["-DCMAKE_MSVC_RUNTIME_LIBRARY=MultiThreadedDebug"],
            {},
            "CMAKE_MSVC_RUNTIME_LIBRARY was given as MultiThreadedDebug.",
        ),
        (["-DCMAKE_CXX_FLAGS=/W4 /MT"], {}, "CMAKE_CXX_FLAGS has /MT."),
        (
            ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-MDd /Od"],
            {},
            "CMAKE_CXX_FLAGS_DEBUG has /MDd.",
        ),
    ],
)
def test_another_runtime_library_has_another_heap(tmp_path, options, properties, named):
    good, output = runtime_library(tmp_path, *options, **properties)
    assert not good
    assert "must use the runtime library MultiThreadedDLL (/MD), in debug builds too, but" in output
    assert named in output and "has another heap" in output


@needs_ninja
@pytest.mark.skipif(sys.platform == "win32", reason="another compiler plays MSVC here")
@pytest.mark.parametrize("given", ["MultiThreadedDLL", "MultiThreadedDebugDLL"])
def test_the_op_library_is_checked(tmp_path, given):
    version = tmp_path / "xsimd" / "config" / "xsimd_config.hpp"
    version.parent.mkdir(parents=True)
    version.write_text("#define XSIMD_VERSION_MAJOR 14\n", encoding="utf-8")
    options = {
        "MSVC": "1",
        "CMAKE_MSVC_RUNTIME_LIBRARY": given,
        "Python_EXECUTABLE": sys.executable,
        "MAMBA_XSIMD_DIR": tmp_path,
        "MAMBA_CUDA": "OFF",
        "MAMBA_TESTS": "OFF",
        "MAMBA_BENCH": "OFF",
    }
    command = ["cmake", "-G", "Ninja", "-S", MODULES.parents[1], "-B", tmp_path / "build"]
    command += [f"-D{name}={text}" for name, text in options.items()]
    good, output = report(subprocess.run(command, capture_output=True, text=True))
    assert good == (given == "MultiThreadedDLL"), output
    assert good or f"CMAKE_MSVC_RUNTIME_LIBRARY was given as {given}" in output
