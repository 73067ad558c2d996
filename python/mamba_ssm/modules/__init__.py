"""Layers with upstream's parameters, initialisation and caches."""
