"""Builds the inputs of a `bench` case and times the native operation and the PyTorch formula."""

import statistics
import time
from functools import partial

import torch

from mamba_ssm.cli.bench_cases import CONV_WIDTH, SSD_CHUNK, Machine
from mamba_ssm.native import ops
from mamba_ssm.native.selective_scan import as_parts
from mamba_ssm.ops import causal_conv1d as conv
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import rms_norm_ref
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref as gated_rms_norm_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
)

REPEATS = 20  # timings whose median counts
CPU_SECONDS = 2.0  # a CPU case stops at MINIMUM_REPEATS when it has taken that long
MINIMUM_REPEATS = 5
REFERENCE_REPEATS = 3
LAYER_SECONDS = 4.0
GRAPH_LAUNCHES = 20  # of a small operation in one CUDA graph


class _Random:
    """Inputs of realistic sizes: zeros run faster, and large steps would hide the state."""

    def __init__(self, case, device):
        self.case = case
        self.device = device
        self.dtype = getattr(torch, case.dtype)
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape, dtype=None):
        values = torch.randn(shape, device=self.device, generator=self.generator)
        return values.to(dtype or self.dtype)

    def step_size(self, *shape):
        """softplus of it is the step: -4 to -2."""
        values = torch.rand(shape, device=self.device, generator=self.generator)
        return (values * 2 - 4).to(self.dtype)

    def scan(self):
        c = self.case
        B, D, L, N = c.batch, c.dim, c.length, c.states
        A = -torch.arange(1, N + 1, dtype=torch.float32, device=self.device).repeat(D, 1)
        pairs = 1
        if c.layout == "complex":
            A, pairs = torch.complex(A, -A), 2
        return {
            "u": self.normal(B, D, L),
            "delta": self.step_size(B, D, L),
            "A": A,
            "B": self.normal(B, 1, N, pairs * L),
            "C": self.normal(B, 1, N, pairs * L),
            "D": self.normal(D, dtype=torch.float32),
            "z": self.normal(B, D, L),
            "delta_bias": self.normal(D, dtype=torch.float32) * 0.1,
        }

    def heads(self):
        """Of a row of A, D and dt_bias for each head."""
        count = self.case.dim // self.case.headdim
        return {
            "A": -torch.linspace(1, 16, count, device=self.device),
            "D": self.normal(count, dtype=torch.float32),
            "dt_bias": self.normal(count, dtype=torch.float32) * 0.1,
        }

    def chunked_scan(self):
        c = self.case
        steps, parameters = (c.batch, c.length), self.heads()
        return {
            "x": self.normal(*steps, len(parameters["A"]), c.headdim),
            "dt": self.step_size(*steps, len(parameters["A"])),
            "A": parameters["A"],
            "B": self.normal(*steps, 1, c.states),
            "C": self.normal(*steps, 1, c.states),
            "D": parameters["D"],
            "dt_bias": parameters["dt_bias"],
        }

    def split(self):
        """What a layer has between its two projections."""
        c, parameters = self.case, self.heads()
        channels = c.dim + 2 * c.states
        steps = (c.batch, c.length)
        activations = [
            self.normal(*steps, c.dim + channels),
            self.step_size(*steps, len(parameters["A"])),
        ]
        return {
            "zxbcdt": torch.cat(activations, dim=-1),
            "conv1d_weight": self.normal(channels, CONV_WIDTH),
            "conv1d_bias": self.normal(channels),
            **parameters,
            "rmsnorm_weight": self.normal(c.dim),
        }

    def sequence(self):
        """(B, D, L) in the case's layout."""
        c = self.case
        if c.layout == "bld":
            return self.normal(c.batch, c.length, c.dim).transpose(1, 2)
        return self.normal(c.batch, c.dim, c.length)

    def filter(self):
        return {
            "weight": self.normal(self.case.dim, CONV_WIDTH),
            "bias": self.normal(self.case.dim),
        }


def native_call(case, device):
    """A function without arguments that runs the operation on inputs of its own."""
    random = _Random(case, device)
    if case.op == "selective_scan":
        u, delta, A, B, C, *rest = random.scan().values()
        inputs = (u, delta, *as_parts(A, B, C)[:3], *rest, None)
        if case.direction == "fwd":
            return lambda: ops.selective_scan_forward(*inputs, True)
        checkpoints = ops.selective_scan_forward(*inputs, True)[2]
        dout = torch.randn_like(inputs[0])
        return lambda: ops.selective_scan_backward(dout, None, *inputs, checkpoints, True)
    if case.op == "causal_conv1d":
        x, taps = random.sequence(), random.filter().values()
        if case.direction == "fwd":
            return lambda: ops.causal_conv1d_forward(x, *taps, None, None, False, True)
        dout = random.sequence()
        return lambda: ops.causal_conv1d_backward(dout, None, x, *taps, None, None, True)
    if case.op == "causal_conv1d_update":
        x = random.normal(case.batch, case.dim, 1)
        state = random.normal(case.batch, case.dim, CONV_WIDTH)
        taps = random.filter().values()
        return lambda: ops.causal_conv1d_update(x, state, *taps, True, None, None)
    if case.op == "ssd":
        *inputs, bias = random.chunked_scan().values()
        options = (True, 0.0, float("inf"), None, 0, False)
        inputs = (*inputs, None, bias, None)
        if case.direction == "fwd":
            return lambda: ops.ssd_forward(*inputs, *options, False)
        checkpoints = ops.ssd_forward(*inputs, *options, True)[2]
        dout = torch.randn_like(inputs[0])
        return lambda: ops.ssd_backward(dout, None, *inputs, checkpoints, *options, False)
    if case.op == "split_conv":
        return _split_call(mamba_split_conv1d_scan_combined, case, random)
    if case.op == "state_update":
        if case.headdim:
            inputs = _headed_update_inputs(case, random)
        else:
            inputs = [t.unsqueeze(1) if t is not None else t for t in _update_inputs(case, random)]
            state, x, dt, A, B, C, D, z, bias = inputs
            A, D, bias = A.transpose(0, 1), D.transpose(0, 1), bias.transpose(0, 1)
            inputs = (state, x, dt, A, B, C, D, z, bias)
        options = (True, False, -float("inf"), float("inf"), None)
        return lambda: ops.selective_state_update(*inputs, *options)
    x, weight = random.normal(case.length, case.dim), random.normal(case.dim, dtype=torch.float32)
    if case.op == "gated_norm":
        z, options = random.normal(case.length, case.dim), (case.dim, False, True)
        if case.direction == "fwd":
            return lambda: ops.gated_norm_forward(x, weight, None, z, 1e-5, *options)
        _, mean, rstd = ops.gated_norm_forward(x, weight, None, z, 1e-5, *options)
        dy = torch.randn_like(x)
        saved = (x, weight, None, z, mean, rstd)
        return lambda: ops.gated_norm_backward(dy, *saved, *options, False)
    residual = random.normal(case.length, case.dim, dtype=torch.float32)
    if case.direction == "fwd":
        return lambda: ops.layer_norm_forward(x, weight, None, residual, 1e-5, True, True)
    _, h, mean, rstd = ops.layer_norm_forward(x, weight, None, residual, 1e-5, True, True)
    dy, dh = torch.randn_like(x), torch.randn_like(h)
    return lambda: ops.layer_norm_backward(dy, dh, h, weight, None, mean, rstd, x.dtype, True)


def _update_inputs(case, random):
    """state (B, D, N), x, dt (B, D), A (D, N), B, C (B, N), D (D), z (B, D), dt_bias (D)."""
    scan = random.scan()
    state = random.normal(case.batch, case.dim, case.states)
    u, dt, z = (scan[name].squeeze(-1) for name in ("u", "delta", "z"))
    B, C = (scan[name][:, 0, :, 0] for name in ("B", "C"))
    return state, u, dt, scan["A"], B, C, scan["D"], z, scan["delta_bias"]


def _headed_update_inputs(case, random):
    """As a Mamba-2 layer gives them: A, dt, D and dt_bias of a head spread over its channels."""
    scan, heads = random.chunked_scan(), (case.dim // case.headdim, case.headdim)
    state = random.normal(case.batch, *heads, case.states)
    x, dt, B, C = (scan[name].squeeze(1) for name in ("x", "dt", "B", "C"))
    A = scan["A"][:, None, None].expand(*heads, case.states)
    D, bias = (scan[name][:, None].expand(heads) for name in ("D", "dt_bias"))
    dt = dt.unsqueeze(-1).expand(x.shape)
    return state, x, dt, A, B, C, D, torch.randn_like(x), bias


def _split_call(function, case, random):
    inputs = random.split()
    options = {"headdim": case.headdim, "chunk_size": SSD_CHUNK, "norm_before_gate": False}
    if case.direction == "fwd":
        return lambda: function(**inputs, **options)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    dout = random.normal(case.batch, case.length, case.dim)

    def train():
        with torch.enable_grad():
            return torch.autograd.grad(function(**leaves, **options), [*leaves.values()], dout)

    return train


def reference_call(case, device):
    """The same in plain PyTorch; a backward case runs autograd over the formula's graph, that of split_conv both."""
    random = _Random(case, device)
    if case.op == "selective_scan":
        inputs = random.scan()
        inputs["B"], inputs["C"] = inputs["B"].squeeze(1), inputs["C"].squeeze(1)
        formula = partial(selective_scan_ref, delta_softplus=True)
    elif case.op == "causal_conv1d":
        inputs = {"x": random.sequence(), **random.filter()}
        formula = partial(conv.causal_conv1d_ref, activation="silu")
    elif case.op == "causal_conv1d_update":
        inputs = {
            "x": random.normal(case.batch, case.dim),
            "conv_state": random.normal(case.batch, case.dim, CONV_WIDTH),
            **random.filter(),
        }
        formula = partial(conv.causal_conv1d_update_ref, activation="silu")
    elif case.op == "ssd":
        inputs = random.chunked_scan()
        formula = partial(mamba_chunk_scan, chunk_size=SSD_CHUNK, dt_softplus=True)
    elif case.op == "split_conv":
        return _split_call(mamba_split_conv1d_scan_ref, case, random)
    elif case.op == "state_update":
        inputs = (_headed_update_inputs if case.headdim else _update_inputs)(case, random)
        return lambda: selective_state_update_ref(*inputs, dt_softplus=True)
    elif case.op == "gated_norm":
        inputs = {
            "x": random.normal(case.length, case.dim),
            "weight": random.normal(case.dim, dtype=torch.float32),
            "z": random.normal(case.length, case.dim),
        }
        formula = partial(gated_rms_norm_ref, bias=None, norm_before_gate=False)
    else:
        inputs = {
            "x": random.normal(case.length, case.dim),
            "weight": random.normal(case.dim, dtype=torch.float32),
            "residual": random.normal(case.length, case.dim, dtype=torch.float32),
        }
        formula = partial(rms_norm_ref, bias=None, upcast=True)
    if case.direction == "fwd":
        return lambda: formula(**inputs)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = formula(**inputs)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, list(inputs.values()), dout, retain_graph=True)


def _clock(call):
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def time_cpu(call, repeats=REPEATS):
    """Median seconds; the inputs stay in whatever cache holds them."""
    call()
    times = []
    started = time.perf_counter()
    while len(times) < repeats:
        times.append(_clock(call))
        if len(times) >= MINIMUM_REPEATS and time.perf_counter() - started > CPU_SECONDS:
            break
    return statistics.median(times)


def _time_events(call, repeats):
    """Median seconds on the current stream."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def time_cuda(make_call, bytes_moved):
    """Median seconds of one call, replayed from a CUDA graph so that launching costs nothing.

    The graph goes round calls whose inputs together exceed twice the L2 cache: each finds it cold.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size
    sets = min(64, max(1, -(-2 * cache // int(bytes_moved))))
    calls = [make_call() for _ in range(sets)]
    launches = calls * max(1, GRAPH_LAUNCHES // sets) if sets > 1 else calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3] * 3:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in launches:
            call()
    for _ in range(3):
        graph.replay()
    return _time_events(graph.replay, REPEATS) / len(launches)


def time_native(case, device, bytes_moved):
    with torch.no_grad():
        if torch.device(device).type == "cpu":
            return time_cpu(native_call(case, device))
        return time_cuda(lambda: native_call(case, device), bytes_moved)


def time_reference(case, device):
    """As a program would run it: launched from Python."""
    with torch.set_grad_enabled(case.direction == "bwd"):
        call = reference_call(case, device)
        if torch.device(device).type == "cpu":
            return time_cpu(call, REFERENCE_REPEATS)
        call()
        return _time_events(call, REFERENCE_REPEATS)


def time_layer(call, device):
    """Shortest seconds of a layer launched from Python, of as many calls as fit into LAYER_SECONDS after a first."""

    def finished():
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    repeats = min(REPEATS, max(1, int(LAYER_SECONDS / _clock(finished))))
    return min(_clock(finished) for _ in range(repeats))


def machine(device):
    """Peak rates: measured here on a CPU, known for the H200, else what the GPU says of itself."""
    if torch.device(device).type == "cpu":
        return _measure_cpu()
    properties = torch.cuda.get_device_properties(device)
    if "H200" in properties.name:
        return Machine(properties.name, 4.3e12, 4.18e12, 33.45e12, "measured on an H200")
    clock = getattr(properties, "clock_rate", None)  # kHz; only newer torch tells
    memory_clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    if not (clock and memory_clock and width):
        return Machine(properties.name, None, None, None, "this torch does not tell clocks")
    # Every SM since Turing starts 128 lanes of instructions and 16 exps a clock; memory is DDR.
    cycles = properties.multi_processor_count * clock * 1e3
    bandwidth = memory_clock * 1e3 * 2 * width / 8
    return Machine(
        properties.name, bandwidth, 16 * cycles, 128 * cycles, "clocks and widths it reports"
    )


def _measure_cpu():
    """A copy for the bandwidth; a matrix product for vector arithmetic, one multiply-add a lane."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copy = time_cpu(lambda: target.copy_(source))
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = time_cpu(lambda: torch.mm(a, b))
    return Machine(
        f"CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}",
        2 * source.numel() * 4 / copy,
        None,
        size**3 / product,
        "measured here: copy and matrix product",
    )
