"""Every native operation, resolved once: `torch.ops.mamba_native.<name>.default`."""

from mamba_ssm.native.causal_conv1d import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_ssm.native.gated_norm import gated_norm_backward, gated_norm_forward
from mamba_ssm.native.info import native_info
from mamba_ssm.native.layer_norm import (
    layer_norm_backward,
    layer_norm_branches_backward,
    layer_norm_branches_forward,
    layer_norm_forward,
)
from mamba_ssm.native.selective_scan import selective_scan_backward, selective_scan_forward
from mamba_ssm.native.ssd import ssd_backward, ssd_forward
from mamba_ssm.native.state_update import selective_state_update

__all__ = [
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "gated_norm_backward",
    "gated_norm_forward",
    "layer_norm_backward",
    "layer_norm_branches_backward",
    "layer_norm_branches_forward",
    "layer_norm_forward",
    "native_info",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_state_update",
    "ssd_backward",
    "ssd_forward",
]
