"""Runs one layer of `verify` on devices and compares it with its oracle."""

import copy
import time
from contextlib import contextmanager

import torch

from mamba_ssm.cli import formulas

# Largest deviation over the largest value, in float32. Rounding alone gives 5e-7 forward and 2e-6
# backward; a wrong term gives 1e-2.
ALLOWED = {"forward": 1e-5, "backward": 5e-5, "step": 1e-5}
CALLS = 3  # the first also loads kernels; the shortest time counts


def rows(check, layer, devices):
    """Yields a dict for each device and part: the columns of the table, or `message` for what went wrong."""
    torch.manual_seed(0)
    model = layer(**check.arguments)
    hidden, cotangent = torch.randn(check.shape), torch.randn(check.shape)
    truths = oracle(check, model, hidden, cotangent)
    with exact_products():
        for device in devices:
            for part in check.parts:
                row = {
                    "device": device,
                    "layer": check.name,
                    "shape": check.shape,
                    "part": part,
                    "oracle": check.oracle,
                }
                try:
                    here = [copy.deepcopy(model).to(device)]
                    here += [tensor.to(device) for tensor in (hidden, cotangent)]
                    calls = [PARTS[part](*here) for _ in range(CALLS)]
                except RuntimeError as error:
                    yield row | {"passed": False, "message": str(error)}
                    continue
                row["seconds"] = min(seconds for _, seconds in calls)
                results, _ = calls[-1]
                row["error"] = max(map(deviation, results, truths[part]))
                row["allowed"] = ALLOWED[part]
                yield row | {"passed": row["error"] <= row["allowed"]}


def oracle(check, model, hidden, cotangent):
    """{part: tensors in float64} on the CPU."""
    model, hidden = copy.deepcopy(model).double(), hidden.double().requires_grad_()
    with one_thread():
        out = formulas.of_mamba(model, hidden) if check.oracle == "formula" else model(hidden)
        gradients = torch.autograd.grad(out, leaves(model, hidden), cotangent.double())
    return {"forward": [out.detach()], "backward": gradients, "step": [out.detach()]}


@contextmanager
def one_thread():
    """For many small operations, to which more threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def leaves(model, hidden):
    return [hidden, *model.parameters()]


def deviation(result, truth):
    """The largest one over the largest value; infinite for another shape or a NaN."""
    if result.shape != truth.shape:
        return float("inf")
    worst = (result.detach().cpu().double() - truth).abs().max()
    return (worst / truth.abs().max()).nan_to_num(nan=float("inf")).item()


@contextmanager
def exact_products():
    """The layers' projections are torch's; TF32, which some containers turn on, would hide our errors."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def timed(function, device):
    """(result, seconds) of a call."""

    def finish():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    started = time.perf_counter()
    result = function()
    finish()
    return result, time.perf_counter() - started


def forward(model, hidden, cotangent):
    out, seconds = timed(lambda: model(hidden), hidden.device)
    return [out], seconds


def backward(model, hidden, cotangent):
    hidden.requires_grad_()
    wanted = leaves(model, hidden)
    out = model(hidden)
    return timed(lambda: torch.autograd.grad(out, wanted, cotangent), hidden.device)


@torch.no_grad()
def step(model, hidden, cotangent):
    """The whole sequence token by token; the seconds are one token's."""
    batch, length, _ = hidden.shape
    states = model.allocate_inference_cache(batch, length)

    def decode():
        return [model.step(hidden[:, t : t + 1], *states)[0] for t in range(length)]

    with one_thread():
        outs, seconds = timed(decode, hidden.device)
    return [torch.cat(outs, dim=1)], seconds / length


PARTS = {"forward": forward, "backward": backward, "step": step}
