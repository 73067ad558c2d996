"""Takes files out of wheels on PyPI without installing them: NVIDIA's tools and headers come that way."""

import shutil
import tempfile
import zipfile
from pathlib import Path

import _bootstrap as bootstrap


def unpack(folder, *requirements):
    """Unpacks the wheels into a folder, once: the same requirements again cost nothing."""
    wanted = "\n".join(requirements)
    stamp = folder / "requirements.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as wheels:
        download = [bootstrap.environment_python(), "-m", "pip", "download", "--quiet"]
        download += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        bootstrap.run([*download, "--dest", wheels, *requirements])
        for path in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
    stamp.write_text(wanted, encoding="utf-8")
