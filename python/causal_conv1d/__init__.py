"""The causal depthwise convolution under upstream's names; the code and kernels are mamba_ssm's.

As in mamba_ssm, nothing is imported at load.
"""

from mamba_ssm._lazy import attach
from mamba_ssm._version import causal_conv1d_version as __version__

_FUNCTIONS = {
    "causal_conv1d_fn": "causal_conv1d.causal_conv1d_interface",
    "causal_conv1d_update": "causal_conv1d.causal_conv1d_interface",
    "causal_conv1d_varlen_states": "causal_conv1d.causal_conv1d_varlen",
}
__all__ = ["__version__", *_FUNCTIONS]

__getattr__, _names = attach(
    __name__,
    functions=_FUNCTIONS,
    submodules=("causal_conv1d_interface", "causal_conv1d_varlen", "cpp_functions"),
)


def __dir__():
    return ["__version__", *_names()]
