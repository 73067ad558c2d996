"""The workflows for real Windows and Linux machines, as far as can be told without running them.

Every check is also shown a sample that it must complain about.
"""

import copy
import fnmatch
import functools
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: workflows cannot be read")

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
KIND = {"cmake": "configurePresets", "build": "buildPresets", "ctest": "testPresets"}


def load(text):
    """The workflow as plain strings: `on` stays a key, 3.10 a version."""
    return yaml.load(text, Loader=yaml.BaseLoader)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def workflow(path):
    return load(path.read_text(encoding="utf-8"))


# What a job does: its matrix multiplied out, ${{ matrix.x }} filled in.


def matrix_rows(job):
    matrix = dict(job.get("strategy", {}).get("matrix", {}))
    include, exclude = matrix.pop("include", []), matrix.pop("exclude", [])
    rows = [dict(zip(matrix, row, strict=True)) for row in itertools.product(*matrix.values())]
    rows = [row for row in rows if not any(out.items() <= row.items() for out in exclude)]
    rows = [row for row in rows if row]
    own = [dict(row) for row in rows]
    for extra in include:
        fits = [i for i, row in enumerate(own) if all(row.get(k, v) == v for k, v in extra.items())]
        for i in fits:
            rows[i] |= extra
        if not fits:
            rows.append(dict(extra))
    return rows or [{}]


def fill(value, row):
    if isinstance(value, dict):
        return {key: fill(inner, row) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, row) for inner in value]
    return re.sub(
        r"\$\{\{\s*matrix\.([\w-]+)\s*\}\}", lambda match: row.get(match[1], match[0]), value
    )


def runs(workflow):
    """(name, job) of every job, once per row of its matrix."""
    for name, job in workflow["jobs"].items():
        for row in matrix_rows(job):
            yield name, fill({key: job[key] for key in job if key != "strategy"}, row)


def commands(workflow):
    """(job's name, runner, command) of every `run`."""
    for name, job in runs(workflow):
        for step in job.get("steps", []):
            if "run" in step:
                yield name, str(job["runs-on"]), step["run"]


def steps(workflow, action):
    for name, job in runs(workflow):
        for step in job.get("steps", []):
            if step.get("uses", "").startswith(f"actions/{action}@"):
                yield name, step


# The checks: each yields what is wrong.


def unpinned(text):
    """Actions without a full hash and the version it stands for; images without a digest."""
    for line in re.findall(r"^.*\buses:.*$", text, re.MULTILINE):
        if re.search(r"uses: \./", line):
            continue
        if not re.search(r"uses: [\w.-]+(/[\w.-]+)+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line):
            yield line.strip()
    for _, job in runs(load(text)):
        image = job.get("container", "")
        image = image if isinstance(image, str) else image["image"]
        if image and not re.search(r"@sha256:[0-9a-f]{64}$", image):
            yield image


def excess_permissions(workflow):
    """Only reading by default; writing for a job that a pushed tag starts and that runs no sources."""
    default = workflow.get("permissions")
    if not isinstance(default, dict) or not set(default.values()) <= {"read", "none"}:
        yield f"permissions of the workflow: {default}"
    by_tag = workflow["on"] == {"push": {"tags": ["v*"]}}
    for name, job in workflow["jobs"].items():
        granted = job.get("permissions", {})
        writes = not isinstance(granted, dict) or "write" in granted.values()
        checkout = any("actions/checkout" in step.get("uses", "") for step in job.get("steps", []))
        if writes and (checkout or not by_tag):
            yield f"{name}: {granted}"


def without_limit(workflow):
    for name, job in workflow["jobs"].items():
        if "uses" not in job and not job.get("timeout-minutes", "").isdigit():
            yield f"{name} has no timeout-minutes"
    if "concurrency" not in workflow:
        yield "no concurrency"


def named_presets(command):
    """(kind, name) of every preset that a command uses; our scripts use all three kinds."""
    command = " ".join(command.split())
    for name in re.findall(r"\bcmake --preset[ =](\S+)", command):
        yield "cmake", name
    for name in re.findall(r"\bcmake --build (?:\S+ )*?--preset[ =](\S+)", command):
        yield "build", name
    for name in re.findall(r"\bctest (?:\S+ )*?--preset[ =](\S+)", command):
        yield "ctest", name
    for name in re.findall(r"\bscripts/\w+\.py (?:\S+ )*?--preset[ =](\S+)", command):
        yield from ((kind, name) for kind in KIND)


def wrong_presets(workflow):
    for job, runner, command in commands(workflow):
        for kind, name in named_presets(command):
            visible = [p["name"] for p in PRESETS[KIND[kind]] if not p.get("hidden")]
            if name not in visible:
                yield f"{job}: no preset {name} among the {KIND[kind]}"
            elif name.startswith(("x64-", "vs20")) != ("windows" in runner):
                yield f"{job}: preset {name} on {runner}"


def missing_paths(workflow):
    """Files that a command, or a workflow that is called, names and the sources do not have."""
    for job, _, command in commands(workflow):
        for path in re.findall(r"(?<![\w/.])(?:scripts|tests|csrc|python|\.ci)/[\w./-]+", command):
            if not (ROOT / path).exists():
                yield f"{job}: {path}"
    for name, job in workflow["jobs"].items():
        if job.get("uses", "").startswith("./") and not (ROOT / job["uses"]).is_file():
            yield f"{name}: {job['uses']}"


def unknown_options(workflow):
    """Options that a script does not have, and CMake variables that the build does not have."""
    cmake = "".join(p.read_text("utf-8") for p in (ROOT / "csrc" / "cmake").glob("*.cmake"))
    for job, _, command in commands(workflow):
        for script, rest in re.findall(r"\b(scripts/\w+\.py)\b([^&|;]*)", command):
            if (ROOT / script).is_file():
                help_text = script_help(script)
                for option in re.findall(r"(?<![\w-])\"?(--[\w-]+|-D)", rest):
                    if not re.search(rf"(?<![\w-]){option}\b", help_text):
                        yield f"{job}: {script} has no {option}"
        for variable in re.findall(r"-D(MAMBA_\w+)=", command):
            if not re.search(rf"(option|set)\({variable}\b", cmake):
                yield f"{job}: no CMake option {variable}"


@functools.cache
def script_help(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unmatched_artifacts(workflow, called=None):
    """Jobs that are waited for must exist, and have uploaded what is downloaded."""
    called = called or {}
    uploads = {}
    for name, step in steps(workflow, "upload-artifact"):
        uploads.setdefault(name, set()).add(step["with"]["name"])
    for name, job in workflow["jobs"].items():
        if job.get("uses") in called:
            inner = steps(called[job["uses"]], "upload-artifact")
            uploads[name] = {step["with"]["name"] for _, step in inner}
    waits = {}
    for name, job in workflow["jobs"].items():
        needs = job.get("needs", [])
        waits[name] = [needs] if isinstance(needs, str) else needs
        for other in waits[name]:
            if other not in workflow["jobs"]:
                yield f"{name} needs {other}, which is no job"
    for name, step in steps(workflow, "download-artifact"):
        wanted = step["with"].get("name") or step["with"]["pattern"]
        offered = set().union(*(uploads.get(other, set()) for other in waits[name]))
        if not fnmatch.filter(offered, wanted):
            yield f"{name} downloads {wanted}; what it needs uploads {sorted(offered)}"


def kept_credentials(workflow):
    for name, step in steps(workflow, "checkout"):
        if step.get("with", {}).get("persist-credentials") != "false":
            yield f"{name}: checkout leaves the token in the checkout"


def injections(workflow):
    """Expressions inside commands, other than our own matrix's, which fill() has replaced."""
    for name, _, command in commands(workflow):
        yield from (f"{name}: {found}" for found in re.findall(r"\$\{\{.*?\}\}", command))


def exposed_runners(workflow):
    """What strangers can start with their own sources must not reach our machines or our secrets."""
    events = workflow["on"]
    if "pull_request_target" in events:
        yield "pull_request_target"
    for name, job in workflow["jobs"].items():
        if "self-hosted" not in job.get("runs-on", ""):
            continue
        pull_request = events.get("pull_request") if isinstance(events, dict) else {}
        labelled = pull_request == {"types": ["labeled"]}
        gate = "github.event.label.name == '" in job.get("if", "")
        if "push" in events or ("pull_request" in events and not (labelled and gate)):
            yield f"{name}: self-hosted without a label that somebody sets"


def moving_runners(workflow):
    for name, job in runs(workflow):
        if "latest" in str(job.get("runs-on", "")):
            yield f"{name}: {job['runs-on']} changes under us"


CHECKS = (
    *(excess_permissions, without_limit, wrong_presets, missing_paths, unknown_options),
    *(kept_credentials, injections, exposed_runners, moving_runners),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check(workflow, check):
    assert list(check(workflow)) == []


def test_actions_and_images_are_pinned(path):
    assert list(unpinned(path.read_text(encoding="utf-8"))) == []


def test_artifacts_match(workflow):
    called = {f"./{p.relative_to(ROOT).as_posix()}": load(p.read_text("utf-8")) for p in WORKFLOWS}
    assert list(unmatched_artifacts(workflow, called)) == []


# What the workflows are for.


def test_the_matrix_has_every_compiler_and_toolkit():
    windows = load((GITHUB / "workflows" / "windows.yml").read_text("utf-8"))
    rows = matrix_rows(windows["jobs"]["cuda"])
    version = {row["cuda"]: tuple(map(int, row["cuda"].split("."))) for row in rows}
    cuda = {
        runner: {version[row["cuda"]][:2] for row in rows if row["runner"] == runner}
        for runner in ("windows-2022", "windows-2025-vs2026")
    }
    newest = max(version.values())[:2]
    assert cuda["windows-2022"] == {(12, 8), (13, 0), newest}
    assert newest in cuda["windows-2025-vs2026"]
    for row in rows:  # nvcc before 13.2 refuses the newest compiler there
        old = version[row["cuda"]] < (13, 2)
        assert (row["preset"] == "x64-release-v143") == (old and "2026" in row["runner"])
    cpu = matrix_rows(windows["jobs"]["cpu"])
    assert {"runner": "windows-2025", "preset": "x64-cpu"} in cpu


def test_one_wheel_carries_both_cuda_majors():
    jobs = load((GITHUB / "workflows" / "wheels.yml").read_text("utf-8"))["jobs"]
    built = {row["system"]: row for row in matrix_rows(jobs["cuda12"])}
    packed = {row["system"]: row for row in matrix_rows(jobs["wheel"])}
    assert set(built) == set(packed) == {"windows", "linux"}
    for system, row in packed.items():
        assert built[system]["preset"] == row["preset"] + "-cu12"
        assert built[system]["library"] == row["library"]
        assert built[system]["container"] == row["container"]
    (extra,) = (step["run"] for step in jobs["wheel"]["steps"] if "EXTRA" in step.get("run", ""))
    assert "-DMAMBA_WHEEL_EXTRA_LIBS=" in extra


# The checks must fail on what is broken.

GOOD = """
on: [push]
permissions: {contents: read}
concurrency: {group: g}
jobs:
  build:
    runs-on: windows-2022
    timeout-minutes: 5
    strategy:
      matrix:
        preset: [x64-cpu]
        include:
          - {preset: x64-cpu, extra: "1"}
          - {preset: x64-release-v143}
    steps:
      - uses: actions/checkout@0123456789012345678901234567890123456789  # v1.2.3
        with: {persist-credentials: false}
      - run: python scripts/test.py --preset ${{ matrix.preset }}
      - uses: actions/upload-artifact@0123456789012345678901234567890123456789  # v1.2.3
        with: {name: "file-${{ matrix.preset }}"}
  take:
    needs: build
    runs-on: ubuntu-24.04
    timeout-minutes: 5
    steps:
      - uses: actions/download-artifact@0123456789012345678901234567890123456789  # v1.2.3
        with: {name: file-x64-cpu}
      - run: cmake --preset linux-cpu && cmake --build --preset linux-cpu && ctest --preset linux-cpu
"""


@pytest.mark.parametrize("check", [*CHECKS, unmatched_artifacts], ids=lambda check: check.__name__)
def test_the_sample_is_good(check):
    assert list(check(load(GOOD))) == []
    assert list(unpinned(GOOD)) == []


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (unpinned, "@0123456789012345678901234567890123456789  # v1.2.3", "@v1"),
        (unpinned, "  # v1.2.3", ""),
        (unpinned, "0123456789012345678901234567890123456789", "0123456"),
        (unpinned, "runs-on: ubuntu-24.04", "runs-on: ubuntu-24.04\n    container: debian:12"),
        (excess_permissions, "permissions: {contents: read}\n", ""),
        (excess_permissions, "{contents: read}", "write-all"),
        (excess_permissions, "{contents: read}", "{contents: write}"),
        (excess_permissions, "needs: build", "permissions: {contents: write}"),
        (without_limit, "    timeout-minutes: 5\n", ""),
        (without_limit, "concurrency: {group: g}\n", ""),
        (wrong_presets, "[x64-cpu]", "[x64-gone]"),
        (wrong_presets, "x64-release-v143", "x64-release-v142"),
        (wrong_presets, "runs-on: windows-2022", "runs-on: ubuntu-24.04"),
        (wrong_presets, "cmake --preset linux-cpu", "cmake --preset linux-gone"),
        (wrong_presets, "cmake --build --preset linux-cpu", "cmake --build --preset base"),
        (wrong_presets, "ctest --preset linux-cpu", "ctest --preset cpu-tests"),
        (missing_paths, "scripts/test.py", "scripts/gone.py"),
        (unknown_options, "test.py --preset", "test.py --gone 1 --preset"),
        (unknown_options, "cmake --preset linux-cpu", "cmake --preset linux-cpu -DMAMBA_GONE=ON"),
        (kept_credentials, "with: {persist-credentials: false}", "with: {fetch-depth: 0}"),
        (injections, "&& ctest", "&& echo ${{ github.event.pull_request.title }} && ctest"),
        (exposed_runners, "on: [push]", "on: [pull_request_target]"),
        (exposed_runners, "runs-on: windows-2022", "runs-on: [self-hosted, gpu]"),
        (moving_runners, "windows-2022", "windows-latest"),
        (unmatched_artifacts, "needs: build", "needs: built"),
        (unmatched_artifacts, "needs: build\n", "\n"),
        (unmatched_artifacts, "name: file-x64-cpu", "name: file-x64"),
    ],
)
def test_a_broken_workflow_is_noticed(check, old, new):
    assert old in GOOD
    text = GOOD.replace(old, new)
    assert list(check(text if check is unpinned else load(text)))


@pytest.mark.parametrize(
    ("on", "condition", "exposed"),
    [
        ({"workflow_dispatch": ""}, "", False),
        ({"pull_request": {"types": ["labeled"]}}, "github.event.label.name == 'gpu'", False),
        ({"pull_request": {"types": ["labeled"]}}, "", True),
        ({"pull_request": ""}, "github.event.label.name == 'gpu'", True),
        ({"push": ""}, "github.event.label.name == 'gpu'", True),
    ],
)
def test_who_reaches_our_own_machines(on, condition, exposed):
    workflow = copy.deepcopy(load(GOOD)) | {"on": on}
    workflow["jobs"]["take"] |= {"runs-on": ["self-hosted"], "if": condition}
    assert bool(list(exposed_runners(workflow))) == exposed


def test_matrix():
    job = load(GOOD)["jobs"]["build"]
    assert matrix_rows(job) == [{"preset": "x64-cpu", "extra": "1"}, {"preset": "x64-release-v143"}]
    product = {"a": ["1", "2"], "b": ["3"], "exclude": [{"a": "2"}]}
    assert matrix_rows({"strategy": {"matrix": product}}) == [{"a": "1", "b": "3"}]
    assert matrix_rows({}) == [{}]


# The form, by the tools that are made for it.


def tool(module, *arguments):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed in this Python")
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


SCHEMAS = {"workflows": WORKFLOWS, "dependabot": [GITHUB / "dependabot.yml"]}
SCHEMA_OF = {"workflows": "vendor.github-workflows", "dependabot": "vendor.dependabot"}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_schema(kind):
    result = tool("check_jsonschema", "--builtin-schema", SCHEMA_OF[kind], *SCHEMAS[kind])
    assert result.returncode == 0, result.stdout + result.stderr


def test_schema_notices_a_wrong_key(tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text(GOOD.replace("timeout-minutes", "timeout-hours"), encoding="utf-8")
    assert tool("check_jsonschema", "--builtin-schema", SCHEMA_OF["workflows"], bad).returncode


YAMLLINT = ("yamllint", "--strict", "-c", GITHUB / "yamllint.yml")


def test_yamllint():
    result = tool(*YAMLLINT, GITHUB)
    assert result.returncode == 0, result.stdout + result.stderr


def test_yamllint_notices_a_key_given_twice(tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text("a: 1\na: 2\n", encoding="utf-8")
    result = tool(*YAMLLINT, bad)
    assert result.returncode != 0 and "duplication" in result.stdout
