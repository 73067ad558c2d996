"""Packs wheels: pip's build backend (pyproject.toml) and what CMake's target wheel runs.

scikit-build-core does the work; what it does not know is the platform tag that a finished library deserves.

    python csrc/cmake/mamba_wheel.py STAGE DIST    both wheels; STAGE holds mamba_ssm's files, installed
"""

import base64
import contextlib
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

try:
    from scikit_build_core import build as backend
    from scikit_build_core.build import (  # noqa: F401  the rest of a build backend
        build_editable,
        build_sdist,
        get_requires_for_build_editable,
        get_requires_for_build_sdist,
        get_requires_for_build_wheel,
        prepare_metadata_for_build_editable,
        prepare_metadata_for_build_wheel,
    )
except ImportError:
    sys.exit(
        f"Packing wheels needs scikit-build-core: {sys.executable} -m pip install scikit-build-core"
    )

ROOT = Path(__file__).resolve().parents[2]

# Which glibc came with the distributions that brought each libstdc++ (GLIBCXX_3.4.n).
GLIBC_OF_LIBSTDCXX = {25: 28, 26: 30, 28: 31, 29: 34, 30: 35, 31: 38, 32: 38, 33: 39, 34: 41}


def versions():
    """The one source of versions: {"__version__": ..., "causal_conv1d_version": ...}."""
    text = (ROOT / "python" / "mamba_ssm" / "_version.py").read_text(encoding="utf-8")
    return dict(re.findall(r'^(\w+) = "(.*)"', text, re.MULTILINE))


def dynamic_metadata(settings, project):
    """scikit-build-core's hook for causal_conv1d's pyproject.toml."""
    return {
        "version": versions()["causal_conv1d_version"],
        "dependencies": [f"mamba_ssm=={versions()['__version__']}"],
    }


def platform_tag(libraries):
    """The oldest system that all libraries run on: computed from the symbols that they use."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if any(library.suffix == ".dll" for library in libraries):
        return "win_amd64"  # cross compiled or not
    if not platform.startswith("linux_"):
        return platform
    minor = 17
    for library in libraries:
        report = subprocess.run(
            ["readelf", "--version-info", "--wide", library],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        minor = max([minor, *map(int, re.findall(r"\bGLIBC_2\.(\d+)", report))])
        for n in map(int, re.findall(r"\bGLIBCXX_3\.4\.(\d+)", report)):
            minor = max(
                [minor, *(glibc for newest, glibc in GLIBC_OF_LIBSTDCXX.items() if newest <= n)]
            )
    return platform.replace("linux_", f"manylinux_2_{minor}_")


def pack(tree, dist):
    """Zips a folder with a dist-info, tagged for the libraries in it, into dist. Returns the wheel's path."""
    (info,) = tree.glob("*.dist-info")
    tag = f"py3-none-{platform_tag(sorted((tree / 'mamba_ssm' / 'native').glob('mamba_native_*')))}"
    wheel_file = info / "WHEEL"
    text = re.sub(
        r"^Tag: .*$", f"Tag: {tag}", wheel_file.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    wheel_file.write_text(text, encoding="utf-8", newline="\n")
    (info / "RECORD").unlink(missing_ok=True)

    dist.mkdir(parents=True, exist_ok=True)
    wheel = dist / f"{info.name.removesuffix('.dist-info')}-{tag}.whl"
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    record = f"{info.name}/RECORD"
    lines = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name, data):
            entry = zipfile.ZipInfo(name)  # dated 1980: equal contents give equal wheels
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)

        for path in files:
            name, data = path.relative_to(tree).as_posix(), path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}\n")
            add(name, data)
        add(record, "".join(lines) + f"{record},,\n")
    return wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """pip's hook: scikit-build-core builds and installs, then the wheel gets its tag."""
    with tempfile.TemporaryDirectory() as folder:
        name = backend.build_wheel(folder, config_settings, metadata_directory)
        tree = Path(folder) / "tree"
        with zipfile.ZipFile(Path(folder) / name) as archive:
            archive.extractall(tree)
        return pack(tree, Path(wheel_directory)).name


@contextlib.contextmanager
def inside(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


def main(stage, dist):
    stage, dist = Path(stage).resolve(), Path(dist).resolve()
    with inside(ROOT):
        prepare_metadata_for_build_wheel(str(stage))
        print(pack(stage, dist))
    with inside(ROOT / "python" / "causal_conv1d"):
        print(dist / backend.build_wheel(str(dist)))


if __name__ == "__main__":
    main(*sys.argv[1:])
