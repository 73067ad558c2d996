"""The Mamba-2 layer (Dao & Gu 2024, section 7): one projection, convolution, chunked scan, gated norm, projection."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.modules.cache import states_of_layer
from mamba_ssm.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_ssm.ops.mamba_split import mamba_split_conv1d_scan_combined
from mamba_ssm.ops.sequences import sequence_of_steps
from mamba_ssm.ops.triton.k_activations import swiglu
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:
        """Stands in for from_pretrained, save_pretrained and push_to_hub where huggingface_hub is not installed."""


class Mamba2(nn.Module, PyTorchModelHubMixin):
    """Maps (B, L, d_model) to the same shape, causally.

    d_state: N, states a channel; d_conv: width of the convolution, whose weights start within conv_init if given;
    expand: inner width over d_model; headdim: P, channels of a head; d_ssm: channels that go through the scan, the
    rest is a gated MLP, all when None; ngroups: G, groups of heads that share B and C.
    A starts within -A_init_range; D_has_hdim: D for each channel, not for each head. rmsnorm: normalises the scan's
    output, before its gate with norm_before_gate, else after it. Step sizes start between dt_min and dt_max, at least
    dt_init_floor, and are clamped to dt_limit at any time. chunk_size changes nothing here: kernels choose their own.
    use_mem_eff_path: without a cache, the backward pass computes inner tensors again instead of keeping them.
    layer_idx: this layer's key in the inference cache. process_group must be None, and sequence_parallel is then not
    read: this layer is not split over devices.
    """

    def __init__(
        self,
        d_model,
        d_state=128,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=64,
        d_ssm=None,
        ngroups=1,
        A_init_range=(1, 16),
        D_has_hdim=False,
        rmsnorm=True,
        norm_before_gate=False,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        process_group=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        if process_group is not None:
            raise ValueError(
                "Mamba2 is not split over devices: process_group must be None, "
                f"got {type(process_group).__name__}"
            )
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.conv_init = conv_init
        self.expand = expand
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.world_size = 1
        self.local_rank = 0
        self.d_inner = int(expand * d_model)
        self.headdim = headdim
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups = ngroups
        assert self.d_ssm <= self.d_inner, (
            f"d_ssm must be at most expand * d_model = {self.d_inner}, got {self.d_ssm}"
        )
        assert self.d_ssm % headdim == 0, (
            f"headdim must divide the {self.d_ssm} channels of the scan, got {headdim}"
        )
        self.nheads = self.d_ssm // headdim
        assert self.nheads % ngroups == 0, (
            f"ngroups must divide the number of heads, {self.nheads}, got {ngroups}"
        )
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.dt_limit = tuple(dt_limit)
        self.activation = "silu"
        self.chunk_size = chunk_size
        self.use_mem_eff_path = use_mem_eff_path
        self.layer_idx = layer_idx
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state

        width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, **factory)
        self.conv1d = self._convolution(conv_bias, factory)
        self.dt_bias = self._step_bias(dt_min, dt_max, dt_init_floor, factory)
        self.A_log = self._decay(A_init_range, factory)
        self.D = self._skip(device)
        if rmsnorm:
            self.norm = self._gated_norm(self.d_ssm, factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _convolution(self, bias, factory):
        conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim,
            kernel_size=self.d_conv,
            groups=self.conv_dim,
            padding=self.d_conv - 1,
            bias=bias,
            **factory,
        )
        if self.conv_init is not None:
            nn.init.uniform_(conv1d.weight, -self.conv_init, self.conv_init)
        return conv1d

    def _step_bias(self, dt_min, dt_max, dt_init_floor, factory):
        """softplus(bias) is log-uniform in [dt_min, dt_max]."""
        log_min, log_max = math.log(dt_min), math.log(dt_max)
        uniform = torch.rand(self.nheads, device=factory["device"])
        dt = torch.exp(uniform * (log_max - log_min) + log_min).clamp(min=dt_init_floor)
        bias = dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
        return _no_weight_decay(nn.Parameter(bias.to(factory["dtype"])))

    def _decay(self, A_init_range, factory):
        """A = -exp(A_log)."""
        low, high = A_init_range
        assert 0 < low <= high, f"A_init_range must be positive and sorted, got {A_init_range}"
        A = torch.empty(self.nheads, dtype=torch.float32, device=factory["device"])
        return _no_weight_decay(nn.Parameter(A.uniform_(low, high).log().to(factory["dtype"])))

    def _skip(self, device):
        size = self.d_ssm if self.D_has_hdim else self.nheads
        return _no_weight_decay(nn.Parameter(torch.ones(size, device=device)))

    def _gated_norm(self, width, factory):
        return RMSNorm(
            width,
            eps=1e-5,
            group_size=self.d_ssm // self.ngroups,
            norm_before_gate=self.norm_before_gate,
            **factory,
        )

    def _by_head(self, D):
        """D as the operations take it: (H), or (H, P) where each channel has its own."""
        return D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else D

    def _initial_states(self, batch_size):
        return None

    def _parts(self, zxbcdt):
        """(zx0, z, xBC, dt) of the projection's features."""
        extra = 2 * (self.d_inner - self.d_ssm)
        return zxbcdt.split([extra, self.d_ssm, self.conv_dim, self.nheads], dim=-1)

    def _output(self, zx0, z, y):
        """Norm, the MLP's part and projection of the scan's output y (..., d_ssm)."""
        if self.rmsnorm:
            y = self.norm(y, z)
        if zx0.shape[-1]:
            y = torch.cat([swiglu(zx0), y], dim=-1)
        return self.out_proj(y)

    def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
        """(B, L, d_model) -> (B, L, d_model); with inference_params the cache is written or continued.

        seqlen: L where u is (B L, d_model), which is then the result's shape too.
        Sequences packed behind each other do not see each other. seq_idx: (B, L) int32, the sequence of each token;
        cu_seqlens: (S + 1) int32 or int64, batch 1, where they begin and the last one ends; either is enough. With
        inference_params it takes cu_seqlens, and the cache has a row for each sequence.
        """
        u, seq_idx = self._sequences(u, seqlen, seq_idx, cu_seqlens)
        states = None
        if inference_params is not None:
            if seq_idx is not None and cu_seqlens is None:
                raise ValueError(
                    "a cache has a row for each packed sequence: Mamba2 needs cu_seqlens beside "
                    "seq_idx and inference_params, got None"
                )
            rows = len(u) if cu_seqlens is None else len(cu_seqlens) - 1
            states = self._get_states_from_cache(inference_params, rows)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        zxbcdt = self.in_proj(u)
        if self.use_mem_eff_path and states is None:
            out = self._fused(zxbcdt, seq_idx)
        else:
            out = self._unfused(zxbcdt, seq_idx, cu_seqlens, states)
        return out if seqlen is None else out.flatten(0, 1)

    def _sequences(self, u, seqlen, seq_idx, cu_seqlens):
        """(u (B, L, d_model), seq_idx or None) of `forward`'s arguments."""
        if seqlen is not None:
            u = u.unflatten(0, (u.shape[0] // seqlen, seqlen))
        if cu_seqlens is not None and seq_idx is None:
            seq_idx, _ = sequence_of_steps(type(self).__name__, cu_seqlens, *u.shape[:2], u.device)
        return u, seq_idx

    def _fused(self, zxbcdt, seq_idx):
        norm = {}
        if self.rmsnorm:
            norm = {"rmsnorm_weight": self.norm.weight, "rmsnorm_eps": self.norm.eps}
        return mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            self._by_head(self.D),
            self.chunk_size,
            initial_states=self._initial_states(zxbcdt.shape[0]),
            seq_idx=seq_idx,
            dt_limit=self.dt_limit,
            activation=self.activation,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
            **norm,
        )

    def _unfused(self, zxbcdt, seq_idx, cu_seqlens, states):
        """states: the cache to write, (conv_state, ssm_state), or None."""
        zx0, z, xBC, dt = self._parts(zxbcdt)
        if states is not None:
            conv_state, ssm_state = states
            if cu_seqlens is None:
                conv_state.copy_(F.pad(xBC.transpose(1, 2), (self.d_conv - xBC.shape[1], 0)))
            else:
                last = causal_conv1d_varlen_states(xBC.squeeze(0), cu_seqlens, self.d_conv)
                conv_state.copy_(last)
        xBC = causal_conv1d_fn(
            xBC.transpose(1, 2),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            activation=self.activation,
        ).transpose(1, 2)
        x, B, C = self._heads(xBC)
        packed = states is not None and cu_seqlens is not None
        y = mamba_chunk_scan_combined(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.chunk_size,
            D=self._by_head(self.D),
            z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            dt_bias=self.dt_bias,
            initial_states=self._initial_states(len(ssm_state) if packed else xBC.shape[0]),
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens if packed else None,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=states is not None and not packed,
            return_varlen_states=packed,
        )
        if states is not None:
            y, last_states = y
            ssm_state.copy_(last_states)
        return self._output(zx0, z, y.flatten(2))

    def _heads(self, xBC):
        """x (..., H, P), B and C (..., G, N)."""
        states = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, states, states], dim=-1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def step(self, hidden_states, conv_state, ssm_state):
        """One token (B, 1, d_model) -> (out (B, 1, d_model), conv_state, ssm_state), states changed in place."""
        assert hidden_states.shape[1] == 1, "decoding takes one token at a time"
        zx0, z, xBC, dt = self._parts(self.in_proj(hidden_states.squeeze(1)))
        xBC = causal_conv1d_update(
            xBC.to(
                conv_state.dtype
            ),  # the cache has its own under autocast, or as the caller wished
            conv_state,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.activation,
        ).to(z.dtype)
        x, B, C = self._heads(xBC)

        def by_channel(tensor):
            """(..., H) as (..., H, P)."""
            if tensor is None:
                return None
            return tensor.unsqueeze(-1).expand(*tensor.shape, self.headdim)

        y = selective_state_update(
            ssm_state,
            x,
            by_channel(dt),
            by_channel(self.A_log).unsqueeze(-1).expand(-1, -1, self.d_state),
            B,
            C,
            self._by_head(self.D) if self.D_has_hdim else by_channel(self.D),
            z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            dt_bias=by_channel(self.dt_bias),
            dt_softplus=True,
            dt_limit=self.dt_limit,
            A_is_log=True,
        )
        return self._output(zx0, z, y.flatten(1)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """conv_state (B, channels, d_conv), zeros with channels contiguous, and ssm_state (B, H, P, N), zeros."""

        def zeros(weight, *shape):
            return torch.zeros(shape, device=weight.device, dtype=dtype or weight.dtype)

        conv_state = zeros(self.conv1d.weight, batch_size, self.d_conv, self.conv_dim)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state.transpose(1, 2), zeros(self.in_proj.weight, *shape)

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        return states_of_layer(self, inference_params, batch_size, initialize_states)


def _no_weight_decay(parameter):
    parameter._no_weight_decay = True
    return parameter
