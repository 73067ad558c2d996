"""What `bench` measures: shapes, the least work each needs, and upstream's times. No torch here."""

from dataclasses import dataclass, replace

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CONV_WIDTH = 4
CHECKPOINT_INTERVAL = 256  # steps between the states that a scan stores for its backward
SSD_CHUNK = 64  # steps whose products with each other a GPU's tensor cores compute

# Vector instructions of one exp on a CPU: range reduction, polynomial, scaling. GPUs have a unit.
CPU_EXP_SLOTS = 10


@dataclass(frozen=True)
class Case:
    op: str  # one of bench.OPERATIONS
    direction: str  # fwd, bwd
    dtype: str
    batch: int
    dim: int  # channels; of a norm, features
    length: int = 1  # time steps; of a norm, rows
    states: int = 0  # of the scan and the state update
    # Of the convolution: bdl (time contiguous) or bld (channels contiguous); of a scan: complex A.
    layout: str = ""
    headdim: int = 0  # channels of a head, of Mamba-2's operations, which have one group

    @property
    def name(self):
        channels = f"H{self.dim // self.headdim}P{self.headdim}" if self.headdim else f"D{self.dim}"
        sizes = f"B{self.batch}{channels}"
        sizes += f"L{self.length}" if self.length > 1 else ""
        sizes += f"N{self.states}" if self.states else ""
        return "/".join(filter(None, (self.op, self.dtype, self.layout, sizes, self.direction)))

    def for_reference(self):
        """The largest part of this case for which plain PyTorch is worth waiting for.

        The graph of a scan's formula holds several states of every step.
        """
        if self.op not in ("selective_scan", "ssd", "split_conv"):
            return self
        return replace(self, batch=1, dim=min(self.dim, 1536), length=min(self.length, 2048))


@dataclass(frozen=True)
class Machine:
    """Peak rates per second; None where they are not known."""

    name: str
    bandwidth: float | None  # bytes to and from memory
    exps: (
        float | None
    )  # of the special-function unit; None on CPUs, which compute exp by instructions
    slots: float | None  # instructions times lanes
    source: str


def work(case):
    """(bytes, exps, arithmetic, slots) that the operation cannot do without.

    bytes: every tensor read and written once. exps: exp, log and reciprocal. arithmetic: additions
    and multiply-adds. slots: all instructions of a GPU's inner loop and its per-element part, exps
    included.
    """
    elements = case.batch * case.dim * case.length
    return tuple(elements * amount for amount in _work_per_element(case))


def _work_per_element(case):
    s, N, W = BYTES[case.dtype], case.states, CONV_WIDTH
    backward = case.direction == "bwd"
    if case.op == "selective_scan":
        # Forward: u, delta, z in, out out, and a state every CHECKPOINT_INTERVAL steps. Backward:
        # u, delta, z, dout and the states in; du, ddelta, dz out. softplus and silu are 4 exps
        # forward and 8 backward.
        states = 4 * N / CHECKPOINT_INTERVAL
        if case.layout == "complex":  # two floats a state; exp, sine and cosine
            if backward:
                return 7 * s + 2 * states, 3 * N + 8, 32 * N, 35 * N + 80
            return 4 * s + 2 * states, 3 * N + 4, 12 * N, 15 * N + 40
        if backward:
            return 7 * s + states, N + 8, 14 * N, 15 * N + 80
        return 4 * s + states, N + 4, 4 * N, 5.5 * N + 40
    if case.op == "causal_conv1d":  # x in, out out; backward x and dout in, dx out
        return (3 * s, 2, 3 * W, 3 * W) if backward else (2 * s, 2, W, W)
    if case.op == "causal_conv1d_update":  # W - 1 inputs of the past in and out, x in, out out
        return 2 * W * s, 2, W, W
    if case.op in ("ssd", "split_conv"):
        return _work_of_heads(case)
    if case.op == "state_update" and case.headdim:  # the state in and out; A and dt are a head's
        return 2 * N * s, 2 + 3 / case.headdim, 3 * N, 3 * N + 40
    if case.op == "state_update":  # the state in and out
        return 2 * N * s, N + 4, 4 * N, 5.5 * N + 40
    if case.op == "gated_norm":  # x, z in, y out; backward dy, x, z in, dx, dz out
        return (5 * s, 2, 16, 18) if backward else (3 * s, 2, 7, 9)
    # layer_norm with a float32 residual: x and residual in, y and residual out; backward dy, the
    # sum and the residual's gradient in, dx and the residual's gradient out.
    return 2 * s + (12 if backward else 8), 0, 4, 4


def _work_of_heads(case):
    """The chunked scan of Mamba-2, without z; and with the convolution before it and the gated norm behind it.

    Products are the tensor cores' on a GPU; its slots are those of the decays between the steps of a chunk.
    """
    s, N, P = BYTES[case.dtype], case.states, case.headdim
    shared = s / P + 2 * s * N / case.dim  # dt of a head; B and C of all heads
    scan_exps, scan_slots = 3 / P, 8 * SSD_CHUNK / 2 / P  # softplus and decay of a head
    backward = case.direction == "bwd"
    if case.op == "ssd":  # x in, out out; backward x, dout and the states in, dx out
        if backward:
            moved = 3 * s + 2 * shared + 4 * N / CHECKPOINT_INTERVAL
            return moved, scan_exps, 5 * N, 2 * scan_slots
        return 2 * s + shared, scan_exps, 2 * N, scan_slots
    # x and z in, out out, silu of the convolution and of z. A training step, whose backward runs
    # the forward again: x, z and dout in, dx and dz out.
    channels = 1 + 2 * N / case.dim  # of the convolution, for each of the scan's
    exps, arithmetic = scan_exps + 2 * channels + 2, 2 * N + CONV_WIDTH * channels + 8
    if backward:
        return 8 * s + 3 * shared, 3 * exps, 3 * arithmetic + 5 * N, 4 * scan_slots
    return 3 * s + shared, exps, arithmetic, scan_slots


def floor(case, machine):
    """(seconds, name of the term that binds), or None if the machine's rates are not known."""
    moved, exps, arithmetic, slots = work(case)
    if machine.bandwidth is None or machine.slots is None:
        return None
    terms = {"memory": moved / machine.bandwidth}
    if machine.exps is None:
        terms["arithmetic"] = (arithmetic + CPU_EXP_SLOTS * exps) / machine.slots
    else:
        terms["exp"] = exps / machine.exps
        terms["issue"] = slots / machine.slots
    binding = max(terms, key=terms.get)
    return terms[binding], binding


def gpu_cases(dtypes):
    """The shapes of UPSTREAM, in its order, and a scan with complex A."""
    scans = (
        (1, 1536, 2048, 16),
        (8, 1536, 2048, 16),
        (1, 5120, 2048, 16),
        (8, 5120, 2048, 16),
        (1, 5120, 8192, 16),
        (1, 5120, 65536, 16),
        (64, 1536, 512, 16),
        (1, 1536, 2048, 64),
    )
    convolutions = ((1, 1536, 2048), (8, 1536, 2048), (8, 5120, 2048), (1, 5120, 8192))
    # A layer of mamba2-130m and of mamba2-2.7b.
    chunked = ((1, 1536, 2048), (1, 5120, 2048), (8, 5120, 2048), (1, 5120, 32768))
    both = ("fwd", "bwd")
    cases = []
    for dtype in dtypes:
        cases += [Case("selective_scan", d, dtype, *sizes) for sizes in scans for d in both]
        cases += [Case("selective_scan", d, dtype, *scans[1], layout="complex") for d in both]
        for sizes in convolutions:
            for layout in ("bdl", "bld"):
                cases += [Case("causal_conv1d", d, dtype, *sizes, layout=layout) for d in both]
        cases.append(Case("causal_conv1d_update", "fwd", dtype, 1, 5120))
        cases.append(Case("state_update", "fwd", dtype, 1, 5120, states=16))
        cases += [
            Case("state_update", "fwd", dtype, batch, 5120, states=128, headdim=64)
            for batch in (16, 64, 256)
        ]
        for op, shapes in (("ssd", chunked), ("split_conv", chunked[::2])):
            cases += [Case(op, d, dtype, *sizes, 128, headdim=64) for sizes in shapes for d in both]
        cases += [Case("layer_norm", d, dtype, 1, 2560, 16384) for d in both]
        cases += [Case("gated_norm", d, dtype, 1, 5120, 16384) for d in both]
    return cases


def cpu_cases(dtypes):
    """One layer of mamba-130m and one of mamba2-130m on one core."""
    both = ("fwd", "bwd")
    cases = []
    for dtype in dtypes:
        for length in (512, 2048):
            cases += [Case("selective_scan", d, dtype, 1, 1536, length, 16) for d in both]
        cases += [Case("selective_scan", d, dtype, 1, 1536, 512, 16, "complex") for d in both]
        for layout in ("bdl", "bld"):
            cases += [Case("causal_conv1d", d, dtype, 1, 1536, 2048, layout=layout) for d in both]
        cases.append(Case("causal_conv1d_update", "fwd", dtype, 1, 1536))
        cases.append(Case("state_update", "fwd", dtype, 1, 1536, states=16))
        cases.append(Case("state_update", "fwd", dtype, 1, 1536, states=128, headdim=64))
        for op in ("ssd", "split_conv"):
            cases += [Case(op, d, dtype, 1, 1536, 2048, 128, headdim=64) for d in both]
        cases += [Case("layer_norm", d, dtype, 1, 768, 2048) for d in both]
        cases += [Case("gated_norm", d, dtype, 1, 1536, 2048) for d in both]
    return cases


# Microseconds of mamba_ssm 2.3.2.post1 and causal_conv1d 1.6.1 on one NVIDIA H200 (sm_90, CUDA
# events, launched from Python: rows below 60 us are mostly launch overhead). The shapes of the two
# one-token rows were not recorded; D5120 stands for them, as launch overhead is all they show.
# Rows of heads (H...P...) are the kernels' own time.
UPSTREAM_MACHINE = "NVIDIA H200"
UPSTREAM = {
    "selective_scan/bfloat16/B1D1536L2048N16/fwd": 81.2,
    "selective_scan/bfloat16/B1D1536L2048N16/bwd": 297.8,
    "selective_scan/bfloat16/B8D1536L2048N16/fwd": 449.4,
    "selective_scan/bfloat16/B8D1536L2048N16/bwd": 1742.8,
    "selective_scan/bfloat16/B1D5120L2048N16/fwd": 197.0,
    "selective_scan/bfloat16/B1D5120L2048N16/bwd": 818.4,
    "selective_scan/bfloat16/B8D5120L2048N16/fwd": 1452.1,
    "selective_scan/bfloat16/B8D5120L2048N16/bwd": 5642.9,
    "selective_scan/bfloat16/B1D5120L8192N16/fwd": 901.8,
    "selective_scan/bfloat16/B1D5120L8192N16/bwd": 3218.4,
    "selective_scan/bfloat16/B1D5120L65536N16/fwd": 7591.2,
    "selective_scan/bfloat16/B1D5120L65536N16/bwd": 24314.6,
    "selective_scan/bfloat16/B64D1536L512N16/fwd": 795.9,
    "selective_scan/bfloat16/B64D1536L512N16/bwd": 3125.5,
    "selective_scan/bfloat16/B1D1536L2048N64/fwd": 220.9,
    "selective_scan/bfloat16/B1D1536L2048N64/bwd": 969.7,
    "causal_conv1d/bfloat16/bdl/B1D1536L2048/fwd": 66.5,
    "causal_conv1d/bfloat16/bdl/B1D1536L2048/bwd": 368.4,
    "causal_conv1d/bfloat16/bld/B1D1536L2048/fwd": 59.5,
    "causal_conv1d/bfloat16/bld/B1D1536L2048/bwd": 265.6,
    "causal_conv1d/bfloat16/bdl/B8D1536L2048/fwd": 57.9,
    "causal_conv1d/bfloat16/bdl/B8D1536L2048/bwd": 225.9,
    "causal_conv1d/bfloat16/bld/B8D1536L2048/fwd": 55.5,
    "causal_conv1d/bfloat16/bld/B8D1536L2048/bwd": 259.8,
    "causal_conv1d/bfloat16/bdl/B8D5120L2048/fwd": 94.6,
    "causal_conv1d/bfloat16/bdl/B8D5120L2048/bwd": 310.0,
    "causal_conv1d/bfloat16/bld/B8D5120L2048/fwd": 113.6,
    "causal_conv1d/bfloat16/bld/B8D5120L2048/bwd": 318.0,
    "causal_conv1d/bfloat16/bdl/B1D5120L8192/fwd": 75.9,
    "causal_conv1d/bfloat16/bdl/B1D5120L8192/bwd": 324.3,
    "causal_conv1d/bfloat16/bld/B1D5120L8192/fwd": 60.9,
    "causal_conv1d/bfloat16/bld/B1D5120L8192/bwd": 301.0,
    "selective_scan/float32/B1D1536L2048N16/fwd": 127.2,
    "selective_scan/float32/B1D1536L2048N16/bwd": 306.1,
    "selective_scan/float32/B8D1536L2048N16/fwd": 878.5,
    "selective_scan/float32/B8D1536L2048N16/bwd": 2043.6,
    "selective_scan/float32/B1D5120L2048N16/fwd": 389.2,
    "selective_scan/float32/B1D5120L2048N16/bwd": 910.7,
    "selective_scan/float32/B8D5120L2048N16/fwd": 2863.6,
    "selective_scan/float32/B8D5120L2048N16/bwd": 6591.3,
    "selective_scan/float32/B1D5120L8192N16/fwd": 1611.6,
    "selective_scan/float32/B1D5120L8192N16/bwd": 3569.7,
    "selective_scan/float32/B64D1536L512N16/fwd": 1764.2,
    "selective_scan/float32/B64D1536L512N16/bwd": 4119.1,
    "selective_scan/float32/B1D1536L2048N64/fwd": 422.1,
    "selective_scan/float32/B1D1536L2048N64/bwd": 1019.7,
    "causal_conv1d/float32/bdl/B1D1536L2048/fwd": 47.0,
    "causal_conv1d/float32/bdl/B1D1536L2048/bwd": 259.8,
    "causal_conv1d/float32/bld/B1D1536L2048/fwd": 55.3,
    "causal_conv1d/float32/bld/B1D1536L2048/bwd": 255.5,
    "causal_conv1d/float32/bdl/B8D1536L2048/fwd": 57.9,
    "causal_conv1d/float32/bdl/B8D1536L2048/bwd": 258.5,
    "causal_conv1d/float32/bld/B8D1536L2048/fwd": 67.6,
    "causal_conv1d/float32/bld/B8D1536L2048/bwd": 237.4,
    "causal_conv1d/float32/bdl/B8D5120L2048/fwd": 168.4,
    "causal_conv1d/float32/bdl/B8D5120L2048/bwd": 249.0,
    "causal_conv1d/float32/bld/B8D5120L2048/fwd": 198.3,
    "causal_conv1d/float32/bld/B8D5120L2048/bwd": 365.0,
    "causal_conv1d/float32/bdl/B1D5120L8192/fwd": 92.6,
    "causal_conv1d/float32/bdl/B1D5120L8192/bwd": 146.5,
    "causal_conv1d/float32/bld/B1D5120L8192/fwd": 104.9,
    "causal_conv1d/float32/bld/B1D5120L8192/bwd": 181.8,
    "state_update/bfloat16/B1D5120N16/fwd": 167.4,
    "state_update/bfloat16/B16H80P64N128/fwd": 25.0,
    "state_update/bfloat16/B64H80P64N128/fwd": 97.0,
    "state_update/bfloat16/B256H80P64N128/fwd": 382.0,
    "ssd/bfloat16/B1H80P64L2048N128/fwd": 100.0,
    "ssd/bfloat16/B8H80P64L2048N128/fwd": 687.0,
    "ssd/bfloat16/B8H80P64L2048N128/bwd": 2346.0,
    "ssd/bfloat16/B1H80P64L32768N128/fwd": 1451.0,
    "causal_conv1d_update/bfloat16/B1D5120/fwd": 46.2,
    "layer_norm/bfloat16/B1D2560L16384/fwd": 122.0,
    "layer_norm/bfloat16/B1D2560L16384/bwd": 250.0,
}
