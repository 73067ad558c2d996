"""Mamba from one wheel: native kernels for CPU and CUDA behind the names of upstream's package.

Nothing is imported at load, so that `python -m mamba_ssm` runs even where torch is missing or broken.
"""

from mamba_ssm._lazy import attach
from mamba_ssm._version import __version__ as __version__

__getattr__, _names = attach(
    __name__,
    functions={
        "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
        "mamba_inner_fn": "mamba_ssm.ops.mamba_inner",
        "falcon_mamba_inner_fn": "mamba_ssm.ops.mamba_inner",
        "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.mamba_split",
        "Mamba": "mamba_ssm.modules.mamba_simple",
        "Mamba2": "mamba_ssm.modules.mamba2",
        "MambaLMHeadModel": "mamba_ssm.models.mixer_seq_simple",
    },
    submodules=("layers", "models", "modules", "native", "ops", "utils"),
)


def __dir__():
    return ["__version__", *_names()]
