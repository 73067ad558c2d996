"""Mamba in both directions of time, the base of bidirectional models: images, genomes, EEG, encoders."""

from mamba_ssm.modules.mamba_simple import Mamba, scan_projected
from mamba_ssm.ops.anticausal_conv1d import anticausal_conv1d_fn
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
