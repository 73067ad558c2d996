"""Mamba in both directions of time, the base of bidirectional models: images, genomes, EEG, encoders."""

import torch
from torch import nn

from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba, scan_projected
from mamba_ssm.ops.anticausal_conv1d import anticausal_conv1d_fn
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.mamba_split import conv1d_scan


class BiMamba(Mamba):
    """Maps (B, L, d_model) to the same shape; every token sees those before and those after it.

    out = out_proj(forward(x, z) + backward(x, z)), with x, z = in_proj(hidden) shared by both directions. backward
    is the layer of the time-reversed sequence; its scan runs backwards in time, and nothing is flipped for it.
    tie_weights: both directions use one set of weights, and the parameters are those of Mamba. Otherwise the second
    set is conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b, the names of Vim's checkpoints (Zhu et al. 2024).
    divide_out: halves the sum, as Vim's if_divide_out does. Everything else is Mamba's.
    """

    def __init__(self, d_model, *args, tie_weights=False, divide_out=False, **kwargs):
        super().__init__(d_model, *args, **kwargs)
        self.tie_weights = tie_weights
        self.divide_out = divide_out
        if not tie_weights:
            other = Mamba(d_model, *args, **kwargs)
            self.conv1d_b = other.conv1d
            self.x_proj_b = other.x_proj
            self.dt_proj_b = other.dt_proj
            self.A_b_log = other.A_log
            self.D_b = other.D

    def _backward_weights(self):
        if self.tie_weights:
            return self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D
        return self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b

    def _convolve(self, function, x, conv1d, seq_idx):
        weight = conv1d.weight.squeeze(1)
        return function(x, weight, conv1d.bias, seq_idx=seq_idx, activation=self.activation)

    def forward(self, hidden_states, inference_params=None, seq_idx=None):
        """(B, L, d_model) -> (B, L, d_model).

        seq_idx: (B, L) int32, for sequences packed behind each other: the sequence of each token. Sequences do not
        see each other. inference_params must be None: what comes later is part of every output.
        """
        if inference_params is not None:
            raise ValueError(
                "BiMamba sees the whole sequence at once, so it has no decoding and no cache; "
                "expected inference_params=None"
            )
        x, z = self._input(hidden_states).chunk(2, dim=1)
        u = self._convolve(causal_conv1d_fn, x, self.conv1d, seq_idx)
        y = scan_projected(u, z, self.x_proj, self.dt_proj, self.A_log, self.D, seq_idx=seq_idx)
        conv1d, *projections = self._backward_weights()
        u = self._convolve(anticausal_conv1d_fn, x, conv1d, seq_idx)
        y = y + scan_projected(u, z, *projections, reverse=True, seq_idx=seq_idx)
        if self.divide_out:
            y = y / 2
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states, conv_state, ssm_state):
        raise ValueError("BiMamba has no decoding: every output depends on what comes later")

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        raise ValueError("BiMamba has no cache: every output depends on what comes later")


FUSIONS = ("sum", "concat", "gated")


class BiMamba2(Mamba2):
    """Maps (B, L, d_model) to the same shape; every token sees those before and those after it.

    One projection in, convolution and scan in both directions of time, one gated norm and one projection out:
    out = out_proj(norm(fuse(y_forward, y_backward), z)). backward is what Mamba-2 makes of the time-reversed sequence;
    its scan runs backwards in time, and nothing is flipped for it.
    fusion: "sum" of both; "concat", side by side, which widens norm and out_proj by d_ssm; "gated", g y_forward +
    (1 - g) y_backward with g = sigmoid(fusion_gate(u)), a number for each token and head.
    tie_weights: both directions use one convolution, dt_bias, A and D, and the parameters are those of Mamba2 (and
    fusion_gate). Otherwise the second set is conv1d_b, dt_bias_b, A_b_log, D_b. Everything else is Mamba2's.

    Memory grows linearly with L. 60 seconds of 64 channels of EEG at 256 Hz, four recordings at once:

    >>> layer = BiMamba2(d_model=64)
    >>> recordings = torch.randn(4, 15360, 64)
    >>> layer(recordings).shape
    torch.Size([4, 15360, 64])
    """

    def __init__(self, d_model, *args, tie_weights=False, fusion="sum", **kwargs):
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {FUSIONS}, got {fusion!r}")
        super().__init__(d_model, *args, **kwargs)
        self.tie_weights = tie_weights
        self.fusion = fusion
        if not tie_weights:
            other = Mamba2(d_model, *args, **kwargs)
            self.conv1d_b = other.conv1d
            self.dt_bias_b = other.dt_bias
            self.A_b_log = other.A_log
            self.D_b = other.D
        weight = self.out_proj.weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        if fusion == "gated":
            self.fusion_gate = nn.Linear(d_model, self.nheads, **factory)
        if fusion == "concat":
            width = self.d_inner + self.d_ssm
            bias = self.out_proj.bias is not None
            self.out_proj = nn.Linear(width, d_model, bias=bias, **factory)
            if self.rmsnorm:
                self.norm = self._gated_norm(2 * self.d_ssm, factory)

    def _weights(self, reverse):
        if self.tie_weights or not reverse:
            return self.conv1d, self.dt_bias, self.A_log, self.D
        return self.conv1d_b, self.dt_bias_b, self.A_b_log, self.D_b

    def _direction(self, xBC, dt, z, seq_idx, reverse):
        """(B, L, d_ssm), gated by z unless the norm does it."""
        conv1d, dt_bias, A_log, D = self._weights(reverse)
        return conv1d_scan(
            xBC,
            conv1d.weight.squeeze(1),
            conv1d.bias,
            dt,
            -torch.exp(A_log.float()),
            self.chunk_size,
            D=self._by_head(D),
            z=None if self.rmsnorm else z,
            dt_bias=dt_bias,
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            activation=self.activation,
            headdim=self.headdim,
            ngroups=self.ngroups,
            reverse=reverse,
            recompute=self.use_mem_eff_path,
        )

    def _fuse(self, u, forward, backward):
        if self.fusion == "sum":
            return forward + backward
        if self.fusion == "concat":
            return torch.cat([forward, backward], dim=-1)
        gate = torch.sigmoid(self.fusion_gate(u)).to(forward.dtype)
        return backward + gate.repeat_interleave(self.headdim, dim=-1) * (forward - backward)

    def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
        """(B, L, d_model) -> (B, L, d_model); seqlen, seq_idx and cu_seqlens as `Mamba2` takes them.

        Packed sequences do not see each other. inference_params must be None: what comes later is part of every
        output, so that there is nothing to decode token by token.
        """
        if inference_params is not None:
            raise ValueError(
                "BiMamba2 sees the whole sequence at once, so it has no decoding and no cache; "
                "expected inference_params=None"
            )
        u, seq_idx = self._sequences(u, seqlen, seq_idx, cu_seqlens)
        zx0, z, xBC, dt = self._parts(self.in_proj(u))
        forward, backward = (
            self._direction(xBC, dt, z, seq_idx, reverse) for reverse in (False, True)
        )
        z = torch.cat([z, z], dim=-1) if self.fusion == "concat" and self.rmsnorm else z
        out = self._output(zx0, z, self._fuse(u, forward, backward))
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states, conv_state, ssm_state):
        raise ValueError("BiMamba2 has no decoding: every output depends on what comes later")

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        raise ValueError("BiMamba2 has no cache: every output depends on what comes later")
