"""Where Windows users keep things: long paths with spaces and umlauts, folders that they may not write to,
user names beyond ASCII, consoles with a code page of the last century."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import mamba_ssm
import pytest
from mamba_ssm.native import loader

NAME = "J\u00fcrgen Gro\u00dfmann"
LONGEST = 250  # Windows stops at 259 unless somebody edited the registry
OPERATION = """
import torch
from mamba_ssm.native import loader
from mamba_ssm import selective_scan_fn
x = torch.ones(1, 2, 3)
print(ascii([str(loader.load()), selective_scan_fn(x, x, *torch.ones(3, 2, 1)).tolist()]))
"""
TINY = ["--steps", "3", "--d-model", "8", "--layers", "1", "--length", "16", "--batch", "2"]


def python(*arguments, site=None, cwd=None, **environment):
    """Runs a Python that finds the package in `site`; returns the finished process, its output as bytes."""
    site = site or Path(mamba_ssm.__file__).parents[1]
    ours = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env = os.environ | ours | environment
    return subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site-packages with the package and its library, at a path of LONGEST characters."""
    library = loader.load()
    package = Path(mamba_ssm.__file__).parent
    inside = len(f"{os.sep}mamba_ssm{os.sep}native{os.sep}{library.name}")
    folder = tmp_path_factory.mktemp("s") / NAME
    folder = folder / "x".ljust(LONGEST - inside - len(str(folder)) - 1, "y")
    copy = folder / "mamba_ssm"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "mamba_native_*"))
    shutil.copy(library, copy / "native")
    assert len(str(copy / "native" / library.name)) == LONGEST
    return folder


def outcome(result):
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    return result.stdout.decode("ascii")


def test_long_path_with_spaces_and_umlauts(site):
    loaded, out = eval(outcome(python("-c", OPERATION, site=site, MAMBA_NATIVE_LIBRARY="")))
    assert Path(loaded).parents[2] == site
    assert len(out[0]) == 2


def test_site_packages_that_are_read_only(site):
    everything = [site, *site.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in everything}
    modes = {path: path.stat().st_mode for path in everything}
    for path in everything:
        path.chmod(modes[path] & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        outcome(python("-c", OPERATION, site=site, MAMBA_NATIVE_LIBRARY=""))
        outcome(python("-m", "mamba_ssm", "--help", site=site))
        # an administrator may write all the same, so look
        assert {path: path.stat().st_mtime_ns for path in [site, *site.rglob("*")]} == before
    finally:
        for path in everything:
            path.chmod(modes[path])


def test_user_name_beyond_ascii(tmp_path):
    """Home, caches and temporary files below it, a text and results there, no UTF-8 mode."""
    home = tmp_path / NAME
    home.mkdir()
    places = ("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP", "TMPDIR")
    environment = {name: str(home) for name in places}
    text, out = home / "\u00dcbung.txt", home / "L\u00e4ufe"
    text.write_text(
        "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor \u00fcber den Sylter Deich. " * 400, "utf-8"
    )
    command = ["-m", "mamba_ssm", "demo", *TINY, "--text", str(text), "--out", str(out)]
    result = python(*command, cwd=home, PYTHONUTF8="0", **environment)
    assert result.returncode in (0, 1), result.stderr.decode(errors="replace")  # 1: Mamba lost
    json.loads((out / "result.json").read_text("utf-8"))
    assert (out / "sample.txt").read_bytes().decode("utf-8")


@pytest.mark.parametrize("page", ["cp1252", "cp932"])
@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["demo", *TINY]], ids=" ".join)
def test_output_redirected_under_a_legacy_code_page(tmp_path, command, page):
    if command[-1] != "--help":
        command = [*command, "--out", str(tmp_path / NAME)]
    result = python("-m", "mamba_ssm", *command, PYTHONUTF8="0", PYTHONIOENCODING=page)
    assert result.returncode in (0, 1), result.stderr.decode(page, errors="replace")
    assert result.stdout.decode(page)


def test_a_checkout_with_windows_line_ends_is_the_same(tmp_path):
    """.gitattributes keeps LF whatever core.autocrlf says: formatters, hashes and wheels see one text."""
    root = Path(__file__).resolve().parents[2]
    if not shutil.which("git") or not (root / ".git").exists():
        pytest.skip("no git checkout")
    clone = ["git", "clone", "--quiet", "--depth", "1", "-c", "core.autocrlf=true"]
    subprocess.run([*clone, root.as_uri(), tmp_path / "clone"], check=True)
    files = [path for path in (tmp_path / "clone").rglob("*") if path.is_file()]
    ours = [path for path in files if ".git" not in path.parts and path.suffix != ".bat"]
    assert len(ours) > 100
    assert not [path for path in ours if b"\r\n" in path.read_bytes()]
