"""A byte-level Mamba language model in training, with checkpoints that hold all it depends on."""

import math
import os
import time
import zlib
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from mamba_ssm.cli.errors import UsageError
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

WARMUP_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """What decides the result, together with the text."""

    d_model: int
    layers: int
    length: int  # bytes of a training row
    batch: int  # rows of a step
    steps: int
    learning_rate: float
    seed: int
    arch: str = "mamba1"

    def ssm_cfg(self):
        """The layers that arch names; heads of 64 channels where the width allows it."""
        if self.arch == "mamba1":
            return {}
        return {"layer": "Mamba2", "d_state": 64, "headdim": math.gcd(64, 2 * self.d_model)}


class Training:
    """Model, optimizer, position in the data order and history.

    text: bytes; text[:split] is learnt, the rest held out. After `resume` the steps continue with
    the numbers that an uninterrupted run would have seen.
    """

    def __init__(self, settings, text, split, device):
        self.settings = settings
        self.device = torch.device(device)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.text_checksum = zlib.crc32(text)
        self.split = split
        self.step_count = 0
        self.seconds = 0.0
        self.losses = []  # bits per byte of each step's rows
        self.held_out = []  # (step, bits per byte)
        self.data_order = torch.Generator().manual_seed(settings.seed)
        torch.manual_seed(settings.seed)
        config = MambaConfig(
            d_model=settings.d_model,
            n_layer=settings.layers,
            vocab_size=256,
            ssm_cfg=settings.ssm_cfg(),
        )
        self.model = MambaLMHeadModel(config, device=self.device)
        kept = [p for p in self.model.parameters() if p.dim() < 2 or hasattr(p, "_no_weight_decay")]
        decayed = [p for p in self.model.parameters() if not any(p is k for k in kept)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
        )

    def parameter_count(self):
        return sum(p.numel() for p in self.model.parameters())

    def finished(self):
        return self.step_count >= self.settings.steps

    def _learning_rate(self):
        """Linear warm-up, then a cosine down to a tenth."""
        warmup = min(WARMUP_STEPS, max(1, self.settings.steps // 10))
        if self.step_count < warmup:
            return self.settings.learning_rate * (self.step_count + 1) / warmup
        done = (self.step_count - warmup) / max(1, self.settings.steps - warmup)
        return self.settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))

    def _bits(self, rows):
        """-log2 P of every byte of rows (R, L + 1) after the first: (R, L)."""
        rows = rows.to(self.device, torch.long)
        logits = self.model(rows[:, :-1]).logits.float()
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") / math.log(2)

    def step(self):
        """One optimizer step on random rows of the learnt part. Returns their bits per byte."""
        started = time.perf_counter()
        length = self.settings.length
        starts = torch.randint(
            self.split - length, (self.settings.batch, 1), generator=self.data_order
        )
        bits = self._bits(self.text[starts + torch.arange(length + 1)]).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        bits.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step_count += 1
        self.losses.append(bits.item())
        self.seconds += time.perf_counter() - started
        return self.losses[-1]

    @torch.no_grad()
    def evaluate(self):
        """Bits per byte of the held-out text, every byte once. Appends to the history.

        Rows overlap by half and only their second halves count, so that every byte but those of the
        first row has half a row before it. The very first is predicted from the last byte learnt.
        """
        length = self.settings.length
        half = length // 2
        first = self.split - 1
        starts = torch.arange(first, len(self.text) - 1, half)
        total = 0.0
        for chunk in starts.split(64):
            index = chunk[:, None] + torch.arange(length + 1)
            bits = self._bits(self.text[index.clamp(max=len(self.text) - 1)]).cpu()
            position = torch.arange(length)
            counts = (position >= length - half) | (chunk == first)[:, None]
            counts = counts & (index[:, 1:] < len(self.text))
            total += bits[counts].double().sum().item()
        self.held_out.append((self.step_count, total / (len(self.text) - self.split)))
        return self.held_out[-1][1]

    @torch.no_grad()
    def sample(self, prompt, size, temperature=0.8):
        """`size` bytes that the model writes after the bytes of prompt."""
        torch.manual_seed(self.settings.seed)
        ids = torch.tensor([list(prompt)], device=self.device)
        written = self.model.generate(
            input_ids=ids, max_length=len(prompt) + size, top_k=0, temperature=temperature
        )
        return bytes(written[0].tolist())

    def save(self, path):
        """Writes the checkpoint; an interruption while writing leaves the previous one whole."""
        state = {
            "settings": asdict(self.settings),
            "text_checksum": self.text_checksum,
            "step_count": self.step_count,
            "seconds": self.seconds,
            "losses": self.losses,
            "held_out": self.held_out,
            "data_order": self.data_order.get_state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    @classmethod
    def resume(cls, path, text, split, device):
        """The training that `save` wrote. UsageError if it learnt another text."""
        state = torch.load(path, map_location=device, weights_only=True)
        training = cls(Settings(**state["settings"]), text, split, device)
        if state["text_checksum"] != training.text_checksum:
            raise UsageError(f"{path} learnt another text; another Python ships another one")
        for name in ("step_count", "seconds", "losses", "held_out"):
            setattr(training, name, state[name])
        training.data_order.set_state(state["data_order"].cpu())
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        return training
