"""Mamba-2 as its paper introduces it: every channel goes through the scan, and states may start from learnt ones."""

import torch
from torch import nn

from mamba_ssm.modules.mamba2 import Mamba2


class Mamba2Simple(Mamba2):
    """Maps (B, L, d_model) to the same shape, causally; the arguments are those of `Mamba2` that it has.

    learnable_init_states: init_states (H, P, N), zeros before training, are the states that a row starts from; of
    packed sequences only the first does. activation: None, "silu" or "swish", of the convolution.
    """

    def __init__(
        self,
        d_model,
        d_state=64,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=128,
        ngroups=1,
        A_init_range=(1, 16),
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        learnable_init_states=False,
        activation="swish",
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            conv_init=conv_init,
            expand=expand,
            headdim=headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            shape = (self.nheads, self.headdim, d_state)
            self.init_states = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
            self.init_states._no_weight_decay = True

    def _initial_states(self, batch_size):
        if not self.learnable_init_states:
            return None
        return self.init_states.expand(batch_size, -1, -1, -1)

    def forward(self, u, seq_idx=None, inference_params=None):
        """(B, L, d_model) -> (B, L, d_model); see `Mamba2`."""
        return super().forward(u, seq_idx=seq_idx, inference_params=inference_params)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """As `Mamba2`'s, with ssm_state from init_states where they are learnt."""
        conv_state, ssm_state = super().allocate_inference_cache(batch_size, max_seqlen, dtype)
        if self.learnable_init_states:
            ssm_state.copy_(self.init_states.detach())
        return conv_state, ssm_state
