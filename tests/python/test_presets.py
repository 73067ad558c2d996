"""CMakePresets.json, resolved here: CMake itself hides presets whose condition fails on this machine.

Where CMake can be asked, on Linux, its answer and ours must agree.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
ARCHITECTURES = {
    "sm_75": "7.5",
    "sm_80": "8.0",
    "sm_86": "8.6",
    "sm_89": "8.9",
    "sm_90": "9.0",
    "sm_100": "10.0",
    "sm_120": "12.0",
}
KINDS = [
    "debug",
    "release",
    *(f"release-{sm}" for sm in ARCHITECTURES),
    "cpu",
    "wheel",
    "wheel-cu12",
]
WINDOWS = [*(f"x64-{kind}" for kind in KINDS), "x64-release-v143", "vs2022", "vs2026"]
LINUX = [*(f"linux-{kind}" for kind in KINDS), "linux-asan", "windows-mingw"]
CPU_ONLY = {"x64-cpu", "linux-cpu", "linux-asan", "windows-mingw"}
SOLUTIONS = {"vs2022", "vs2026"}


def resolve(kind, name):
    """A preset with all that it inherits: of scalars the first parent's wins, maps are merged."""
    preset = next(preset for preset in PRESETS[kind] if preset["name"] == name)
    result = {"cacheVariables": {}, "conditions": []}
    parents = preset.get("inherits", [])
    for parent in reversed([parents] if isinstance(parents, str) else parents):
        inherited = resolve(kind, parent)
        cache = result["cacheVariables"] | inherited["cacheVariables"]
        conditions = inherited["conditions"] or result["conditions"]
        result |= inherited | {"cacheVariables": cache, "conditions": conditions}
    cache = result["cacheVariables"] | preset.get("cacheVariables", {})
    conditions = [preset["condition"]] if "condition" in preset else result["conditions"]
    result |= preset | {"cacheVariables": cache, "conditions": conditions}
    result["hidden"] = preset.get("hidden", False)
    return result


def expand(text, name, system="Linux", environment=None):
    text = text.replace("${sourceDir}", ROOT.as_posix()).replace("${presetName}", name)
    text = text.replace("${hostSystemName}", system)
    return re.sub(r"\$env\{(\w+)\}", lambda match: (environment or {}).get(match[1], ""), text)


def holds(condition, name, system, environment):
    def value(key):
        return expand(condition[key], name, system, environment)

    if condition["type"] == "allOf":
        return all(holds(part, name, system, environment) for part in condition["conditions"])
    if condition["type"] == "equals":
        return value("lhs") == value("rhs")
    assert condition["type"] == "inList"
    return value("string") in condition["list"]


def usable(name, system, environment=None):
    conditions = resolve("configurePresets", name)["conditions"]
    return all(holds(condition, name, system, environment) for condition in conditions)


def visible(kind):
    return [preset["name"] for preset in PRESETS[kind] if not preset.get("hidden")]


def cache(name):
    return resolve("configurePresets", name)["cacheVariables"]


@pytest.mark.parametrize("kind", ["configurePresets", "buildPresets", "testPresets"])
def test_every_kind_has_every_preset(kind):
    assert sorted(visible(kind)) == sorted(WINDOWS + LINUX)


def test_schema_is_one_that_the_oldest_cmake_reads():
    assert PRESETS["version"] == 5
    assert PRESETS["cmakeMinimumRequired"] == {"major": 3, "minor": 25, "patch": 0}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_presets_show_on_windows_only(name):
    assert usable(name, "Windows")
    assert not usable(name, "Linux")


@pytest.mark.parametrize("name", LINUX)
def test_linux_presets_show_on_linux_only(name):
    assert usable(name, "Linux")
    assert not usable(name, "Windows")


@pytest.mark.parametrize("name", WINDOWS + LINUX)
def test_build_folder_generator_and_partners(name):
    preset = resolve("configurePresets", name)
    assert expand(preset["binaryDir"], name) == f"{ROOT.as_posix()}/build/{name}"
    generators = {"vs2022": "Visual Studio 17 2022", "vs2026": "Visual Studio 18 2026"}
    assert preset["generator"] == generators.get(name, "Ninja")
    assert ("CMAKE_BUILD_TYPE" in preset["cacheVariables"]) == (name not in SOLUTIONS)
    assert preset["displayName"]
    for kind in ("buildPresets", "testPresets"):
        partner = resolve(kind, name)
        assert partner["configurePreset"] == name
        assert partner.get("configuration") == ("Release" if name in SOLUTIONS else None)


@pytest.mark.parametrize("name", WINDOWS + LINUX)
def test_no_test_run_passes_without_tests(name):
    preset = resolve("testPresets", name)
    assert preset["execution"]["noTestsAction"] == "error"
    assert preset["output"]["outputOnFailure"]
    excluded = preset["filter"]["exclude"]["label"].split("|")
    assert set(excluded) == ({"gpu", "large"} if name in CPU_ONLY else {"large"})
    assert cache(name).get("MAMBA_TESTS", "ON") == "ON"


@pytest.mark.parametrize("name", WINDOWS + LINUX)
def test_cache_variables_are_options_and_leave_architectures_to_the_user(name):
    declared = set()
    for module in (ROOT / "csrc" / "cmake").glob("*.cmake"):
        text = module.read_text(encoding="utf-8")
        declared |= set(re.findall(r"option\((MAMBA_\w+)", text))
        declared |= set(re.findall(r"set\((MAMBA_\w+) [^)]*?\bCACHE\b", text))
    variables = cache(name)
    assert {variable for variable in variables if variable.startswith("MAMBA_")} <= declared
    assert "CMAKE_CUDA_ARCHITECTURES" not in variables


@pytest.mark.parametrize("name", WINDOWS + LINUX)
def test_architectures_and_configuration(name):
    variables = cache(name)
    sm = next((sm for sm in ARCHITECTURES if name.endswith(sm)), None)
    expected = ARCHITECTURES[sm] if sm else "wheel" if "wheel" in name else "native"
    if name in CPU_ONLY:
        assert variables["MAMBA_CUDA"] == "OFF"
    else:
        assert variables["MAMBA_DEFAULT_CUDA_ARCHITECTURES"] == expected
        assert "MAMBA_CUDA" not in variables
    if name not in SOLUTIONS | {"linux-asan"}:
        expected = "Debug" if name.endswith("-debug") else "Release"
        assert variables["CMAKE_BUILD_TYPE"] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_linux_twin_differs_in_the_compiler_only(kind):
    windows = cache(f"x64-{kind}")
    assert windows.pop("CMAKE_CXX_COMPILER") == "cl.exe"
    assert windows == cache(f"linux-{kind}")


@pytest.mark.parametrize("name", [name for name in WINDOWS if name not in SOLUTIONS])
def test_visual_studio_sets_up_the_compiler(name):
    preset = resolve("configurePresets", name)
    version = ",version=14.44" if name.endswith("v143") else ""
    assert preset["architecture"] == {"value": "x64", "strategy": "external"}
    assert preset["toolset"] == {"value": f"host=x64{version}", "strategy": "external"}
    assert "microsoft.com/VisualStudioSettings/CMake/1.0" in preset["vendor"]


def test_what_makes_the_special_ones_special():
    assert cache("x64-wheel")["MAMBA_CUDA_COMPRESS"] == "ON"
    assert cache("x64-wheel-cu12")["MAMBA_CUDA_MAJOR"] == "12"
    assert cache("x64-wheel-cu12")["MAMBA_DIST_DIR"] != cache("x64-wheel").get("MAMBA_DIST_DIR")
    assert cache("linux-asan")["MAMBA_SANITIZE"] == "address,undefined"
    toolchain = resolve("configurePresets", "windows-mingw")["toolchainFile"]
    assert Path(expand(toolchain, "windows-mingw")).is_file()


HERE = WINDOWS if sys.platform == "win32" else LINUX
NEEDS_CMAKE = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not on PATH")


def cmake(*arguments):
    command = ["cmake", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@NEEDS_CMAKE
@pytest.mark.parametrize("name", HERE)
def test_cmake_agrees(name):
    result = cmake("-N", "--preset", name)
    if "Could not create named generator" in result.stderr:
        pytest.skip("this cmake is older than the Visual Studio of the preset")
    assert result.returncode == 0, result.stderr
    # a toolchain file's own line has a type: CMAKE_TOOLCHAIN_FILE:FILEPATH="..."
    told = dict(re.findall(r'^  (\w+)(?::\w+)?="(.*)"$', result.stdout, re.MULTILINE))
    told.pop("CMAKE_TOOLCHAIN_FILE", None)
    assert told == {key: expand(value, name) for key, value in cache(name).items()}


@NEEDS_CMAKE
def test_cmake_lists_the_presets_of_this_system_and_no_others():
    listed = set(re.findall(r'^  "([^"]+)"', cmake("--list-presets").stdout, re.MULTILINE))
    assert listed in (set(HERE), set(HERE) - {"vs2026"})  # cmake before 4.2 knows no such generator
