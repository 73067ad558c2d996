"""From what the user writes to the flags that reach nvcc.

The spellings run CMake's script mode; a few whole configurations show the rest. Nothing is compiled.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "csrc" / "cmake"
PREFIX = "x64" if sys.platform == "win32" else "linux"
VARIABLES = (
    "TORCH_CUDA_ARCH_LIST",
    "NVCC_THREADS",
    "MAX_JOBS",
    "MM_DISABLE_BF16",
    "MM_DISABLE_HALF",
)
NVCC_13 = "75;80;86;87;88;89;90;100;103;110;120;121"
WHEEL = "75-real 80-real 86-real 89-real 90-real 100-real 120"

needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
pytestmark = needs_cmake


def script(folder, *lines):
    """Runs CMake commands; returns (succeeded, everything printed, on one line)."""
    file = folder / "script.cmake"
    file.write_text("\n".join(("cmake_minimum_required(VERSION 3.25)", *lines)), encoding="utf-8")
    result = subprocess.run(["cmake", "-P", file], capture_output=True, text=True)
    return result.returncode == 0, " ".join((result.stdout + result.stderr).split())


def parse(folder, text, supported=NVCC_13, native=""):
    return script(
        folder,
        f'include("{MODULES.as_posix()}/CudaArchitectures.cmake")',
        f'mamba_cuda_architectures(out [==[{text}]==] "{supported}" "{native}")',
        'string(REPLACE ";" " " out "${out}")',
        'message("=> ${out}.")',
    )


GOOD = [
    ("7.5", "75-real"),
    ("75", "75-real"),
    ("8.6+PTX", "86"),
    ("7.5;8.6+PTX", "75-real 86"),
    ("75;86;89;120", "75-real 86-real 89-real 120-real"),
    ("75,86", "75-real 86-real"),
    ("7.5 8.6", "75-real 86-real"),
    ("  7.5;, 8.6 ; ", "75-real 86-real"),
    ('"8.6"', "86-real"),  # cmd.exe's set keeps the quotes
    ("8.6;7.5", "75-real 86-real"),
    ("8.6;8.6+PTX;86", "86"),
    ("10.0;12.0+PTX", "100-real 120"),
    ("9.0a", "90a-real"),
    ("sm_90", "90-real"),
    ("compute_90", "90-virtual"),
    ("86-real;90-virtual", "86-real 90-virtual"),
    ("Turing", "75"),
    ("Ampere", "80-real 86"),
    ("ampere;Ada", "80-real 86 89"),
    ("Ampere+Tegra", "87-real"),
    ("Hopper+PTX", "90"),
    ("Blackwell", "100-real 103-real 120-real 121"),
    ("Volta;Ampere", "80-real 86"),
    ("8.9 Hopper", "89-real 90"),
    (
        "all",
        "75-real 80-real 86-real 87-real 88-real 89-real 90-real 100-real 103-real 110-real 120-real 121",
    ),
    ("all-major", "75-real 80-real 90-real 100-real 110-real 120"),
    (
        "All",
        "75-real 80-real 86-real 87-real 88-real 89-real 90-real 100-real 103-real 110-real 120-real 121",
    ),
    ("Common", WHEEL),
    ("wheel", WHEEL),
    ("native", WHEEL),
]


@pytest.mark.parametrize("text, expected", GOOD, ids=[row[0] for row in GOOD])
def test_spelling(tmp_path, text, expected):
    good, output = parse(tmp_path, text)
    assert good, output
    assert output.endswith(f"=> {expected}.")


BAD = [
    ("5.2", '"5.2"'),
    ("7.0", '"7.0"'),
    ("7.5;9.9", '"9.9"'),
    ("8", '"8"'),
    ("8.6.1", '"8.6.1"'),
    ("8,6", '"8"'),
    ("sm86", '"sm86"'),
    ("Rubin", '"rubin"'),
    ("7.5:8.6", '"7.5:8.6"'),
    ("Volta", "leave nothing to build"),
    ("", "leave nothing to build"),
]


@pytest.mark.parametrize("text, named", BAD, ids=[row[0] or "empty" for row in BAD])
def test_bad_spelling_is_named_with_what_nvcc_builds(tmp_path, text, named):
    good, output = parse(tmp_path, text)
    assert not good
    assert named in output
    assert "75, 80, 86" in output


def test_names_are_cut_to_what_nvcc_builds(tmp_path):
    assert parse(tmp_path, "Blackwell", "75;80;90;100;120")[1].endswith("=> 100-real 120.")
    assert parse(tmp_path, "wheel", "50;75;80;86")[1].endswith("=> 75-real 80-real 86.")
    assert parse(tmp_path, "all", "50;70;75;80")[1].endswith("=> 75-real 80.")


def test_native_asks_the_gpu(tmp_path):
    assert parse(tmp_path, "native", native="86;89")[1].endswith("=> 86-real 89-real.")
    good, output = parse(tmp_path, "native")
    assert "no GPU here" in output
    good, output = parse(tmp_path, "native", native="70")  # a GPU that these kernels do not serve
    assert good and output.endswith(f"=> {WHEEL}.")


class Project:
    """One build folder, configured again and again."""

    def __init__(self, folder):
        self.build = folder / "build"
        headers = folder / "xsimd" / "config"
        headers.mkdir(parents=True)
        (headers / "xsimd_config.hpp").write_text(
            "#define XSIMD_VERSION_MAJOR 14\n", encoding="utf-8"
        )
        self.options = [f"-DMAMBA_XSIMD_DIR={folder.as_posix()}"]
        self.options += [f"-DMAMBA_{part}=OFF" for part in ("TORCH", "TESTS", "BENCH")]

    def run(self, *command, **environment):
        env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        result = subprocess.run(
            command, cwd=ROOT, env=env | environment, capture_output=True, text=True
        )
        return result.returncode == 0, " ".join((result.stdout + result.stderr).split())

    def configure(self, *options, preset="release-sm_86", **environment):
        preset = ["--preset", f"{PREFIX}-{preset}", "-B", self.build]
        return self.run("cmake", *preset, *self.options, *options, **environment)

    def nvcc_commands(self):
        """{name of .cu: command}, as generated."""
        rows = json.loads((self.build / "compile_commands.json").read_text(encoding="utf-8"))
        return {
            Path(row["file"]).name: row["command"] for row in rows if row["file"].endswith(".cu")
        }

    def architectures(self):
        commands = self.nvcc_commands().values()
        found = {tuple(re.findall(r"code=\[([\w,]+)\]", command)) for command in commands}
        assert len(found) == 1, found
        return " ".join(found.pop())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("cuda"))


@needs_nvcc
def test_the_environment_beats_the_preset_and_says_so(project):
    good, output = project.configure(TORCH_CUDA_ARCH_LIST="7.5", NVCC_THREADS="3", MAX_JOBS="2")
    assert good, output
    assert "75-real (from TORCH_CUDA_ARCH_LIST=7.5, over the preset's 8.6)" in output
    assert project.architectures() == "sm_75"
    assert all("--threads=3" in command for command in project.nvcc_commands().values())
    rules = (project.build / "CMakeFiles" / "rules.ninja").read_text(encoding="utf-8")
    build = (project.build / "build.ninja").read_text(encoding="utf-8")
    assert re.search(r"pool nvcc\n\s+depth = 2", rules + build)
    cuda = re.findall(r"\.cu\.o\w*: CUDA.*\n(?:  .*\n)*", build)
    assert cuda and all("pool = nvcc" in block for block in cuda)


@needs_nvcc
def test_the_preset_stands_where_nothing_else_speaks(project):
    good, output = project.configure(TORCH_CUDA_ARCH_LIST="", NVCC_THREADS="0", MAX_JOBS="")
    assert good, output
    assert "86-real (from MAMBA_DEFAULT_CUDA_ARCHITECTURES=8.6)" in output
    assert project.architectures() == "sm_86"
    assert "--threads" not in str(project.nvcc_commands())
    assert "pool = nvcc" not in (project.build / "build.ninja").read_text(encoding="utf-8")


@needs_nvcc
def test_cmakes_own_variable_beats_both(project):
    ask = "-DCMAKE_CUDA_ARCHITECTURES=90-real"
    good, output = project.configure(ask, TORCH_CUDA_ARCH_LIST="7.5")
    assert good, output
    assert "90-real (from CMAKE_CUDA_ARCHITECTURES)" in output
    assert project.architectures() == "sm_90"
    assert project.configure("-UCMAKE_CUDA_ARCHITECTURES")[0]
    assert project.architectures() == "sm_86"


@needs_nvcc
def test_the_wheel_gets_ptx_of_its_newest_and_small_code(project):
    good, output = project.configure("-DMAMBA_CUDA_COMPRESS=ON", TORCH_CUDA_ARCH_LIST="wheel")
    assert good, output
    assert project.architectures().split() == [
        *("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "compute_120,sm_120"),
    ]
    assert all("--compress-mode=size" in command for command in project.nvcc_commands().values())
    assert project.configure("-DMAMBA_CUDA_COMPRESS=OFF")[0]


@needs_nvcc
def test_a_dtype_left_out_has_no_kernels(project):
    assert project.configure(MM_DISABLE_HALF="0", MM_DISABLE_BF16="")[0]
    everything = project.nvcc_commands()
    assert any("_f16" in name for name in everything) and any(
        "_bf16" in name for name in everything
    )
    assert "MAMBA_WITH_F16=1" in str(everything) and "MAMBA_WITH_BF16=1" in str(everything)

    assert project.configure(MM_DISABLE_HALF="1")[0]
    without = project.nvcc_commands()
    assert set(everything) - set(without) == {name for name in everything if "_f16" in name}
    assert "MAMBA_WITH_F16=0" in str(without) and "MAMBA_WITH_BF16=1" in str(without)

    assert project.configure(MM_DISABLE_BF16="1")[0]
    without = project.nvcc_commands()
    assert set(everything) - set(without) == {name for name in everything if "_bf16" in name}
    assert "MAMBA_WITH_F16=1" in str(without) and "MAMBA_WITH_BF16=0" in str(without)


@needs_nvcc
def test_no_flag_trades_accuracy(project):
    assert project.configure()[0]
    commands = (project.build / "compile_commands.json").read_text(encoding="utf-8")
    forbidden = (
        "fast-math",
        "fast_math",
        "fmad",
        "ffp-contract",
        "extended-lambda",
        "expt-relaxed",
    )
    assert not [flag for flag in forbidden if flag in commands]


@needs_nvcc
def test_a_changed_variable_configures_again(project):
    assert project.configure()[0]
    target = ("cmake", "--build", project.build, "--target", "mamba_environment")
    good, output = project.run(*target)
    assert good and "CUDA:" not in output, output
    good, output = project.run(*target, TORCH_CUDA_ARCH_LIST="9.0")
    assert good and "90-real (from TORCH_CUDA_ARCH_LIST=9.0" in output, output
    assert project.architectures() == "sm_90"


@pytest.fixture(scope="module")
def without_nvcc(tmp_path_factory):
    if sys.platform == "win32" and not shutil.which("cl"):
        pytest.skip("configuring needs a developer prompt")
    bare = Project(tmp_path_factory.mktemp("cpu"))
    bare.options.append("-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON")
    return bare


def test_without_nvcc_a_preset_builds_for_the_cpu_and_says_so(without_nvcc):
    good, output = without_nvcc.configure()
    assert good, output
    assert output.count("CUDA:") == 1
    assert "CUDA: off, no nvcc found; building for the CPU only" in output
    assert not without_nvcc.nvcc_commands()


@pytest.mark.parametrize("ask", ["-DMAMBA_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86", "environment"])
def test_without_nvcc_asking_by_name_is_an_error_with_the_cure(without_nvcc, tmp_path, ask):
    without_nvcc.build = tmp_path
    if ask == "environment":
        good, output = without_nvcc.configure(TORCH_CUDA_ARCH_LIST="8.6")
        ask = "TORCH_CUDA_ARCH_LIST=8.6"
    else:
        good, output = without_nvcc.configure(ask)
    assert not good
    assert f"{ask.removeprefix('-D')} asks for CUDA, but no nvcc found" in output
    assert "CUDA toolkit 12.8" in output and "-DMAMBA_CUDA=OFF" in output


@pytest.mark.parametrize("name", ["NVCC_THREADS", "MAX_JOBS"])
def test_a_number_that_is_none_is_refused(without_nvcc, tmp_path, name):
    without_nvcc.build = tmp_path
    good, output = without_nvcc.configure(**{name: "many"})
    assert not good and f'{name} must be a number, got "many"' in output
