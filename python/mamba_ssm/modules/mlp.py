"""The gated MLP between mixers."""

import torch.nn.functional as F
from torch import nn


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)) with (y, gate) = fc1(x). Default width 8/3 of the input, rounded up."""

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation=F.silu,
        bias=False,
        multiple_of=128,
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden_features = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden_features = (hidden_features + multiple_of - 1) // multiple_of * multiple_of
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(
            in_features, 2 * hidden_features, bias=bias, device=device, dtype=dtype
        )
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
