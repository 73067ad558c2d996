"""The one source of both wheels' versions; the build reads this file as text."""

__version__ = "2.3.2+native.1"
# Below 1.7 on purpose: from 1.7 on callers expect seq_idx together with initial_states.
causal_conv1d_version = "1.6.1+native.1"
