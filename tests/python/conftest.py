"""What every Python test shares: the package under test, devices, seeds.

The installed package is tested, or with MAMBA_NATIVE_LIBRARY set (or nothing installed) the source tree's.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("MAMBA_NATIVE_LIBRARY") or importlib.util.find_spec("mamba_ssm") is None:
    SOURCES = str(Path(__file__).resolve().parents[2] / "python")
    sys.path.insert(0, SOURCES)
    children = (SOURCES, os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, children))


def _why_not_cuda():
    if not torch.cuda.is_available():
        return "no CUDA device in this machine, or a torch without CUDA"
    from mamba_ssm.native.ops import native_info

    if json.loads(native_info())["cuda"] is None:
        return "the native library was built without CUDA"
    return None


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # else every worker's references would have threads for all cores
        torch.set_num_threads(max(2, torch.get_num_threads() // workers))
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "large: needs 60 GB of its memory; runs with -m large")


def pytest_runtest_setup(item):
    if item.get_closest_marker("large") and "large" not in item.config.option.markexpr:
        pytest.skip("needs 60 GB of GPU memory; -m large runs it")
    if item.get_closest_marker("gpu") and (reason := _why_not_cuda()):
        pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def exact_references():
    """References that run on the GPU keep float32: cuDNN would round it to TF32."""
    with torch.backends.cudnn.flags(enabled=False):
        yield
