"""The Mamba-1 layer (Gu & Dao 2023, section 3.4): projection, convolution, selective scan, gate, projection."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mamba_ssm.modules.block import Block as Block
from mamba_ssm.modules.cache import states_of_layer
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.mamba_inner import mamba_inner_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update


def project(weight, rows):
    """weight times rows (B, L, features), as (B, features, L): time contiguous, as the kernels like it."""
    return (weight @ rows.flatten(0, 1).t()).unflatten(1, rows.shape[:2]).transpose(0, 1)


def scan_parameters(A_log, D, dt_proj):
    """A, D and the bias of delta, in float32 whatever the dtype of the rest."""
    return -torch.exp(A_log.float()), D.float(), dt_proj.bias.float()


def scan_projected(x, z, x_proj, dt_proj, A_log, D, **options):
    """The scan of x gated by z, both (B, D, L), with delta, B and C projected from x.

    options: those of `selective_scan_fn`, whose result is returned.
    """
    d_state = A_log.shape[1]
    dt, B, C = x_proj(x.transpose(1, 2)).split([dt_proj.in_features, d_state, d_state], dim=-1)
    A, D, dt_bias = scan_parameters(A_log, D, dt_proj)
    return selective_scan_fn(
        x,
        project(dt_proj.weight, dt),
        A,
        B.transpose(1, 2).contiguous(),
        C.transpose(1, 2).contiguous(),
        D,
        z=z,
        delta_bias=dt_bias,
        delta_softplus=True,
        **options,
    )


class Mamba(nn.Module):
    """Maps (B, L, d_model) to the same shape, causally.

    d_state: N, states a channel; d_conv: width of the convolution; expand: inner width over d_model; dt_rank:
    rank of the step size's projection, ceil(d_model / 16) for "auto". Step sizes start between dt_min and dt_max.
    use_fast_path: without a cache, the backward pass computes inner tensors again instead of keeping them.
    layer_idx: this layer's key in the inference cache.
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__()
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._init_dt_proj(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        # A = -exp(A_log) and D stay in float32 whatever the dtype of the rest.
        states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = nn.Parameter(torch.log(states).repeat(self.d_inner, 1))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _init_dt_proj(self, dt_min, dt_max, dt_init, dt_scale, dt_init_floor):
        """The weight keeps the input's variance; softplus(bias) is log-uniform in [dt_min, dt_max]."""
        scale = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -scale, scale)
        else:
            raise NotImplementedError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        log_min, log_max = math.log(dt_min), math.log(dt_max)
        uniform = torch.rand(self.d_inner, device=self.dt_proj.bias.device)
        dt = torch.exp(uniform * (log_max - log_min) + log_min).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.dt_proj.bias._no_reinit = True

    def _input(self, hidden_states):
        """x and z before the convolution, (B, 2 d_inner, L)."""
        xz = project(self.in_proj.weight, hidden_states)
        if self.in_proj.bias is not None:
            xz = xz + self.in_proj.bias.to(xz.dtype)[:, None]
        return xz

    def forward(self, hidden_states, inference_params=None, seq_idx=None):
        """(B, L, d_model) -> (B, L, d_model); with inference_params the cache is written or continued.

        seq_idx: (B, L) int32, for sequences packed behind each other: the sequence of each token. Sequences do not
        see each other. Not with inference_params, whose cache has room for one sequence a row.
        """
        conv_state = ssm_state = None
        if inference_params is not None:
            if seq_idx is not None:
                raise ValueError(
                    "seq_idx packs sequences, and a cache has room for one a row: give one of both"
                )
            batch = hidden_states.shape[0]
            conv_state, ssm_state = self._get_states_from_cache(inference_params, batch)
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]

        xz = self._input(hidden_states)
        if self.use_fast_path and inference_params is None and seq_idx is None:
            A, D, dt_bias = scan_parameters(self.A_log, self.D, self.dt_proj)
            return mamba_inner_fn(
                xz,
                self.conv1d.weight,
                self.conv1d.bias,
                self.x_proj.weight,
                self.dt_proj.weight,
                self.out_proj.weight,
                self.out_proj.bias,
                A,
                D=D,
                delta_bias=dt_bias,
                delta_softplus=True,
            )
        x, z = xz.chunk(2, dim=1)
        if conv_state is not None:
            conv_state.copy_(F.pad(x, (self.d_conv - x.shape[2], 0)))
        x = causal_conv1d_fn(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            seq_idx=seq_idx,
            activation=self.activation,
        )
        y = scan_projected(
            x,
            z,
            self.x_proj,
            self.dt_proj,
            self.A_log,
            self.D,
            return_last_state=ssm_state is not None,
            seq_idx=seq_idx,
        )
        if ssm_state is not None:
            y, last_state = y
            ssm_state.copy_(last_state)
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states, conv_state, ssm_state):
        """One token (B, 1, d_model) -> (out (B, 1, d_model), conv_state, ssm_state), states changed in place."""
        assert hidden_states.shape[1] == 1, "decoding takes one token at a time"
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(
            x.to(conv_state.dtype),  # the cache has its own under autocast, or as the caller wished
            conv_state,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.activation,
        ).to(z.dtype)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state,
            x,
            F.linear(dt, self.dt_proj.weight),
            self.A_log,
            B,
            C,
            self.D,
            z=z,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            A_is_log=True,
        )
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """Zeros: conv_state (B, d_inner, d_conv) and ssm_state (B, d_inner, d_state)."""

        def zeros(width, weight):
            shape = (batch_size, self.d_inner, width)
            return torch.zeros(shape, device=weight.device, dtype=dtype or weight.dtype)

        return zeros(self.d_conv, self.conv1d.weight), zeros(self.d_state, self.dt_proj.weight)

    def _get_states_from_cache(self, inference_params, batch_size, initialize_states=False):
        return states_of_layer(self, inference_params, batch_size, initialize_states)
