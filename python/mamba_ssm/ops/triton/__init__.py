"""Upstream's paths of operations that were Triton kernels there; here they are native, Triton is not used.

`selective_state_update` stays the module, not the function of the same name inside it.
"""

from mamba_ssm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    functions={},
    submodules=(
        "k_activations",
        "layer_norm",
        "layernorm",
        "layernorm_gated",
        "selective_state_update",
        "softplus",
        "ssd_bmm",
        "ssd_chunk_scan",
        "ssd_chunk_state",
        "ssd_combined",
        "ssd_state_passing",
    ),
)
