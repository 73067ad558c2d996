"""An exception of native code in Python: its text arrives, a thousand times in a row, and costs no memory.

The operations that fail are those of tests/torch/fail.cpp; scripts/test.py says where they were built.
"""

import os

import pytest
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

TIMES = 1000


@pytest.fixture(scope="module")
def failing():
    library = os.environ.get("MAMBA_TEST_OPS")
    if library is None:
        pytest.skip("MAMBA_TEST_OPS names no build of tests/torch; scripts/test.py sets it")
    torch.ops.load_library(library)
    return torch.ops.mamba_native_test


def fail(operations):
    with pytest.raises(RuntimeError, match=r"found this, \.{2000} expected that"):
        operations.fail(torch.zeros(1))


def fail_in_loop(operations):
    with pytest.raises(RuntimeError, match=r"range \d+"):
        operations.fail_in_loop(torch.zeros(1), 64, 1)


def fail_in_operation(_):
    x = torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match="selective_scan.*delta.*must"):
        selective_scan_fn(x, x[:, :, 1:], torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("call", [fail, fail_in_loop, fail_in_operation], ids=lambda f: f.__name__)
def test_a_thousand_errors_in_a_row(failing, call):
    psutil = pytest.importorskip("psutil")

    def memory_after():
        for _ in range(TIMES):
            call(failing)
        return psutil.Process().memory_info().rss

    sizes = [memory_after() for _ in range(4)]
    growth = [after - before for before, after in zip(sizes, sizes[1:], strict=False)]
    # a leak of one text a time shows in each of the rounds, another thread's buffer in one
    assert min(growth) < TIMES * 256, sizes


def test_loops_on_several_threads_work_after_errors(failing):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(20):
            fail_in_loop(failing)
        u = torch.rand(2, 64, 128)
        A, B, C = -torch.ones(64, 4), torch.ones(64, 4), torch.ones(64, 4)
        expected = selective_scan_fn(u[:1, :8], u[:1, :8], A[:8], B[:8], C[:8])
        torch.testing.assert_close(selective_scan_fn(u, u, A, B, C)[:1, :8], expected)
    finally:
        torch.set_num_threads(threads)
