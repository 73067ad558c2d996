"""Which packages of our names are installed, and whose files Python finds under them."""

import base64
import hashlib
import importlib.machinery
import importlib.metadata
import re
import sys
from pathlib import Path

NAMES = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda")
SUFFIXES = {".py", ".so", ".pyd", ".dll", ".toml"}
LOCAL = "+native"  # in every version of ours


def modules(path):
    """{name: [{"file", "ours"}]} of every module of NAMES on a search path, in the order in which they count."""
    found = {}
    for name in NAMES:
        places = []
        for entry in dict.fromkeys(path):
            spec = importlib.machinery.PathFinder.find_spec(name, [entry])
            if spec and spec.origin:
                places.append({"file": spec.origin, "ours": _ours(Path(spec.origin))})
        found[name] = places
    return found


def _ours(file):
    """Ours are Python files that use our package; upstream's are compiled, or do not mention it."""
    if file.suffix != ".py":
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return "mamba_ssm._" in text or "from mamba_ssm.native import" in text


def distributions(path):
    """[{"name", "version", "folder", "ours", "missing", "changed"}] of what pip lists under our names."""
    found = []
    for one in importlib.metadata.distributions(path=list(dict.fromkeys(path))):
        name = re.sub(r"[-_.]+", "_", one.metadata["Name"] or "").lower()
        if name not in NAMES:
            continue
        ours = LOCAL in one.version
        files = one.files or [] if ours else []
        facts = {"name": name, "version": one.version, "folder": str(one.locate_file(""))}
        facts["ours"] = ours
        facts["missing"] = [str(file) for file in files if not file.locate().is_file()]
        facts["changed"] = [str(file) for file in files if _changed(file)]
        found.append(facts)
    return found


def _changed(file):
    """Whether a file that pip recorded holds something else now."""
    path = Path(file.locate())
    if path.suffix not in SUFFIXES or file.hash is None or not path.is_file():
        return False
    digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value


def strangers(package):
    """Files in our package's folder that pip did not record with it: of upstream, or of an older version.

    None where nothing is recorded: a source tree.
    """
    package = Path(package)
    for one in importlib.metadata.distributions(path=[str(package.parent)]):
        if re.sub(r"[-_.]+", "_", one.metadata["Name"] or "").lower() == package.name:
            recorded = {Path(file.locate()).resolve() for file in one.files or []}
            if (package / "__init__.py").resolve() in recorded:
                files = (path for path in package.rglob("*") if path.suffix in SUFFIXES)
                return sorted(str(path) for path in files if path.resolve() not in recorded)
    return None


def version(name):
    """The installed version of a distribution, None without one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect(package):
    return {
        "modules": modules(sys.path),
        "distributions": distributions(sys.path),
        "strangers": strangers(package),
        "triton": version("triton") or version("triton-windows"),
    }
