"""Sampling filters, the decoding loop, and its steps as CUDA graphs."""

import copy

import pytest
import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import (
    DecodingCGCache,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    InferenceParams,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    update_graph_cache,
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


def test_a_vocabulary_of_bfloat16_is_summed_in_float32():
    """In bfloat16 a running sum of 1/50000 stops at 1/256, and every token would seem to be in the tail."""
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    modify_logits_for_top_p_filtering(logits, 0.5)
    assert logits.isfinite().sum().item() == pytest.approx(25_000, abs=10)


def test_sampling_refuses_what_gives_no_distribution():
    logits = PROBABILITIES.log()
    for options, message in (
        ({"top_k": -1}, "top_k"),
        ({"top_k": 0, "top_p": 1.5}, "top_p"),
        ({"top_k": 0, "min_p": -0.1}, "min_p"),
        ({"top_k": 0, "temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(logits, **options)


def test_top_k_beyond_the_vocabulary_keeps_all_of_it():
    assert kept(modify_logits_for_top_k_filtering, 9) == [[1] * 4] * 2


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


def test_output_is_read_by_name_key_and_position(model, prompt):
    output = model.generate(prompt, 12, return_dict_in_generate=True, output_scores=True)
    assert isinstance(output, GenerateDecoderOnlyOutput) and len(output.scores) == 2
    assert output.sequences is output["sequences"] is output[0]
    assert output.scores is output["scores"] is output[1]
    assert model.generate(prompt, 12, return_dict_in_generate=True).scores is None


def test_scores_are_those_before_the_penalty(model, prompt):
    options = {"return_dict_in_generate": True, "output_scores": True, "vocab_size": 61}
    plain = model.generate(prompt, 11, **options)
    punished = model.generate(prompt, 11, repetition_penalty=1e6, **options)
    assert torch.equal(plain.scores[0], punished.scores[0])


def test_sampled_text_depends_on_the_seed_alone(model, prompt):
    def text(seed):
        torch.manual_seed(seed)
        return model.generate(prompt, 20, top_k=0, top_p=0.9, temperature=2.0)

    assert torch.equal(text(1), text(1)) and not torch.equal(text(1), text(2))


def test_generation_under_autocast(model, prompt):
    """The cache keeps the weights' dtype, the layers compute in another."""
    teacher = torch.randint(0, 61, (3, 14), device=prompt.device)
    options = {"return_dict_in_generate": True, "output_scores": True, "teacher_outputs": teacher}
    with torch.autocast(prompt.device.type, dtype=torch.bfloat16):
        scores = model.generate(prompt, 14, **options).scores
    whole = model.generate(prompt, 14, **options).scores
    torch.testing.assert_close(
        torch.stack(scores).float(), torch.stack(whole), rtol=0.1, atol=0.1 * whole[0].abs().max()
    )


def test_generate_refuses_what_does_not_fit(model, prompt):
    for arguments, options, message in (
        ((prompt, 10), {}, "max_length counts the prompt"),
        ((prompt[:, :0], 10), {}, "at least one token"),
        ((prompt[0], 20), {}, r"\(B, length\)"),
        ((prompt, 20), {"temperature": -1.0}, "temperature"),
        ((prompt, 20), {"repetition_penalty": 0.0}, "repetition_penalty"),
        ((prompt, 20), {"teacher_outputs": prompt[:1]}, "teacher_outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(*arguments, **options)


def test_a_model_without_caches_says_so():
    with pytest.raises(NotImplementedError):
        GenerationMixin().allocate_inference_cache(1, 1)


def test_cuda_graphs_need_a_cuda_model():
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=8))
    with pytest.raises(ValueError, match="cg=True.*'cpu'.*leave cg out"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 4, cg=True)
    assert not hasattr(model, "_decoding_cache")


@pytest.fixture
def on_gpu():
    config = MambaConfig(d_model=32, n_layer=2, vocab_size=61)
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 0.5}).to("cuda")


def assert_same_scores(got, expected):
    """Libraries may choose another matrix product inside a graph."""
    tolerance = {torch.float32: 1e-4}.get(got.dtype, 2e-2)
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def scores_of(model, teacher, **options):
    options |= {"return_dict_in_generate": True, "output_scores": True, "teacher_outputs": teacher}
    output = model.generate(teacher[:, :10], teacher.shape[1], **options)
    return torch.stack(output.scores)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_decode_like_the_layers(on_gpu, dtype):
    """Twice: the second prompt overwrites what the first left in the states."""
    on_gpu.to(dtype)
    for _ in range(2):
        teacher = torch.randint(0, 61, (3, 24), device="cuda")
        assert_same_scores(scores_of(on_gpu, teacher, cg=True), scores_of(on_gpu, teacher))
    assert list(on_gpu._decoding_cache.callables) == [(3, 1)]


@pytest.mark.gpu
def test_graphs_are_kept_until_something_changes(on_gpu):
    def check(batch, length, kept):
        graphs = on_gpu._decoding_cache.callables.copy()
        teacher = torch.randint(0, 61, (batch, length), device="cuda")
        assert_same_scores(scores_of(on_gpu, teacher, cg=True), scores_of(on_gpu, teacher))
        now = on_gpu._decoding_cache.callables
        assert (graphs.items() <= now.items()) is kept and (batch, 1) in now

    on_gpu._decoding_cache = DecodingCGCache()
    check(3, 20, True)
    check(3, 16, True)  # shorter
    check(2, 20, True)  # the first rows of the same states
    check(3, 20, True)
    check(4, 20, False)
    check(4, 30, False)
    on_gpu.load_state_dict(
        {name: tensor * 1.5 for name, tensor in on_gpu.state_dict().items()}, assign=True
    )
    on_gpu.tie_weights()
    check(4, 30, False)
    on_gpu.half()
    check(4, 30, False)
    assert on_gpu._decoding_cache.dtype == torch.float16


@pytest.mark.gpu
def test_a_copied_model_captures_graphs_of_its_own(on_gpu):
    teacher = torch.randint(0, 61, (1, 14), device="cuda")
    scores = scores_of(on_gpu, teacher, cg=True)
    twin = copy.deepcopy(on_gpu)
    assert not twin._decoding_cache.callables
    assert_same_scores(scores_of(twin, teacher, cg=True), scores)


@pytest.mark.gpu
def test_a_graph_cache_is_usable_without_decode(on_gpu):
    ids = torch.randint(0, 61, (2, 12), device="cuda")
    cache = update_graph_cache(on_gpu, None, 2, 10, 12)
    params = cache.inference_params
    assert (params.seqlen_offset, params.max_batch_size, params.max_seqlen) == (0, 2, 12)
    with torch.inference_mode():
        on_gpu(ids[:, :10], inference_params=params)
        steps = [cache.run(ids[:, t : t + 1], ids.new_full((2, 1), t), t) for t in (10, 11)]
        whole = on_gpu(ids).logits[:, 10:]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_step_is_captured_in_a_graph_of_the_callers(on_gpu):
    mixer = on_gpu.backbone.layers[0].mixer
    hidden = torch.randn(3, 6, 32, device="cuda")
    states = mixer.allocate_inference_cache(3, 6)
    token = hidden[:, :1].clone()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mixer.step(token, *states)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, *_ = mixer.step(token, *states)
        for state in states:
            state.zero_()
        outs = []
        for t in range(6):
            token.copy_(hidden[:, t : t + 1])
            graph.replay()
            outs.append(out.clone())
        torch.testing.assert_close(torch.cat(outs, 1), mixer(hidden), rtol=1e-4, atol=1e-4)


def test_inference_params_start_anew():
    params = InferenceParams(8, 2, seqlen_offset=5, lengths_per_sample=torch.ones(2))
    params.reset(16, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 4, 0)
    assert not params.lengths_per_sample.any()
    assert (
        InferenceParams(8, 2).key_value_memory_dict
        is not InferenceParams(8, 2).key_value_memory_dict
    )
