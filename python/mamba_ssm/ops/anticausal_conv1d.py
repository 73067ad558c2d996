"""The convolution of the time-reversed input, reversed back: what comes later in place of what came before."""

import torch.nn.functional as F

from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn


def anticausal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """out[b,d,l] = act(bias[d] + sum_w weight[d,w] x[b,d,l+(W-1-w)]), zeros behind x.

    Arguments, layouts and errors are `causal_conv1d_fn`'s, whose kernels do the work.
    With its taps reversed, the causal convolution gives at l + W-1 what is wanted at l, so that W-1 zeros behind x
    are all that has to be copied. Packed sequences end at their own places: there x is flipped, twice.
    """
    by_time = x.stride(-1) == 1
    if seq_idx is not None:
        x = _flip(x, by_time)
        out = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx.flip(-1), activation=activation)
        return _flip(out, by_time)
    reach = weight.shape[1] - 1
    padded = F.pad(x, (0, reach)) if by_time else F.pad(x.mT, (0, 0, 0, reach)).mT
    return causal_conv1d_fn(padded, weight.flip(1), bias, activation=activation)[..., reach:]


def _flip(x, by_time):
    """x (B, D, L) backwards, in its layout: time or channels contiguous."""
    return x.flip(-1) if by_time else x.mT.flip(1).mT
