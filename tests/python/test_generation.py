"""Sampling filters and the decoding loop."""

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import (
    InferenceParams,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.1, 0.6]])


def kept(modify, threshold):
    logits = PROBABILITIES.log()
    modify(logits, threshold)
    return logits.isfinite().int().tolist()


def test_top_k():
    assert kept(modify_logits_for_top_k_filtering, 2) == [[1, 1, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    "top_p, expected",
    [
        (0.79, [[1, 1, 0, 0], [0, 1, 0, 1]]),
        (0.4, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (0.0, [[1] * 4] * 2),
        (1.0, [[1] * 4] * 2),
    ],
)
def test_top_p(top_p, expected):
    assert kept(modify_logits_for_top_p_filtering, top_p) == expected


def test_min_p_is_relative_to_each_rows_best_token():
    assert kept(modify_logits_for_min_p_filtering, 0.32) == [[1, 1, 0, 0], [0, 1, 0, 1]]
    assert kept(modify_logits_for_min_p_filtering, 0.0) == [[1] * 4] * 2


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 0]]), 2.0)
    assert logits.tolist() == [[1.0, -4.0, 1.0]]


def test_sample_draws_from_what_the_filters_keep():
    logits = PROBABILITIES[:1].log().expand(4000, -1)

    def frequencies(**options):
        return torch.bincount(sample(logits, **options), minlength=4) / 4000

    assert sample(logits[:3]).tolist() == [0, 0, 0]
    for options, expected in (
        ({"top_k": 0}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_k": 0, "min_p": 0.32}, [0.625, 0.375, 0, 0]),
        ({"top_k": 2, "temperature": 0.5}, [0.25 / 0.34, 0.09 / 0.34, 0, 0]),
        ({"top_k": 9, "top_p": 0.4}, [1, 0, 0, 0]),
    ):
        torch.testing.assert_close(
            frequencies(**options), torch.tensor(expected).float(), rtol=0, atol=0.04
        )
    assert torch.equal(logits, PROBABILITIES[:1].log().expand(4000, -1))


@pytest.fixture
def model(device):
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=61)
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5}).to(device)


@pytest.fixture
def prompt(device):
    return torch.randint(0, 61, (3, 10), device=device)


def test_decoding_is_the_forward_pass(model, prompt):
    teacher = torch.cat([prompt, torch.randint(0, 61, (3, 10), device=prompt.device)], dim=1)
    output = model.generate(
        prompt, 20, return_dict_in_generate=True, output_scores=True, teacher_outputs=teacher
    )
    assert torch.equal(output.sequences, teacher)
    with torch.no_grad():
        whole = model(teacher).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(output.scores, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_greedy_decoding_takes_the_best_token(model, prompt):
    sequences = model.generate(prompt, 16, vocab_size=61)
    assert sequences.shape == (3, 16) and torch.equal(sequences[:, :10], prompt)
    with torch.no_grad():
        logits = model(sequences.clone()).logits[:, 9:-1, :61]
    chosen = logits.gather(-1, sequences[:, 10:].clone().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=1e-3, atol=1e-3)


def test_decoding_stops_when_every_row_ends(model, prompt):
    teacher = torch.full((3, 30), 7, device=prompt.device)
    teacher[0, 10] = 8
    assert model.generate(prompt, 30, teacher_outputs=teacher, eos_token_id=7).shape == (3, 12)


def test_repeated_tokens_become_unlikely(model, prompt):
    sequences = model.generate(prompt, 40, vocab_size=61, repetition_penalty=1e6)
    for before, after in zip(prompt.tolist(), sequences[:, 10:].tolist(), strict=True):
        assert len(set(after)) == 30 and not set(before) & set(after)


def test_streamer_sees_prompt_tokens_and_end(model, prompt):
    class Streamer:
        seen, ended = [], False

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    sequences = model.generate(prompt, 13, streamer=streamer).cpu()
    assert torch.equal(streamer.seen[0], sequences[:, :10]) and streamer.ended
    assert torch.equal(torch.stack(streamer.seen[1:], dim=1), sequences[:, 10:])


def test_timing_is_printed(model, prompt, capsys):
    model.generate(prompt, 12, enable_timing=True)
    assert "prompt of 10 and 2 tokens" in capsys.readouterr().out


def test_cuda_graphs_are_refused_by_name(model, prompt):
    with pytest.raises(NotImplementedError, match="cg=True"):
        model.generate(prompt, 12, cg=True)


def test_inference_params_start_anew():
    params = InferenceParams(8, 2, seqlen_offset=5, lengths_per_sample=torch.ones(2))
    params.reset(16, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 4, 0)
    assert not params.lengths_per_sample.any()
    assert (
        InferenceParams(8, 2).key_value_memory_dict
        is not InferenceParams(8, 2).key_value_memory_dict
    )
