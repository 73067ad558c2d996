"""Finding Visual Studio and loading its prompt: recorded output, and on Windows cmd.exe itself."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _visual_studio as visual_studio  # noqa: E402

# What `vswhere -format json -utf8` prints, cut to what tells installations apart.
VSWHERE = """[
  {
    "instanceId": "5f0f3a1c",
    "installationPath": "%(folder)s/2019 BuildTools",
    "installationVersion": "16.11.36631.11",
    "isComplete": true,
    "displayName": "Visual Studio Build Tools 2019"
  },
  {
    "instanceId": "9c1a2b3d",
    "installationPath": "%(folder)s/18/Community",
    "installationVersion": "18.2.11415.280",
    "isComplete": true,
    "displayName": "Visual Studio Community 2026",
    "description": "Alles f\u00fcr moderne Apps",
    "catalog": {"productLineVersion": "18"}
  },
  {
    "instanceId": "0d7e6f55",
    "installationPath": "%(folder)s/2022/Community",
    "installationVersion": "17.14.36811.4",
    "isComplete": true,
    "displayName": "Visual Studio Community 2022"
  }
]
"""
TOOLSETS = {
    "2019 BuildTools": ["14.29.30133"],
    "18/Community": ["14.44.35207", "14.50.35717"],
    "2022/Community": ["14.9.1", "14.38.33130", "14.44.35207"],
}
CUDA_13_0 = (
    "#if _MSC_VER < 1920 || _MSC_VER >= 1950\n#endif /* (_MSC_VER < 1910 || _MSC_VER >= 1950) */\n"
)
CUDA_13_5 = CUDA_13_0.replace("1950", "1960").replace("\n", "\r\n")


class Machine:
    """Answers the commands, and records them."""

    def __init__(self, folder, names):
        self.folder = folder
        self.commands = []
        rows = json.loads(VSWHERE % {"folder": folder.as_posix()})
        self.rows = [row for row in rows if row["installationPath"].endswith(tuple(names))]
        for name in names:
            for toolset in TOOLSETS[name]:
                (folder / name / "VC" / "Tools" / "MSVC" / toolset).mkdir(parents=True)
            build = folder / name / "VC" / "Auxiliary" / "Build"
            build.mkdir(parents=True)
            newest = TOOLSETS[name][-1] + "\n"
            (build / "Microsoft.VCToolsVersion.default.txt").write_text(newest, encoding="utf-8")
        self.vswhere = 0, json.dumps(self.rows, ensure_ascii=False)
        self.prompt = 0, printed()

    def run(self, command):
        self.commands.append(command)
        return self.vswhere if isinstance(command, list) else self.prompt


VARIABLES = {
    "Path": r"C:\VC\bin;C:\Users\J\u00fcrgen Gro\u00df\bin;C:\Windows",
    "INCLUDE": r"C:\VC\include",
    "LIB": r"C:\VC\lib",
    "VSCMD_ARG_TGT_ARCH": "x64",
    "OPTIONS": "a=b;c=d=",
    "EMPTY": "",
    "LINES": "first\nsecond=2",
    "=C:": r"C:\work",
}


def printed(**changed):
    line = visual_studio.MARK + json.dumps(VARIABLES | changed)
    noise = "AutoRun says=hello\r\n** Visual Studio 2026 Developer Command Prompt\r\n"
    return f"{noise}{line}\r\nbye=1\r\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def make(*names, cuda=None):
        made = Machine(tmp_path, names)
        monkeypatch.setattr(visual_studio, "run", made.run)
        nvcc = None
        if cuda is not None:
            header = tmp_path / "cuda" / "include" / "crt" / "host_config.h"
            header.parent.mkdir(parents=True)
            header.write_bytes(cuda.encode())
            nvcc = str(tmp_path / "cuda" / "bin" / "nvcc.exe")
        monkeypatch.setattr(visual_studio, "find_nvcc", lambda preset: nvcc)
        return made

    return make


def stops(call, *arguments):
    """The message of the error that ends the script."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    return str(ended.value)


def chosen(preset="x64-release", nvcc=None):
    installation, toolset = visual_studio.choose(visual_studio.installations(), preset, nvcc)
    return installation.name.rpartition(" ")[2], toolset


def test_installations_are_read_newest_first(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("ProgramFiles(x86)", str(tmp_path))
    asked = machine("2019 BuildTools", "18/Community", "2022/Community")
    found = visual_studio.installations()
    assert [(one.default, one.toolsets) for one in found] == [
        ("14.50", ["14.50", "14.44"]),
        ("14.44", ["14.44", "14.38", "14.9"]),
        ("14.29", ["14.29"]),
    ]
    assert found[0].folder == tmp_path / "18" / "Community"
    (command,) = asked.commands
    installer = tmp_path / "Microsoft Visual Studio" / "Installer"
    assert command[0] == str(installer / "vswhere.exe")
    assert command[1:] == (
        "-format json -utf8 -products * -requires Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    ).split(" ")


@pytest.mark.parametrize(
    "vswhere",
    [(0, "[]"), (1, "[WinError 2] The system cannot find the file specified"), (87, "Error 0x57")],
)
def test_no_visual_studio(machine, vswhere):
    machine().vswhere = vswhere
    message = stops(visual_studio.installations)
    assert "No Visual C++ found" in message and "Desktop development with C++" in message
    assert vswhere[1] in message or vswhere[0] == 0


def test_an_installation_whose_tools_are_gone_does_not_count(machine, tmp_path):
    rows = machine("2022/Community").rows
    rows[0]["installationPath"] = str(tmp_path / "removed")
    broken = machine()
    broken.vswhere = 0, json.dumps(rows)
    assert "No Visual C++ found" in stops(visual_studio.installations)


def test_the_newest_without_cuda(machine):
    machine("2019 BuildTools", "18/Community", "2022/Community")
    assert chosen() == ("2026", "14.50")


@pytest.mark.parametrize(
    ("names", "cuda", "expected"),
    [
        (["18/Community", "2022/Community"], CUDA_13_5, ("2026", "14.50")),
        (["18/Community", "2022/Community"], CUDA_13_0, ("2022", "14.44")),
        (["18/Community", "2019 BuildTools"], CUDA_13_0, ("2019", "14.29")),
        (["18/Community"], CUDA_13_0, ("2026", "14.44")),
        (["18/Community"], "// says nothing", ("2026", "14.50")),
    ],
)
def test_what_cuda_takes(machine, names, cuda, expected):
    machine(*names, cuda=cuda)
    assert chosen(nvcc=visual_studio.find_nvcc("")) == expected


def test_nothing_that_cuda_takes(machine, monkeypatch):
    monkeypatch.setitem(TOOLSETS, "18/Community", ["14.50.35717"])
    machine("18/Community", cuda=CUDA_13_0)
    message = stops(chosen, "x64-release", visual_studio.find_nvcc(""))
    assert "takes compilers from 14.20 to below 14.50" in message
    assert "found Visual Studio Community 2026 with 14.50" in message
    assert ">= 13.2" in message and visual_studio.V143_TOOLS in message


def test_preset_v143_takes_its_compiler_and_no_other(machine):
    machine("18/Community", "2022/Community")
    assert chosen("x64-release-v143") == ("2026", "14.44")


def test_preset_v143_names_the_missing_component(machine):
    machine("2019 BuildTools")
    message = stops(chosen, "x64-release-v143")
    assert "Preset x64-release-v143 wants compiler 14.44" in message
    assert "found Visual Studio Build Tools 2019 with 14.29" in message
    assert "Microsoft.VisualStudio.Component.VC.14.44.17.14.x86.x64" in message


def test_the_compiler_of_preset_v143_is_the_presets():
    root = Path(__file__).resolve().parents[2]
    presets = json.loads((root / "CMakePresets.json").read_text(encoding="utf-8"))
    (v143,) = (row for row in presets["configurePresets"] if row["name"] == "v143")
    assert v143["toolset"]["value"].endswith(f"version={visual_studio.V143}")


def test_the_prompt_is_loaded(machine, capsys):
    asked = machine("18/Community", cuda=CUDA_13_0)
    env = visual_studio.environment({"PATH": r"C:\old", "Home": "kept"})
    assert env["PATH"] == VARIABLES["Path"] and "Path" not in env
    assert env["HOME"] == "kept"
    for name in ("INCLUDE", "OPTIONS", "EMPTY", "LINES"):
        assert env[name] == VARIABLES[name]
    assert not {"AutoRun says", "bye"} & set(env)
    command = asked.commands[-1]
    assert re.search(r'call ".*vcvarsall\.bat" x64 -vcvars_ver=14\.44 && ', command)
    assert "compiler: 14.44 of Visual Studio Community 2026" in capsys.readouterr().out


def test_a_name_with_umlauts_survives():
    variables = visual_studio.parse(
        printed(TEMP="C:\\Users\\J\u00fcrgen \u0141\u00f3d\u017a\\Temp")
    )
    assert variables["TEMP"] == "C:\\Users\\J\u00fcrgen \u0141\u00f3d\u017a\\Temp"


@pytest.mark.parametrize(
    "answer",
    [
        (1, "[ERROR:vcvars.bat] Toolset directory for version '14.44' was not found.\r\n"),
        (0, "Die Eingabezeile ist zu lang.\r\n"),
        (0, printed(VSCMD_ARG_TGT_ARCH="x86")),
        (0, printed(INCLUDE="")),
    ],
)
def test_a_prompt_that_does_not_load_shows_what_it_said(machine, answer):
    machine("2022/Community").prompt = answer
    message = stops(visual_studio.environment, {})
    assert "vcvarsall.bat" in message and "set up no compiler" in message
    assert "Repair Visual Studio Community 2022" in message
    assert answer[1].splitlines()[0] in message
    assert visual_studio.MARK not in message


def test_a_prompt_that_is_loaded_stays(machine):
    asked = machine()
    env = {"VSCMD_ARG_TGT_ARCH": "x64", "Path": "p", "VCToolsVersion": "14.44.35207"}
    for preset in ("x64-release", "x64-release-v143"):
        assert visual_studio.environment(env, preset)["PATH"] == "p"
    assert not asked.commands


def test_a_prompt_for_another_target(machine):
    message = stops(visual_studio.environment, {"VSCMD_ARG_TGT_ARCH": "x86"})
    assert "compiles for x86" in message and "plain PowerShell" in message
    assert "x64 Native Tools Command Prompt" in message


def test_a_prompt_with_another_compiler_than_the_preset_wants(machine):
    env = {"VSCMD_ARG_TGT_ARCH": "x64", "VCToolsVersion": "14.50.35717"}
    message = stops(visual_studio.environment, env, "x64-release-v143")
    assert "wants compiler 14.44, and this prompt has 14.50.35717" in message


@pytest.fixture
def toolkits(tmp_path, monkeypatch):
    """CUDA 12.6, 12.10 and 13.0, as the Windows installer leaves them; 13.0 is the current one."""
    for name in [name for name in os.environ if name.startswith("CUDA_PATH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    for version in ("12_6", "12_10", "13_0"):
        nvcc = tmp_path / version / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        monkeypatch.setenv(f"CUDA_PATH_V{version}", str(tmp_path / version))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "13_0"))
    return tmp_path


@pytest.mark.parametrize(
    ("preset", "version"),
    [
        ("x64-release", "13_0"),
        ("x64-wheel", "13_0"),
        ("x64-wheel-cu12", "12_10"),
        ("x64-cpu", None),
    ],
)
def test_nvcc_of_a_preset(toolkits, preset, version):
    nvcc = visual_studio.find_nvcc(preset)
    assert (nvcc and Path(nvcc).parent) == (version and toolkits / version / "bin")


def test_nvcc_of_a_preset_is_not_there(toolkits, monkeypatch):
    monkeypatch.delenv("CUDA_PATH_V12_6")
    monkeypatch.delenv("CUDA_PATH_V12_10")
    assert visual_studio.find_nvcc("x64-wheel-cu12") is None
    monkeypatch.delenv("CUDA_PATH")
    monkeypatch.chdir(toolkits / "13_0")
    assert visual_studio.find_nvcc("x64-release") is None


STORE = r"C:\Users\Jane\AppData\Local\Microsoft\WindowsApps\python.exe"
STORE_BASE = r"C:\Program Files\WindowsApps\PythonSoftwareFoundation.Python.3.12_3.12.2800.0_x64"


@pytest.mark.parametrize(
    ("executable", "base"), [(STORE, "C:\\x"), (r"C:\m\.venv\Scripts\python.exe", STORE_BASE)]
)
def test_the_stores_python_is_refused(monkeypatch, executable, base):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "base_prefix", base)
    message = stops(visual_studio.check_python)
    assert f"{executable} is the Microsoft Store's Python" in message
    assert "python.org" in message and "App execution aliases" in message


def test_a_32_bit_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    message = stops(visual_studio.check_python)
    assert "32-bit Python" in message and "python.org" in message


def test_this_python_is_taken():
    visual_studio.check_python()


def test_a_command_that_is_not_there():
    status, output = visual_studio.run(["no-such-command-anywhere"])
    assert status and output


def test_output_in_another_code_page_is_read():
    code = r"import sys; sys.stdout.buffer.write(b'J\xfcrgen'); sys.exit(3)"
    assert visual_studio.run([sys.executable, "-c", code]) == (3, "J\ufffdrgen")


@pytest.mark.skipif(sys.platform != "win32", reason="needs cmd.exe")
@pytest.mark.parametrize("fails", [False, True])
def test_cmd_runs_a_batch_file_in_a_folder_with_spaces(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("MAMBA_TEST_NAME", "J\u00fcrgen = \u0141\u00f3d\u017a")
    folder = tmp_path / "Visual Studio (x86) & more"
    script = folder / "VC" / "Auxiliary" / "Build" / "vcvarsall.bat"
    script.parent.mkdir(parents=True)
    lines = ["@echo off", "echo loading %*"]
    if not fails:
        lines += ["set VSCMD_ARG_TGT_ARCH=%1", "set INCLUDE=C:\\include"]
    lines += [f"exit /b {int(fails)}", ""]
    script.write_text("\r\n".join(lines), encoding="ascii", newline="")
    installation = visual_studio.Installation("Test", folder, "14.44", ["14.44"])
    if fails:
        message = stops(visual_studio.load, installation, "14.44")
        assert "It printed:\nloading x64 -vcvars_ver=14.44" in message
    else:
        variables = visual_studio.load(installation, "14.44")
        assert variables["INCLUDE"] == "C:\\include" and variables["VSCMD_ARG_TGT_ARCH"] == "x64"
        assert variables["MAMBA_TEST_NAME"] == "J\u00fcrgen = \u0141\u00f3d\u017a"
