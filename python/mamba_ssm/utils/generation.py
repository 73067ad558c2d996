"""Autoregressive generation: sampling and the decoding loop."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class GenerateDecoderOnlyOutput(NamedTuple):
    """sequences (B, length); scores: one (B, vocabulary) a generated token, or None."""

    sequences: torch.Tensor
    scores: tuple | None = None


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


def modify_logits_for_min_p_filtering(logits, min_p):
    """Sets to -inf, in place, what is less likely than min_p times the row's most likely token."""
    if min_p <= 0.0 or min_p >= 1.0:
        return
    probabilities = logits.softmax(dim=-1)
    threshold = min_p * probabilities.amax(dim=-1, keepdim=True)
    logits.masked_fill_(probabilities < threshold, float("-inf"))


def modify_logits_for_top_k_filtering(logits, top_k):
    """Sets to -inf, in place, all but the k largest."""
    smallest_kept = torch.topk(logits, top_k)[0][..., -1, None]
    logits.masked_fill_(logits < smallest_kept, float("-inf"))


def modify_logits_for_top_p_filtering(logits, top_p):
    """Sets to -inf, in place, the least likely tokens that together have at most 1 - top_p."""
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ascending, indices = torch.sort(logits, descending=False)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    logits.masked_fill_(removed.scatter(-1, indices, removed), float("-inf"))


def modify_logit_for_repetition_penalty(logits, prev_output_tokens, repetition_penalty=1.0):
    """Makes the tokens seen so far, (B, length), less likely, in place; returns logits."""
    if repetition_penalty == 1.0:
        return logits
    score = logits.gather(1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def _draw(logits):
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(-1)


def sample(logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0):
    """One token a row, (B), from logits (B, vocabulary); top_k = 1 is greedy, 0 keeps the whole vocabulary."""
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 0.0:
        assert top_p <= 1.0, "top-p must be in (0, 1]"
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

    teacher_outputs: (B, length), tokens to take instead of sampled ones while they last. vocab_size: ignores
    logits beyond it. streamer: gets the prompt and every token by put(), then end().
    """
    if cg:
        raise NotImplementedError(
            "cg=True: decoding through CUDA graphs is not part of this version"
        )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch_size, prompt_length = input_ids.shape
    teacher_length = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    params = InferenceParams(max_seqlen=max_length, max_batch_size=batch_size)

    def next_logits(tokens):
        position_ids = None
        if params.seqlen_offset > 0:
            position_ids = tokens.new_full((batch_size, 1), params.seqlen_offset, dtype=torch.long)
        output = model(
            tokens, position_ids=position_ids, inference_params=params, num_last_tokens=1
        )
        return output.logits.squeeze(1)[..., :vocab_size]

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
