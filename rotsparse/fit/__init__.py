"""Fits of layers, activations and chains: each builds an objective and calls `minimize`."""
