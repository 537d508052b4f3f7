"""Launches of the kernels for compute capability 9.0."""
