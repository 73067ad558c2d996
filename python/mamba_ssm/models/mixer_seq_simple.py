"""The Mamba language model: embedding, blocks, norm, head."""

import copy
import json
import math
from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from mamba_ssm.utils.generation import GenerationMixin
from mamba_ssm.utils.hf import CONFIG, load_config_hf, load_state_dict_hf, save_state_dict_hf

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def create_block(
    d_model,
    d_intermediate=0,
    ssm_cfg=None,
    attn_layer_idx=None,
    attn_cfg=None,
    norm_epsilon=1e-5,
    rms_norm=False,
    residual_in_fp32=False,
    fused_add_norm=False,
    layer_idx=None,
    device=None,
    dtype=None,
):
    """A Block of width d_model. ssm_cfg: "layer" (default "Mamba1") and the mixer's arguments.

    attn_layer_idx: layers whose mixer is attention instead; attn_cfg: the arguments of `MHA`.
    """
    if d_intermediate is None or isinstance(d_intermediate, dict):
        d_intermediate, ssm_cfg = 0, d_intermediate  # the second argument before mamba_ssm 2
    factory = {"device": device, "dtype": dtype}
    ssm_cfg = copy.deepcopy(ssm_cfg) or {}
    layer = ssm_cfg.pop("layer", "Mamba1")
    if layer not in MIXERS:
        raise ValueError(f'ssm_cfg["layer"] must be one of {sorted(MIXERS)}, got {layer!r}')
    mixer_cls, mixer_cfg = MIXERS[layer], ssm_cfg
    if layer_idx in (attn_layer_idx or ()):
        mixer_cls, mixer_cfg = MHA, attn_cfg or {}
    mlp_cls = nn.Identity
    if d_intermediate:
        mlp_cls = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        partial(mixer_cls, layer_idx=layer_idx, **mixer_cfg, **factory),
        mlp_cls,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1
):
    """For Module.apply: zero biases, normal embeddings, and residual outputs scaled down with depth.

    The scaling keeps the residual's variance from growing with the number of additions (GPT-2).
    """
    if isinstance(module, nn.Linear) and module.bias is not None:
        if not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Token ids (B, L) -> hidden states (B, L, d_model)."""

    def __init__(
        self,
        d_model,
        n_layer,
        d_intermediate,
        vocab_size,
        ssm_cfg=None,
        attn_layer_idx=None,
        attn_cfg=None,
        norm_epsilon=1e-5,
        rms_norm=False,
        initializer_cfg=None,
        fused_add_norm=False,
        residual_in_fp32=False,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                layer_idx=i,
                **factory,
            )
            for i in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        self.apply(
            partial(
                _init_weights,
                n_layer=n_layer,
                **(initializer_cfg or {}),
                n_residuals_per_layer=2 if d_intermediate else 1,
            )
        )

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids, inference_params=None, **mixer_kwargs):
        hidden_states = self.embedding(input_ids)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(
                hidden_states, residual, inference_params=inference_params, **mixer_kwargs
            )
        if self.fused_add_norm:
            return layer_norm_fn(
                hidden_states,
                self.norm_f.weight,
                self.norm_f.bias,
                residual=residual,
                eps=self.norm_f.eps,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(self.norm_f, RMSNorm),
            )
        residual = hidden_states if residual is None else hidden_states + residual
        return self.norm_f(residual.to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """Token ids (B, L) -> logits (B, L, vocabulary), the vocabulary padded to pad_vocab_size_multiple."""

    def __init__(self, config: MambaConfig, initializer_cfg=None, device=None, dtype=None):
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = (config.vocab_size + multiple - 1) // multiple * multiple
        # Initialises itself; the head has nothing to add: no bias, and its weight is the embedding's if tied.
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs
    ):
        """num_last_tokens: logits of only so many tokens, 0 for all. position_ids: ignored."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(cls, pretrained_model_name, device=None, dtype=None, **kwargs):
        """A folder with config.json and weights, or a name on the Hugging Face hub."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        state_dict = load_state_dict_hf(pretrained_model_name, device=device)
        if config.tie_embeddings:  # safetensors keeps one name of a shared tensor
            state_dict.setdefault("lm_head.weight", state_dict.get("backbone.embedding.weight"))
        model.load_state_dict(state_dict)
        return model

    def save_pretrained(self, save_directory, safe_serialization=False):
        """Writes config.json, and pytorch_model.bin or with safe_serialization model.safetensors."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state_dict = self.state_dict()
        if safe_serialization and self.config.tie_embeddings:
            del state_dict["lm_head.weight"]  # from_pretrained ties it again
        save_state_dict_hf(state_dict, folder, safe_serialization)
        (folder / CONFIG).write_text(json.dumps(asdict(self.config), indent=4), encoding="utf-8")
