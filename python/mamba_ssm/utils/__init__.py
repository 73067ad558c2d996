"""Generation, checkpoints and autocast helpers."""
