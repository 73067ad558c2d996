"""The two wheels: content, metadata, tag, and how they install beside and over each other."""

import base64
import email
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from wheels import ROOT, native_libraries, wheel

PROJECTS = ("mamba_ssm", "causal_conv1d")
MODULES = {"mamba_ssm": "selective_scan_cuda.py", "causal_conv1d": "causal_conv1d_cuda.py"}
VERSIONS = dict(
    re.findall(
        r'^(\w+) = "(.*)"', (ROOT / "python/mamba_ssm/_version.py").read_text(), re.MULTILINE
    )
)
VERSION = {"mamba_ssm": VERSIONS["__version__"], "causal_conv1d": VERSIONS["causal_conv1d_version"]}


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def info(project, files, name):
    return files[f"{project}-{VERSION[project]}.dist-info/{name}"]


def metadata(project, files):
    return email.message_from_bytes(info(project, files, "METADATA"))


@pytest.fixture(scope="module", params=PROJECTS)
def project(request):
    return request.param


@pytest.fixture(scope="module")
def files(project):
    return contents(wheel(project))


def test_every_source_file_and_no_other(project, files):
    package = ROOT / "python" / project
    expected = {path for path in package.rglob("*.*") if path.suffix in {".py", ".toml"}}
    expected.discard(package / "pyproject.toml")
    expected.add(ROOT / "python" / MODULES[project])
    expected = {
        path.relative_to(ROOT / "python").as_posix(): path.read_bytes() for path in expected
    }
    native = {
        name for name in files if re.fullmatch(r"mamba_ssm/native/mamba_native_\w+\.(so|dll)", name)
    }
    assert bool(native) == (project == "mamba_ssm")
    packed = {
        name: data
        for name, data in files.items()
        if ".dist-info/" not in name and name not in native
    }
    assert packed == expected


def test_no_file_is_in_both():
    assert not set(contents(wheel("mamba_ssm"))) & set(contents(wheel("causal_conv1d")))


def test_record_is_true(project, files):
    record = info(project, files, "RECORD").decode().splitlines()
    rows = dict(line.split(",", 1) for line in record)
    assert set(rows) == set(files)
    for name, data in files.items():
        if not name.endswith("/RECORD"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert rows[name] == f"sha256={digest},{len(data)}"


def test_requirements(project, files):
    requires = metadata(project, files).get_all("Requires-Dist")
    if project == "causal_conv1d":
        assert requires == [f"mamba_ssm=={VERSION['mamba_ssm']}"]
    else:
        extra = [f'{name}; extra == "cli"' for name in ("rich", "tqdm", "matplotlib")]
        assert requires == ["torch>=2.10", *extra]
        assert metadata(project, files).get_all("Provides-Extra") == ["cli"]


def test_name_version_and_licence(project, files):
    data = metadata(project, files)
    assert (data["Name"], data["Version"]) == (project, VERSION[project])
    assert data["Requires-Python"] == ">=3.10"
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Summary"]


def test_versions_are_what_callers_expect():
    ours = re.fullmatch(r"2\.3\.2\+native\.(\d+)", VERSION["mamba_ssm"])
    # from 1.7 on callers pass seq_idx together with initial_states
    theirs = re.fullmatch(r"1\.6\.\d+\+native\.(\d+)", VERSION["causal_conv1d"])
    assert ours and theirs and ours[1] == theirs[1]


def test_tag(project, files):
    path = wheel(project)
    text = info(project, files, "WHEEL").decode()
    (tag,) = re.findall(r"^Tag: (.*)$", text, re.MULTILINE)
    assert path.name == f"{project}-{VERSION[project]}-{tag}.whl"
    if project == "causal_conv1d":
        assert tag == "py3-none-any" and "Root-Is-Purelib: true" in text
    else:
        assert "Root-Is-Purelib: false" in text
        expected = "win_amd64" if sys.platform == "win32" else r"manylinux_2_\d+_x86_64"
        assert re.fullmatch(f"py3-none-{expected}", tag)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's versions")
def test_tag_claims_no_older_glibc_than_the_libraries_use():
    claimed = int(re.search(r"manylinux_2_(\d+)_", wheel("mamba_ssm").name)[1])
    # version names stand in the library as strings
    used = [
        int(minor)
        for _, data in native_libraries()
        for minor in re.findall(rb"GLIBC_2\.(\d+)\0", data)
    ]
    assert used and claimed >= max(used)


def test_size_and_no_trace_of_the_build_folder():
    assert wheel("mamba_ssm").stat().st_size < 60e6
    for name, data in native_libraries():
        assert str(ROOT).encode() not in data, f"{name} knows where it was built"


class Environment:
    """An empty virtual environment, and pip from outside it."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
        self.python = scripts / ("python.exe" if sys.platform == "win32" else "python")

    def pip(self, *arguments):
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def install(self, *paths):
        result = self.pip(
            "install", "--no-index", "--no-deps", "--disable-pip-version-check", *paths
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def run(self, *arguments):
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [self.python, *arguments]
        result = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=self.python.parent
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def version(self, project):
        return self.run("-c", f"import importlib.metadata as m; print(m.version('{project}'))")

    def site_packages(self):
        return Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))

    def missing(self, project):
        """Files that the project recorded and that are not there."""
        code = f"import importlib.metadata as m; print([str(f) for f in m.files('{project}') if not f.locate().is_file()])"
        return self.run("-c", code)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def test_mamba_ssm_alone_imports_without_torch(environment):
    environment.install(wheel("mamba_ssm"))
    assert (
        environment.run("-c", "import mamba_ssm; print(mamba_ssm.__version__)")
        == VERSION["mamba_ssm"]
    )
    assert "usage" in environment.run("-m", "mamba_ssm", "--help").lower()


def test_causal_conv1d_alone_asks_for_our_mamba_ssm(environment):
    result = environment.pip("install", "--no-index", wheel("causal_conv1d"))
    assert result.returncode != 0
    assert f"mamba_ssm=={VERSION['mamba_ssm']}" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "order", [PROJECTS, PROJECTS[::-1]], ids=lambda order: "-then-".join(order)
)
def test_both_in_either_order_and_out_again(environment, order):
    for project in order:
        environment.install(wheel(project))
    for project in PROJECTS:
        assert environment.version(project) == VERSION[project]
        assert environment.missing(project) == "[]"
    result = environment.pip("uninstall", "--yes", order[0])
    assert result.returncode == 0, result.stderr
    assert environment.missing(order[1]) == "[]"


def dummy(folder, project, version):
    """A wheel of the same name, as upstream's might lie there already."""
    name = f"{project}-{version}.dist-info"
    path = folder / f"{project}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{project}/__init__.py", "raise ImportError('the dummy')")
        archive.writestr(f"{project}/only_in_the_dummy.py", "")
        archive.writestr(MODULES[project], "raise ImportError('the dummy')")
        archive.writestr(
            f"{name}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        records = [f"{project}/__init__.py", f"{project}/only_in_the_dummy.py", MODULES[project]]
        records += [f"{name}/{part}" for part in ("METADATA", "WHEEL", "RECORD")]
        archive.writestr(f"{name}/RECORD", "".join(f"{record},,\n" for record in records))
    return path


@pytest.mark.parametrize(
    "order", [PROJECTS, PROJECTS[::-1]], ids=lambda order: "-then-".join(order)
)
def test_over_packages_of_the_same_names(environment, tmp_path, order):
    environment.install(
        dummy(tmp_path, "mamba_ssm", "2.2.4"), dummy(tmp_path, "causal_conv1d", "1.5.0")
    )
    for project in order:
        environment.install(wheel(project))
    site = environment.site_packages()
    for project in PROJECTS:
        assert environment.version(project) == VERSION[project]
        assert environment.missing(project) == "[]"
        assert not (site / project / "only_in_the_dummy.py").exists()
    assert (
        environment.run("-c", "import mamba_ssm; print(mamba_ssm.__version__)")
        == VERSION["mamba_ssm"]
    )
    assert "the dummy" not in "".join(path.read_text() for path in site.glob("*_cuda.py"))


def test_pip_wheel_gives_the_same(tmp_path):
    """pip builds from pyproject.toml what target wheel packs. Compiles the CPU library once more."""
    if any(name.startswith("mamba_native_cu") for name, _ in native_libraries()):
        pytest.skip(
            "would compile the kernels of every architecture; the wheel of a CPU preset shows it"
        )
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not installed in this Python")
    env = dict(os.environ)
    if "MAMBA_XSIMD_DIR" not in env and (build := os.environ.get("MAMBA_TEST_BUILD")):
        cache = Path(build, "CMakeCache.txt").read_text(encoding="utf-8")
        env["MAMBA_XSIMD_DIR"] = re.search(r"^MAMBA_XSIMD_DIR:\w+=(.*)$", cache, re.MULTILINE)[1]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    command += ["--wheel-dir", tmp_path, "-C", "cmake.define.MAMBA_CUDA=OFF"]
    for source in (ROOT, ROOT / "python" / "causal_conv1d"):
        result = subprocess.run([*command, source], capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stdout + result.stderr
    for project in PROJECTS:
        (path,) = tmp_path.glob(f"{project}-*.whl")
        assert path.name == wheel(project).name
        ours, pips = contents(wheel(project)), contents(path)
        assert set(ours) == set(pips)
        # a Windows library and its checksum differ by the time of linking
        same = {n for n in ours if sys.platform != "win32" or not n.endswith((".dll", "/RECORD"))}
        assert [name for name in same if ours[name] != pips[name]] == []
