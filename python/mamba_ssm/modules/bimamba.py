"""Mamba in both directions of time, the base of bidirectional models: images, genomes, EEG, encoders."""

import torch.nn.functional as F

from mamba_ssm.modules.mamba_simple import Mamba, scan_projected
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn


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
        u = _convolve(x, self.conv1d, self.activation, seq_idx)
        y = scan_projected(u, z, self.x_proj, self.dt_proj, self.A_log, self.D, seq_idx=seq_idx)
        conv1d, *projections = self._backward_weights()
        u = _convolve_reversed(x, conv1d, self.activation, seq_idx)
        y = y + scan_projected(u, z, *projections, reverse=True, seq_idx=seq_idx)
        if self.divide_out:
            y = y / 2
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states, conv_state, ssm_state):
        raise ValueError("BiMamba has no decoding: every output depends on what comes later")

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        raise ValueError("BiMamba has no cache: every output depends on what comes later")


def _convolve(x, conv1d, activation, seq_idx):
    weight = conv1d.weight.squeeze(1)
    return causal_conv1d_fn(x, weight, conv1d.bias, seq_idx=seq_idx, activation=activation)


def _convolve_reversed(x, conv1d, activation, seq_idx):
    """The convolution of the time-reversed x, reversed back: out[l] = sum_w weight[w] x[l + W-1-w].

    With its taps reversed, the causal convolution gives at l + W-1 what is wanted at l, so that W-1 zeros behind x
    are all that has to be copied. Packed sequences end at their own places: there x is flipped, twice.
    """
    weight = conv1d.weight.squeeze(1)
    if seq_idx is not None:
        flipped = _convolve(x.flip(-1), conv1d, activation, seq_idx.flip(-1))
        return flipped.flip(-1)
    reach = weight.shape[1] - 1
    padded = F.pad(x, (0, reach))
    out = causal_conv1d_fn(padded, weight.flip(1), conv1d.bias, activation=activation)
    return out[..., reach:]
