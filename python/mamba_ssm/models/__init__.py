"""Language models with upstream's state dicts."""
