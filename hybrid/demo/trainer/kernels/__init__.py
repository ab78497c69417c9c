"""Numba kernels of the training step."""
