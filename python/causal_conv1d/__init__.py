"""The causal depthwise convolution under upstream's names; the code and kernels are mamba_ssm's."""

from mamba_ssm._version import causal_conv1d_version as __version__

from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__all__ = ["__version__", "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]
