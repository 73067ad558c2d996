"""Autoregressive generation: sampling, the decoding loop, and its steps as CUDA graphs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class GenerateDecoderOnlyOutput(NamedTuple):
    """sequences (B, length); scores: one (B, vocabulary) a generated token, or None."""

    sequences: torch.Tensor
    scores: tuple | None = None

    def __getitem__(self, key):
        """By position, or by name as transformers' class of this name allows."""
        return getattr(self, key) if isinstance(key, str) else tuple(self)[key]


@dataclass
class InferenceParams:
    """What layers share while decoding: the position, and their states by layer index."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen, max_batch_size):
        """Starts a new sequence; layers overwrite their states at its first tokens."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def _probabilities(logits):
    """In float32: bfloat16 cannot sum a vocabulary."""
    return logits.softmax(dim=-1, dtype=torch.float32)


def modify_logits_for_min_p_filtering(logits, min_p):
    """Sets to -inf, in place, what is less likely than min_p times the row's most likely token."""
    if min_p <= 0.0 or min_p >= 1.0:
        return
    probabilities = _probabilities(logits)
    threshold = min_p * probabilities.amax(dim=-1, keepdim=True)
    logits.masked_fill_(probabilities < threshold, float("-inf"))


def modify_logits_for_top_k_filtering(logits, top_k):
    """Sets to -inf, in place, all but the k largest."""
    smallest_kept = torch.topk(logits, min(top_k, logits.shape[-1]))[0][..., -1, None]
    logits.masked_fill_(logits < smallest_kept, float("-inf"))


def modify_logits_for_top_p_filtering(logits, top_p):
    """Sets to -inf, in place, the least likely tokens that together have at most 1 - top_p."""
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ascending, indices = torch.sort(logits, descending=False)
    removed = _probabilities(ascending).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(removed.scatter(-1, indices, removed), float("-inf"))


def modify_logit_for_repetition_penalty(logits, prev_output_tokens, repetition_penalty=1.0):
    """Makes the tokens seen so far, (B, length), less likely, in place; returns logits."""
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def _draw(logits):
    return torch.multinomial(_probabilities(logits), num_samples=1).squeeze(-1)


def _check_sampling(top_k, top_p, min_p, temperature):
    """Before a draw from NaN stops the whole CUDA context."""
    if top_k < 0:
        raise ValueError(f"top_k must be 1 (greedy), more, or 0 for every token, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], where 0 is off, got {value}")
    if not temperature > 0.0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; top_k=1 takes the best token"
        )


def sample(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0):
    """One token a row, (B), from logits (B, vocabulary); top_k = 1 is greedy, 0 keeps the whole vocabulary.

    top_p draws from the most likely tokens that together reach top_p, among the top_k if there are; min_p, with
    top_k = 0, from those at least min_p times as likely as the best, and then top_p has no say. 0 is off for both.
    """
    _check_sampling(top_k, top_p, min_p, temperature)
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_k > 0:
        logits, indices = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
        logits = logits / temperature
        modify_logits_for_top_p_filtering(logits, top_p)
        return indices.gather(-1, _draw(logits).unsqueeze(-1)).squeeze(-1)
    if min_p > 0.0:
        logits = logits.clone()
        modify_logits_for_min_p_filtering(logits, min_p)
        return _draw(logits / temperature)
    logits = logits / temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    return _draw(logits)


@dataclass
class DecodingCGCache:
    """Decoding steps of one model captured as CUDA graphs, and the states that they share."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)  # (batch, decoding_seqlen) -> capture_graph(...)
    mempool: tuple | None = None
    states: dict = field(default_factory=dict)  # by layer index, of max_batch_size rows
    baked: tuple = ()  # what the graphs hold beside their arguments: autocast, addresses of weights
    inference_params: InferenceParams | None = None  # of the batch that was asked for last
    run: Callable | None = None  # the step of that batch: callables by (batch, decoding_seqlen)

    def __reduce__(self):
        return DecodingCGCache, ()  # a copy of the model captures graphs of its own


def _baked(model, device):
    """A graph would go on reading weights that a model no longer has, in the autocast of its capture."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return autocast, *(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def update_graph_cache(
    model,
    cache,
    batch_size,
    seqlen_og,
    max_seqlen,
    decoding_seqlens=(1,),
    dtype=None,
    n_warmups=2,
):
    """Captures what `cache` (None for a new one) lacks of the steps for batch_size rows; returns the cache.

    Everything is captured again where device or dtype changed, weights moved or sizes grew; a smaller batch uses
    the first rows of the same states. seqlen_og: length of the prompt. decoding_seqlens: tokens a step, one graph
    each. dtype: of the states, the model's when None. Afterwards `cache.inference_params` awaits the prompt, and
    `cache.run(input_ids, position_ids, seqlen)` gives the logits of a step. ValueError: the model is not on CUDA.
    """
    cache = DecodingCGCache() if cache is None else cache
    parameter = next(model.parameters())
    device, dtype = parameter.device, dtype or parameter.dtype
    if device.type != "cuda":
        raise ValueError(
            f"cg=True decodes through CUDA graphs, but the model is on {str(device)!r}. "
            f"To do: move it to a CUDA device, or leave cg out."
        )
    baked = _baked(model, device)
    if (
        (device, dtype, baked) != (cache.device, cache.dtype, cache.baked)
        or batch_size > cache.max_batch_size
        or max_seqlen > cache.max_seqlen
    ):
        cache.__init__(  # frees the old graphs and states before the new ones are allocated
            max(batch_size, cache.max_batch_size), max(max_seqlen, cache.max_seqlen), device, dtype
        )
        cache.baked = baked
        cache.mempool = torch.cuda.graphs.graph_pool_handle()
        cache.states = model.allocate_inference_cache(cache.max_batch_size, cache.max_seqlen, dtype)
    params = cache.inference_params = InferenceParams(
        max_seqlen=max_seqlen,
        max_batch_size=batch_size,
        seqlen_offset=seqlen_og,
        key_value_memory_dict={
            layer: tuple(None if state is None else state[:batch_size] for state in states)
            for layer, states in cache.states.items()
        },
        lengths_per_sample=torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=device),
    )
    for length in decoding_seqlens:
        if (batch_size, length) not in cache.callables:
            cache.callables[batch_size, length] = capture_graph(
                model, params, batch_size, cache.max_seqlen, length, cache.mempool, n_warmups
            )

    def run(input_ids, position_ids, seqlen):
        return cache.callables[input_ids.shape](input_ids, position_ids, seqlen)

    cache.run = run
    params.reset(max_seqlen, batch_size)
    return cache


def capture_graph(
    model,
    inference_params,
    batch_size,
    max_seqlen,
    decoding_seqlen=1,
    mempool=None,
    n_warmups=2,
):
    """Captures one decoding step of `model` on the states of inference_params.

    Returns run(input_ids, position_ids, seqlen), ids (batch_size, decoding_seqlen) after seqlen tokens, which
    gives the logits of all its tokens. The states hold rubbish afterwards, until a prompt overwrites them.
    """
    device = next(model.parameters()).device
    input_ids = torch.zeros((batch_size, decoding_seqlen), dtype=torch.long, device=device)
    position_ids = torch.zeros_like(input_ids)
    lengths = inference_params.lengths_per_sample
    before = inference_params.seqlen_offset
    # Layers tell a step from a prompt by the offset, and attention's reach is fixed by it.
    inference_params.seqlen_offset = max(max_seqlen - decoding_seqlen, 1)
    lengths.fill_(inference_params.seqlen_offset)

    def step():
        return model(
            input_ids,
            position_ids=position_ids,
            inference_params=inference_params,
            num_last_tokens=decoding_seqlen,
        ).logits

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate and choose at their first calls
            for _ in range(n_warmups):
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=mempool):
            logits = step()
    inference_params.seqlen_offset = before

    def run(new_input_ids, new_position_ids, seqlen):
        lengths.fill_(seqlen)
        input_ids.copy_(new_input_ids)
        position_ids.copy_(new_position_ids)
        graph.replay()
        return logits.clone()

    return run


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def decode(
    input_ids,
    model,
    max_length,
    top_k=1,
    top_p=0.0,
    min_p=0.0,
    temperature=1.0,
    repetition_penalty=1.0,
    eos_token_id=None,
    teacher_outputs=None,
    vocab_size=None,
    cg=False,
    enable_timing=False,
    output_scores=False,
    streamer=None,
):
    """Continues the prompt (B, length) to max_length tokens, or until every row gives eos_token_id at once.

    top_k, top_p, min_p, temperature: see `sample`. repetition_penalty: above 1 makes tokens of the row so far less
    likely. eos_token_id: rows that end earlier go on. teacher_outputs: (B, length), tokens to take instead of
    sampled ones while they last, prompt included. vocab_size: ignores logits beyond it. cg: CUDA graphs, kept in
    model._decoding_cache for the next call; the model must be on CUDA. output_scores: keeps the logits that each
    token was chosen from, before the penalty. streamer: gets the prompt and every token by put(), then end().
    ValueError before anything runs where an argument does not fit.
    """
    _check_sampling(top_k, top_p, min_p, temperature)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be (B, length) with at least one token, got {tuple(input_ids.shape)}"
        )
    batch_size, prompt_length = input_ids.shape
    if max_length <= prompt_length:
        raise ValueError(
            f"max_length counts the prompt: it must be above {prompt_length}, got {max_length}"
        )
    if not repetition_penalty > 0.0:
        raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}")
    if teacher_outputs is not None and teacher_outputs.shape[:-1] != (batch_size,):
        raise ValueError(
            f"teacher_outputs must be ({batch_size}, length), got {tuple(teacher_outputs.shape)}"
        )
    teacher_length = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    graphs = None
    if cg:
        graphs = model._decoding_cache = update_graph_cache(
            model,
            getattr(model, "_decoding_cache", None),
            batch_size,
            prompt_length,
            max_length,
        )
        params = graphs.inference_params
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)
    if streamer is not None:
        streamer.put(input_ids.cpu())

    def next_logits(tokens):
        position_ids = None
        if params.seqlen_offset > 0:
            position_ids = tokens.new_full((batch_size, 1), params.seqlen_offset, dtype=torch.long)
        if graphs is not None and params.seqlen_offset > 0:
            logits = graphs.run(tokens, position_ids, params.seqlen_offset)
        else:
            logits = model(
                tokens, position_ids=position_ids, inference_params=params, num_last_tokens=1
            ).logits
        return logits.squeeze(1)[..., :vocab_size]

    def choose(logits):
        if params.seqlen_offset < teacher_length:
            return teacher_outputs[:, params.seqlen_offset]
        if repetition_penalty != 1.0:
            logits = modify_logit_for_repetition_penalty(
                logits.clone(), sequences, repetition_penalty
            )
        return sample(logits, top_k, top_p, min_p, temperature)

    start = _now(input_ids.device)
    sequences, tokens, scores = input_ids, input_ids, []
    while True:
        logits = next_logits(tokens)
        if output_scores:
            scores.append(logits)
        params.seqlen_offset += tokens.shape[1]
        tokens = choose(logits).unsqueeze(1)
        sequences = torch.cat([sequences, tokens], dim=1)
        if streamer is not None:
            streamer.put(tokens.squeeze(1).cpu())
        if eos_token_id is not None and (tokens == eos_token_id).all():
            break
        if params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        milliseconds = (_now(input_ids.device) - start) * 1000
        print(
            f"prompt of {prompt_length} and {sequences.shape[1] - prompt_length} tokens: {milliseconds:.0f} ms"
        )
    return GenerateDecoderOnlyOutput(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Adds generate() to a model that has forward(input_ids, inference_params=) and caches."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        raise NotImplementedError

    def generate(
        self,
        input_ids,
        max_length,
        top_k=1,
        top_p=0.0,
        min_p=0.0,
        temperature=1.0,
        return_dict_in_generate=False,
        output_scores=False,
        **kwargs,
    ):
        """Token ids (B, <= max_length), or with return_dict_in_generate also the scores; see `decode`."""
        output = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return output if return_dict_in_generate else output.sequences
