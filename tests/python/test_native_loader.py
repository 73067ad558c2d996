"""The loader's choice and its words; importing never fails for a native reason."""

import os
import subprocess
import sys
from pathlib import Path

import mamba_ssm
import pytest
import torch
from mamba_ssm.native import loader

CPU, CU12, CU13 = (Path(f"mamba_native_{kind}") for kind in ("cpu", "cu12", "cu13"))
EVERY = {"cpu": CPU, "cu12": CU12, "cu13": CU13}


@pytest.mark.parametrize(
    "found, cuda_version, expected",
    [
        (EVERY, "13.0", CU13),
        (EVERY, "12.8", CU12),
        (EVERY, None, CPU),
        ({"cu12": CU12, "cu13": CU13}, None, CU13),
        ({"cu12": CU12}, None, CU12),
        ({"cpu": CPU}, "13.0", CPU),
        ({"cpu": CPU, "cu12": CU12}, "13.0", CPU),
        ({"cu12": CU12}, "13.0", None),
        ({"cu13": CU13}, "12.6", None),
        (EVERY, "14.0", CPU),
        ({}, None, None),
        ({}, "13.0", None),
    ],
)
def test_choice(found, cuda_version, expected):
    if expected is not None:
        assert loader.choose(found, "2.11.0+cu130", cuda_version) == expected
        return
    with pytest.raises(loader.NativeError) as error:
        loader.choose(found, "2.11.0+cu130", cuda_version)
    for word in ("Found", "Expected", "To do", "2.11.0", *found):
        assert word in str(error.value)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_an_old_torch_gets_one_sentence(version):
    with pytest.raises(loader.NativeError, match=r"torch 2\.10 or newer.*pip install --upgrade"):
        loader.choose(EVERY, version, None)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git123", "2.14.1+cpu", "3.0.0"])
def test_a_new_torch_is_accepted(version):
    assert loader.choose(EVERY, version, None) == CPU


def test_libraries_are_found_by_name(tmp_path):
    suffix = ".dll" if sys.platform == "win32" else ".so"
    for name in (
        f"mamba_native_cu13{suffix}",
        f"libmamba_native_cpu{suffix}",
        "mamba_native_cpu.txt",
    ):
        (tmp_path / name).touch()
    assert loader.libraries(tmp_path) == {"cu13": tmp_path / f"mamba_native_cu13{suffix}"}


def _python(code, **environment):
    paths = [str(Path(mamba_ssm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_importing_the_package_imports_no_torch():
    result = _python(
        "import sys, mamba_ssm, mamba_ssm.native.loader; print('torch' in sys.modules, mamba_ssm.__version__)"
    )
    assert result.stdout.split() == ["False", mamba_ssm.__version__], result.stderr


@pytest.mark.parametrize("content", [None, "no library"], ids=["missing", "broken"])
def test_without_a_library_the_first_use_says_why(tmp_path, content):
    path = tmp_path / "library.so"
    if content is not None:
        path.write_text(content)
    code = """
import torch
import mamba_ssm, causal_conv1d
from mamba_ssm import Mamba, MambaLMHeadModel, selective_scan_fn
model = Mamba(8)
for use in (lambda: model(torch.zeros(1, 2, 8)), lambda: causal_conv1d.causal_conv1d_fn(
        torch.zeros(1, 2, 3), torch.zeros(2, 4))):
    try:
        use()
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
    result = _python(code, MAMBA_NATIVE_LIBRARY=str(path))
    lines = result.stdout.splitlines()
    text = " ".join(lines)
    assert result.returncode == 0, result.stderr
    assert text.count("NativeError") == 2
    for word in ("Found", "Expected", "To do", str(path), torch.__version__):
        assert text.count(word) >= 2, text


def test_a_missing_name_is_an_import_error_that_names_it():
    with pytest.raises(ImportError, match="Mamba17"):
        from mamba_ssm import Mamba17  # noqa: F401
    with pytest.raises(AttributeError, match="Mamba17"):
        mamba_ssm.Mamba17  # noqa: B018


@pytest.mark.parametrize(
    "name", ["Mamba", "MambaLMHeadModel", "selective_scan_fn", "selective_state_update"]
)
def test_top_level_names(name):
    assert callable(getattr(mamba_ssm, name)) and name in dir(mamba_ssm)


def test_submodules_are_reachable_by_attribute():
    code = """
import mamba_ssm
module = mamba_ssm.ops.triton.selective_state_update
print(type(module).__name__, callable(module.selective_state_update), mamba_ssm.ops.selective_scan_fn.__name__)
"""
    assert _python(code).stdout.split() == ["module", "True", "selective_scan_fn"]


def test_the_library_is_loaded_once():
    assert loader.load() == loader.load()
    assert all(hasattr(torch.ops.mamba_native, name) for name in loader.OPERATIONS)


CALLS = {
    "causal_conv1d_varlen_states": (torch.zeros(3, 2), torch.tensor([0, 3]), 2),
    "ssd_forward": (
        *(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2), torch.zeros(2)),
        *(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), None, None, None, None),
        *(True, 0.0, 1.0, None, 0, False, False),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_cuda_tensors_without_cuda_kernels_get_our_words(name):
    from mamba_ssm.native import ops

    operation = getattr(ops, name)
    if not loader.refuses_cuda(name):
        pytest.skip("this library has CUDA kernels")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    expected = f"no CUDA kernels for {name}.*Found.*Expected.*To do.*CPU"
    with pytest.raises(loader.NativeError, match=expected):
        operation.redispatch(keys, *CALLS[name])
