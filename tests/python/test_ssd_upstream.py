"""What upstream's own tests of Mamba-2 ask for, with their tolerances; the CPU at smaller sizes."""

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.ops.triton.ssd_chunk_scan import _chunk_scan_bwd_dC, _chunk_scan_bwd_dx
from mamba_ssm.ops.triton.ssd_chunk_state import (
    _chunk_cumsum_bwd,
    _chunk_cumsum_fwd,
    _chunk_state_bwd_db,
    _chunk_state_bwd_ddAcs_stable,
    _chunk_state_bwd_dx,
    chunk_state,
    chunk_state_varlen,
)
from mamba_ssm.ops.triton.ssd_combined import _chunk_scan_chunk_state_bwd_dx
from mamba_ssm.utils.determinism import set_deterministic_mode
from mamba_ssm.utils.generation import InferenceParams

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8, "max"])
@pytest.mark.parametrize("chunk_size", [64, 128])
def test_chunk_state_varlen(device, dtype, groups, chunk_size):
    """Sequences of 1 to 199 tokens in a row; the state after each is that of the sequence alone."""
    sequences, heads = (300, 64) if device == "cuda" else (20, 8)
    groups, headdim, d_state = heads if groups == "max" else groups, 64, 32
    lengths = torch.randint(1, 200, (sequences,))
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    total = int(lengths.sum())
    dt = torch.nn.functional.softplus(torch.randn(total, heads, device=device) - 4)
    A = -torch.exp(torch.rand(heads, device=device))
    B = torch.randn(1, total, groups, d_state, device=device, dtype=dtype)
    x = torch.randn(1, total, heads, headdim, device=device, dtype=dtype)
    dA_cumsum, delta = _chunk_cumsum_fwd(dt.unsqueeze(0), A, chunk_size)
    alone = []
    entering = torch.zeros(dA_cumsum.shape[2], heads, headdim, d_state, device=device)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        state = torch.zeros(heads, headdim, d_state, device=device)
        for first in range(begin - begin % chunk_size, end, chunk_size):
            part = slice(max(first, begin), min(first + chunk_size, end))
            if first > begin:
                entering[first // chunk_size] = state
            sums, steps = _chunk_cumsum_fwd(dt[None, part], A, part.stop - part.start)
            own = chunk_state(B[:, part], x[:, part], steps, sums)[0, 0]
            state = torch.exp(sums[0, :, 0, -1])[:, None, None] * state + own
        alone.append(state)
    got = chunk_state_varlen(B[0], x[0], delta[0], dA_cumsum[0], bounds, entering)
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-2, atol=3e-3)


def pieces(device, headdim):
    """{name: a call of a private piece}, on random, also growing, sums of steps."""
    length, heads, chunk = (2048, 8, 256) if device == "cuda" else (128, 4, 32)
    chunks, d_state = length // chunk, 64

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device).to(dtype)

    half = torch.bfloat16
    x, dout = (randn(2, length, heads, headdim, dtype=half) for _ in range(2))
    B, C = (randn(2, length, 1, d_state, dtype=half) for _ in range(2))
    dt = torch.rand(2, heads, chunks, chunk, device=device)
    sums = torch.rand(2, heads, chunks, chunk, device=device)
    states, dstates = (randn(2, chunks, heads, headdim, d_state) for _ in range(2))
    cb = randn(2, chunks, 1, chunk, chunk, dtype=half)
    plain, A = randn(2, length, heads), -torch.rand(heads, device=device)
    both = (x, dt, sums, B, cb, dout, dstates)
    return {
        "chunk_scan_bwd_dx": lambda: _chunk_scan_bwd_dx(cb, x, dt, sums, dout),
        "chunk_scan_bwd_dC": lambda: _chunk_scan_bwd_dC(states, sums, dout, C=C),
        "chunk_state_bwd_dx": lambda: _chunk_state_bwd_dx(B, x, dt, sums, dstates),
        "chunk_state_bwd_db": lambda: _chunk_state_bwd_db(x, dt, sums, dstates, B=B),
        "chunk_state_bwd_ddAcs_stable": lambda: _chunk_state_bwd_ddAcs_stable(
            B, x, dt, sums, dstates
        ),
        "chunk_cumsum_bwd": lambda: _chunk_cumsum_bwd(sums, dt, plain, A),
        "combined, D per head": lambda: _chunk_scan_chunk_state_bwd_dx(*both, D=A),
        "combined, D per channel": lambda: _chunk_scan_chunk_state_bwd_dx(
            *both, D=A[:, None].expand(heads, headdim)
        ),
    }


def tensors(results):
    results = results if isinstance(results, tuple) else (results,)
    return [result for result in results if result is not None]


@pytest.mark.parametrize("headdim", [64, 128])
@pytest.mark.parametrize("name", pieces("cpu", 4))
def test_pieces_give_the_same_bits_and_those_of_the_default_mode_nearly(device, name, headdim):
    run = pieces(device, headdim)[name]
    default = tensors(run())
    set_deterministic_mode(True)
    try:
        first, *others = (tensors(run()) for _ in range(5))
    finally:
        set_deterministic_mode(None)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, default, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.fixture
def model(device):
    """Upstream's is half precision, on the GPU."""
    large = device == "cuda"
    config = MambaConfig(
        d_model=1024 if large else 64, n_layer=4, vocab_size=1000, ssm_cfg={"layer": "Mamba2"}
    )
    dtype = torch.float16 if large else torch.float32
    return MambaLMHeadModel(config, device=device, dtype=dtype)


def scores(model, tokens, prompt):
    output = model.generate(
        tokens[:, :prompt],
        tokens.shape[1],
        teacher_outputs=tokens,
        cg=tokens.is_cuda,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.scores, dim=1)


def test_generation(model, device):
    tokens = torch.randint(0, 1000, (3, 20), device=device)
    with torch.no_grad():
        whole = model(tokens).logits[:, 9:-1]
    torch.testing.assert_close(scores(model, tokens, 10), whole, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("padding", [False, True])
def test_generation_of_a_packed_prompt(model, device, padding):
    """Nearer to the forward pass than twice each sequence's own generation is; with padding 512 tokens in all."""
    lengths, more = [170, 65, 100], 20
    rows = [torch.randint(0, 1000, (1, n + more), device=device) for n in lengths]
    bounds = [0, 170, 235, 335, *([335] if padding else [])]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    seq_idx = torch.arange(3, device=device).repeat_interleave(torch.tensor(lengths, device=device))
    prompt = torch.cat([row[:, :n] for row, n in zip(rows, lengths, strict=True)], dim=1)
    if padding:
        prompt = torch.nn.functional.pad(prompt, (0, 512 - 335))
        seq_idx = torch.nn.functional.pad(seq_idx, (0, 512 - 335), value=-1)
    packing = {"seq_idx": seq_idx.to(torch.int32).unsqueeze(0), "cu_seqlens": cu_seqlens}
    params = InferenceParams(max_seqlen=512, max_batch_size=len(bounds) - 1)
    with torch.no_grad():
        whole = torch.cat(
            [model(r).logits[:, n - 1 : -1] for r, n in zip(rows, lengths, strict=True)]
        )
        logits = model(prompt, inference_params=params, **packing).logits
        outs = [logits[0, cu_seqlens[1:4].long() - 1]]
        for t in range(more - 1):
            params.seqlen_offset = max(lengths) + t
            token = [row[:, n + t, None] for row, n in zip(rows, lengths, strict=True)]
            token = torch.cat([*token, *([token[0]] if padding else [])])
            outs.append(model(token, inference_params=params).logits[:3, -1])
    alone = torch.cat([scores(model, r, n) for r, n in zip(rows, lengths, strict=True)])
    packed = torch.stack(outs, dim=1)
    noise = 1e-5 * whole.abs().max().item()  # where both are exact
    assert (packed - whole).abs().max() < 2 * (alone - whole).abs().max() + noise
