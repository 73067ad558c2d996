"""Where the tests find the built wheels: MAMBA_TEST_WHEELS, else dist/."""

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("MAMBA_TEST_WHEELS") or ROOT / "dist")


PLATFORM = "win_amd64" if sys.platform == "win32" else "manylinux_*"


def wheel(project):
    """The newest wheel of a project for this system."""
    tags = "any" if project == "causal_conv1d" else PLATFORM
    found = sorted(FOLDER.glob(f"{project}-*-{tags}.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no {project} wheel in {FOLDER}: build target wheel, as in "
            f"`cmake --build --preset linux-cpu --target wheel`, or set MAMBA_TEST_WHEELS"
        )
    return found[-1]


def native_libraries():
    """[(file name, bytes)] of the libraries in the mamba_ssm wheel."""
    with zipfile.ZipFile(wheel("mamba_ssm")) as archive:
        names = [name for name in archive.namelist() if name.endswith((".so", ".dll"))]
        return [(Path(name).name, archive.read(name)) for name in names]
