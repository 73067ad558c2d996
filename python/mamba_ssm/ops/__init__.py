"""The operations under upstream's module paths."""

from mamba_ssm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    functions={
        "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
        "selective_state_update": "mamba_ssm.ops.triton.selective_state_update",
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        "mamba_split_conv1d_scan_combined": "mamba_ssm.ops.mamba_split",
    },
    submodules=("causal_conv1d", "mamba_inner", "selective_scan_interface", "sequences", "triton"),
)
