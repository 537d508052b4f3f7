"""Launches of the kernels that run on every architecture."""
