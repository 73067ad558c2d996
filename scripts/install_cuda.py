"""Installs the parts of a CUDA toolkit that a build here needs: no installer, no administrator.

python scripts/install_cuda.py 13.0.2                 # into build/cuda-13.0.2
python scripts/install_cuda.py 12.8.1 --into D:/cuda  # or wherever

Compiler, runtime and headers are NVIDIA's redistributable archives, for Windows and Linux alike.
Their list, redistrib_VERSION.json, is trusted because HTTPS fetched it from NVIDIA; every archive
must have the SHA-256 that the list gives. In a GitHub workflow the steps that follow find the
toolkit; elsewhere the script prints what to set.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import _bootstrap as bootstrap

SOURCE = "https://developer.download.nvidia.com/compute/cuda/redist"
PLATFORM = "windows-x86_64" if bootstrap.WINDOWS else "linux-x86_64"
# Each by the names that it has had; CUDA 13 moved crt and nvvm out of nvcc.
PARTS = (("cuda_nvcc",), ("cuda_cudart",), ("cccl", "cuda_cccl"))
PARTS_SINCE_13 = (("cuda_crt",), ("libnvvm",))
NEEDED = ("include/cuda_runtime.h", "include/crt/host_config.h", "nvvm/libdevice/libdevice.10.bc")
ATTEMPTS = 3


def fetch(url):
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read()
        except (OSError, urllib.error.URLError) as error:
            missing = isinstance(error, urllib.error.HTTPError) and error.code == 404
            if missing or attempt == ATTEMPTS:
                sys.exit(f"{url}: {error}. CUDA versions have three numbers, as 12.8.1 or 13.0.2.")
            time.sleep(5 * attempt)


def archives(manifest, version):
    """[(relative path, SHA-256)] of every part for this system."""
    major = int(version.split(".")[0])
    found = []
    for names in PARTS + (PARTS_SINCE_13 if major >= 13 else ()):
        part = next((manifest[name] for name in names if name in manifest), {})
        if PLATFORM not in part:
            known = ", ".join(sorted(name for name in manifest if PLATFORM in manifest[name]))
            sys.exit(f"CUDA {version} lists no {' or '.join(names)} for {PLATFORM}; it has {known}")
        found.append((part[PLATFORM]["relative_path"], part[PLATFORM]["sha256"]))
    return found


def unpack(archive, folder):
    """Merges what is below the archive's single top folder into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(scratch)
        else:
            with tarfile.open(archive) as file:
                safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                file.extractall(scratch, **safe)
        (top,) = Path(scratch).iterdir()
        shutil.copytree(top, folder, symlinks=True, dirs_exist_ok=True)


def install(version, folder, source):
    manifest = json.loads(fetch(f"{source}/redistrib_{version}.json"))
    manifest = {name: part for name, part in manifest.items() if isinstance(part, dict)}
    folder.mkdir(parents=True, exist_ok=True)
    for path, wanted in archives(manifest, version):
        print(path, flush=True)
        data = fetch(f"{source}/{path}")
        found = hashlib.sha256(data).hexdigest()
        if found != wanted:
            sys.exit(f"{path} has SHA-256 {found}; NVIDIA's list says {wanted}. Run it again.")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            archive = Path(scratch) / Path(path).name
            archive.write_bytes(data)
            unpack(archive, folder)
    # The archives for Linux say lib; nvcc and CMake look for lib64, as the installer leaves it.
    if not bootstrap.WINDOWS and not (folder / "lib64").exists():
        (folder / "lib64").symlink_to("lib")
    nvcc = "bin/nvcc.exe" if bootstrap.WINDOWS else "bin/nvcc"
    missing = [name for name in (nvcc, *NEEDED) if not (folder / name).is_file()]
    if missing:
        sys.exit(f"{folder} lacks {', '.join(missing)}: NVIDIA packs CUDA {version} differently")


def announce(version, folder):
    """The variables that NVIDIA's installer sets, and nvcc on PATH, for the steps that follow."""
    major, minor = version.split(".")[:2]
    variables = [f"{name}={folder}" for name in ("CUDA_PATH", f"CUDA_PATH_V{major}_{minor}")]
    if os.environ.get("GITHUB_ENV"):
        with open(os.environ["GITHUB_ENV"], "a", encoding="utf-8") as file:
            file.writelines(f"{variable}\n" for variable in variables)
        with open(os.environ["GITHUB_PATH"], "a", encoding="utf-8") as file:
            file.write(f"{folder / 'bin'}\n")
    else:
        print("set", *variables, f"and add to PATH: {folder / 'bin'}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="all three numbers of a CUDA release, as 13.0.2")
    parser.add_argument("--into", type=Path, help="folder (default: build/cuda-VERSION)")
    parser.add_argument("--source", default=SOURCE, help="a mirror of %(default)s")
    options = parser.parse_args()
    folder = (options.into or bootstrap.ROOT / "build" / f"cuda-{options.version}").resolve()
    install(options.version, folder, options.source.rstrip("/"))
    announce(options.version, folder)


if __name__ == "__main__":
    main()
