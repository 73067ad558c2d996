"""The softplus of every Mamba kernel as a plain torch function."""

import torch.nn.functional as F


def softplus(dt):
    """log(1 + exp(dt)) up to 20, dt itself above; any floating dtype, differentiable."""
    return F.softplus(dt, threshold=20.0)
