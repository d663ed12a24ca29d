"""Checkpoints whose weights are quantised: which tensors belong together, and their expansion when they are read."""
