"""`doctor --explain`: every message of messages.toml has a log in doctor_logs, written for it.

A log's name is the id of what has to be explained first, after a number where it has several messages.
"""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from mamba_ssm import cli
from mamba_ssm.cli.doctor import build_checks, checks, explain, facts, toml_subset

LOGS = sorted((Path(__file__).parent / "doctor_logs").glob("*.txt"))
KNOWLEDGE = explain.knowledge()
COMPILING = Path(__file__).parent / "doctor_logs" / "1.m-log2e.txt"

# the messages that bring people here, each as short as they put it into a title
TITLES = {
    "undefined symbol: _ZN3c104cuda14ExchangeDeviceEa": "undefined-symbol",
    "undefined symbol: _ZN3c107WarningC1E": "undefined-symbol",
    "undefined symbol: _ZN2at4_ops10zeros_like4call": "undefined-symbol",
    "ImportError: DLL load failed: The specified module could not be found": "dll-module",
    "No module named 'selective_scan_cuda'": "no-raw-extension",
    "ModuleNotFoundError: No module named 'causal_conv1d_cuda'": "no-raw-extension",
    "Guessing wheel URL: https://x/y-win_amd64.whl 404": "guessing-wheel",
    "mamba_ssm was requested, but nvcc was not found.": "nvcc-not-found",
    "CUDA_HOME environment variable is not set": "cuda-home",
    "NameError: name 'bare_metal_version' is not defined": "bare-metal-version",
    "RuntimeError: No CUDA GPUs are available": "no-cuda-gpu",
    "Ninja is required to load C++ extensions": "no-ninja",
    "no kernel image is available for execution on the device": "no-kernel-image",
    "error C2975: 'x': invalid template argument": "c2975",
    'identifier "M_LOG2E" is undefined': "m-log2e",
    "fatal error C1189: #error: MSVC/cl.exe with traditional preprocessor": "traditional-preprocessor",
    "fatal error C1189: #error: -- unsupported Microsoft Visual Studio version!": "unsupported-msvc",
    "error LNK2001: unresolved external symbol": "unresolved-external",
    "limit argument must be an int, not float": "limit-argument",
    "#error -- unsupported GNU version! gcc versions later than 13": "unsupported-gnu",
    "c++: fatal error: Killed signal terminated program cc1plus": "out-of-heap",
    "fatal error C1060: compiler is out of heap space": "out-of-heap",
    "LINK : fatal error LNK1181: cannot open input file 'a.obj'": "aftermath",
    "nvcc fatal : Unsupported gpu architecture 'compute_53'": "unsupported-architecture",
    "error C2872: 'std': ambiguous symbol": "std-ambiguous",
    "Microsoft Visual C++ 14.0 or greater is required": "no-msvc",
    "No module named mamba_ssm.__main__": "not-executable",
    "ModuleNotFoundError: No module named 'mamba_ssm'": "no-mamba",
    # other spellings of the same
    "OSError: [WinError 127] The specified procedure could not be found.": "dll-procedure",
    "OSError: [WinError 126] Error loading fbgemm.dll or one of its dependencies.": "dll-module",
    "ModuleNotFoundError: No module named 'tilelang'": "no-triton",
    "RuntimeError: CUDA error: no CUDA-capable device is detected": "no-cuda-gpu",
    "RuntimeError: Found no NVIDIA driver on your system.": "no-cuda-gpu",
    "CUDA driver version is insufficient for CUDA runtime version": "old-driver",
    "error 35: cudaErrorInsufficientDriver": "old-driver",
    "scan failed: cudaErrorNoKernelImageForDevice": "no-kernel-image",
    "RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.": "no-kernel-image",
    "NativeError: mamba_ssm has no native library for this torch. Found: cpu": "our-library",
    "NativeError: mamba_ssm's native library is incomplete. Found: x.so": "our-library",
    "CUDA error: the launch timed out and was terminated": "watchdog",
    "scan failed: cudaErrorLaunchFailure": "watchdog",
    "RuntimeError: CUDA error: out of memory": "gpu-memory",
    "<urlopen error retrieval incomplete: got only 86016 out of 152108606 bytes>": "wheel-download",
    "retrieval incomplete: got only 86016 out of 152108606 bytes": "wheel-download",
    "urllib.error.ContentTooShortError": "wheel-download",
    "/bin/sh: 1: nvcc: not found": "nvcc-not-found",
    "Failed to find nvcc. Compiler requires the CUDA toolkit.": "nvcc-not-found",
    "No CMAKE_CUDA_COMPILER could be found.": "nvcc-not-found",
    'CMake was unable to find a build program corresponding to "Ninja".': "no-ninja",
    "CMAKE_MAKE_PROGRAM is not set.": "no-ninja",
    "FindCUDA says 12.1: Found two conflicting CUDA installs": "cuda-mismatch",
    "nvcc fatal : Value 'sm_53' is not defined for option 'gpu-architecture'": "unsupported-architecture",
    "nvcc fatal : Cannot find compiler 'cl.exe' in PATH": "no-msvc",
    'static assertion failed with "error STL1002: Unexpected compiler version"': "unsupported-msvc",
    "#error -- unsupported clang version! clang version must be less than 20": "unsupported-gnu",
    "error C2065: 'M_LOG2E': undeclared identifier": "m-log2e",
    'fwd_kernel.cuh(332): error: "#" not expected here': "directive-in-macro",
    "winsock2.h(478): error C2011: 'sockaddr': 'struct' type redefinition": "windows-h",
    "#error C++17 or later compatible compiler is required to use PyTorch.": "cxx20",
    'reverse_scan.cuh(339): error: identifier "CTA_SYNC" is undefined': "cub-names",
    "error C2039: 'LaneId': is not a member of 'cub'": "cub-names",
    "undefined reference to `long* at::Tensor::data_ptrIlEEv'": "long-data-ptr",
    "fatal error C1002: compiler is out of heap space in pass 2": "out-of-heap",
    "virtual memory exhausted: Cannot allocate memory": "out-of-heap",
    "catastrophic error: out of memory": "out-of-heap",
    "The command line is too long.": "command-line-too-long",
    "LINK : fatal error LNK1170: line in command file contains 131071 or more characters": "command-line-too-long",
    "error: unable to create file x: Filename too long": "command-line-too-long",
    "Could NOT find nvtx3 (missing: nvtx3_dir)": "nvtoolsext",
    "CalledProcessError: Command '['ninja', '-v']' returned non-zero exit status 1.": "aftermath",
    "error: command 'C:\\VC\\cl.exe' failed with exit code 2": "aftermath",
    "error: legacy-install-failure": "aftermath",
}


@pytest.mark.parametrize("log", LOGS, ids=lambda path: path.stem)
def test_the_first_real_error_of_a_log(log):
    first = explain.find(explain.read(str(log)), KNOWLEDGE)[0]
    assert first.message["id"] == log.stem.split(".")[-1]


def test_every_message_has_a_log():
    assert {one["id"] for one in KNOWLEDGE} == {log.stem.split(".")[-1] for log in LOGS}


def test_every_pattern_is_seen_to_match():
    lines = "\n".join(log.read_text(encoding="utf-8") for log in LOGS).splitlines() + [*TITLES]
    patterns = [pattern for message in KNOWLEDGE for pattern in message["patterns"]]
    silent = [one.pattern for one in patterns if not any(one.search(line) for line in lines)]
    assert silent == []


@pytest.mark.parametrize("title", TITLES)
def test_titles(title):
    assert explain.find(title, KNOWLEDGE)[0].message["id"] == TITLES[title]


def test_prose_and_fields():
    rows = {check.__name__ for check in checks.CHECKS + build_checks.CHECKS}
    assert len(rows) == len(checks.CHECKS + build_checks.CHECKS)
    sources = "".join(Path(module.__file__).read_text() for module in (checks, build_checks))
    fields = {"id", "patterns", "kind", "cause", "cure", "windows", "linux", "checks", "topic"}
    for one in KNOWLEDGE:
        assert set(one) <= fields | {"advice"} and one["kind"] in explain.KINDS
        assert one["cause"].strip() and one["cure"].strip()
        for check in one["checks"]:
            assert f'Row("{check}"' in sources or f'"{check}", "' in sources, check


def test_the_subset_reads_as_tomllib_does():
    tomllib = pytest.importorskip("tomllib")
    text = explain.KNOWLEDGE.read_text(encoding="utf-8")
    assert toml_subset.loads(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text", ["a = 1\n", "[table]\n", 'a = "\\n"\n', "a = 'b' # c\n", "a = ['b', 1]\n", "a\n"]
)
def test_the_subset_refuses_the_rest(text):
    with pytest.raises(ValueError, match="line 2"):
        toml_subset.loads("# comment\n" + text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_in_the_encodings_that_shells_write(tmp_path, encoding):
    path = tmp_path / "log.txt"
    path.write_text("J\u00fcrgen\nerror C2975\n", encoding=encoding)
    assert explain.read(str(path)).splitlines() == ["J\u00fcrgen", "error C2975"]


def test_a_long_text_is_no_file_name():
    text = "x" * 5000 + "\n\0"
    assert explain.read(text) == text


@pytest.fixture
def machine(monkeypatch):
    """Recorded facts, so that no process is started."""
    from test_doctor_checks import GPP16, MACHINE, changed

    monkeypatch.setattr(facts, "collect", lambda: changed(MACHINE, GPP16))


def run(*arguments):
    return cli.main(["doctor", "--explain", *arguments])


def test_cause_and_cure_for_this_machine(machine, capsys):
    assert run("host_config.h:143: error: #error -- unsupported GNU version!") == 0
    text = capsys.readouterr().out
    assert text.startswith("line 1: host_config.h:143")
    assert "\ncause: nvcc accepts g++ up to" in text and "\ncure: Install an older g++" in text
    assert "warning  compiler for CUDA: g++ 16; CUDA 13.0 accepts up to 15" in text


def test_the_rest_of_a_log_is_named(machine, capsys):
    assert run(str(COMPILING)) == 0
    text = capsys.readouterr().out
    assert re.match(r"line \d+: .*M_LOG2E", text)
    assert "this project's wheel holds these kernels compiled" in text
    assert re.search(r"Known as well: c2975 \(line \d+\), guessing-wheel \(line 3\), afterm", text)


def test_only_the_cure_of_this_system(machine, capsys, monkeypatch):
    assert run("nvcc was not found") == 0
    assert "export CUDA_HOME" in (text := capsys.readouterr().out) and "winget" not in text


def test_json(machine, capsys):
    assert run(str(COMPILING), "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["id"] == "m-log2e" and document["status"] == 0 and len(document["others"]) == 3
    assert document["machine"][0].keys() == {"check", "verdict", "found", "cause", "cure"}


def test_standard_input(machine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"noise\nerror C2975\n")))
    assert run("-") == 0
    assert capsys.readouterr().out.startswith("line 2: error C2975")


def test_an_unknown_error_before_a_known_one_is_shown(machine, capsys):
    assert run("a.cu(3): error: new trouble\nninja: build stopped: subcommand failed.") == 0
    assert "line 1 looks like an error too: a.cu(3): error: new trouble" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("all well\nValueError: new trouble\n", "line 2:\n  ValueError: new trouble"),
        ("all well", "no line looks like an error"),
        ("", "no line looks like an error"),
        ("mistyped.log", "no file of that name"),
    ],
)
def test_nothing_known(machine, capsys, text, said):
    assert run(text) == 1
    assert said in capsys.readouterr().out
    assert run(text, "--json") == 1
    assert json.loads(capsys.readouterr().out)["status"] == 1
