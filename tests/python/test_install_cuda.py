"""scripts/install_cuda.py, with a small CUDA of our own in place of NVIDIA's server."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import install_cuda  # noqa: E402

WINDOWS = sys.platform == "win32"
FILES = {
    "cuda_nvcc": ["bin/nvcc.exe" if WINDOWS else "bin/nvcc"],
    "cuda_cudart": [
        "include/cuda_runtime.h",
        "lib/x64/cudart.lib" if WINDOWS else "lib/libcudart.so",
    ],
    "cuda_crt": ["include/crt/host_config.h"],
    "libnvvm": ["nvvm/libdevice/libdevice.10.bc"],
    "cuda_nvrtc": ["include/nvrtc.h"],
}


def archive(path, top, names):
    """What NVIDIA packs: a zip for Windows, a tar for Linux, in both a single folder on top."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(f"{top}/{name}", name)
    else:
        with tarfile.open(path, "w:xz") as file:
            for name in names:
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mode = len(name), 0o755
                file.addfile(entry, io.BytesIO(name.encode()))


def server(folder, version):
    """Fills a folder as NVIDIA's is."""
    major = int(version.split(".")[0])
    parts = {name: list(files) for name, files in FILES.items()}
    parts["cccl" if major >= 13 else "cuda_cccl"] = ["include/nv/target"]
    if major < 13:  # those were nvcc's
        parts["cuda_nvcc"] += parts.pop("cuda_crt") + parts.pop("libnvvm")
    manifest = {"release_date": "today"}
    for name, files in parts.items():
        path = folder / f"{name}.{'zip' if WINDOWS else 'tar.xz'}"
        archive(path, f"{name}-archive", [*files, "LICENSE"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest[name] = {
            install_cuda.PLATFORM: {"relative_path": path.name, "sha256": digest},
            "linux-sbsa": {"relative_path": "other", "sha256": ""},
        }
    (folder / f"redistrib_{version}.json").write_text(json.dumps(manifest))


def edit(folder, version, change):
    path = folder / f"redistrib_{version}.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder.as_uri()


@pytest.mark.parametrize("version", ["12.8.1", "13.0.2"])
def test_parts_become_one_toolkit(tmp_path, monkeypatch, version):
    env, path = tmp_path / "env", tmp_path / "path"
    monkeypatch.setenv("GITHUB_ENV", str(env))
    monkeypatch.setenv("GITHUB_PATH", str(path))
    (tmp_path / "server").mkdir()
    server(tmp_path / "server", version)
    folder = tmp_path / "a b" / "cuda"
    result = subprocess.run(
        [
            *(sys.executable, SCRIPTS / "install_cuda.py", version, "--into", folder),
            *("--source", (tmp_path / "server").as_uri()),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    wanted = [name for part, files in FILES.items() if part != "cuda_nvrtc" for name in files]
    assert all((folder / name).read_text() == name for name in [*wanted, "include/nv/target"])
    assert not (folder / "include" / "nvrtc.h").exists(), "a part that nobody asked for"
    if not WINDOWS:
        assert (folder / "lib64" / "libcudart.so").is_file()
        assert (folder / "bin" / "nvcc").stat().st_mode & 0o100
    short = "V" + "_".join(version.split(".")[:2])
    assert env.read_text().split("\n") == [f"CUDA_PATH={folder}", f"CUDA_PATH_{short}={folder}", ""]
    assert path.read_text() == f"{folder / 'bin'}\n"


def test_a_damaged_archive_stops(tmp_path):
    server(tmp_path, "13.0.2")
    source = edit(
        tmp_path, "13.0.2", lambda m: m["cuda_crt"][install_cuda.PLATFORM].update(sha256="0" * 64)
    )
    with pytest.raises(SystemExit, match="has SHA-256 .* list says 0000"):
        install_cuda.install("13.0.2", tmp_path / "cuda", source)


def test_a_missing_part_is_named(tmp_path):
    server(tmp_path, "13.0.2")
    source = edit(tmp_path, "13.0.2", lambda m: m.pop("libnvvm"))
    with pytest.raises(SystemExit, match="13.0.2 lists no libnvvm .*; it has cccl, cuda_crt"):
        install_cuda.install("13.0.2", tmp_path / "cuda", source)


def test_a_part_that_lost_its_files_is_noticed(tmp_path):
    server(tmp_path, "12.8.1")
    source = edit(tmp_path, "12.8.1", lambda m: m.update(cuda_nvcc=m["cuda_nvrtc"]))
    with pytest.raises(SystemExit, match="lacks bin/nvcc"):
        install_cuda.install("12.8.1", tmp_path / "cuda", source)


def test_an_unknown_version_says_how_versions_look(tmp_path, monkeypatch):
    monkeypatch.setattr(install_cuda.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match=r"redistrib_13.0.json: .*three numbers, as 12.8.1"):
        install_cuda.install("13.0", tmp_path / "cuda", tmp_path.as_uri())
