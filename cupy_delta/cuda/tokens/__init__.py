"""Launches of the kernels that go token by token, or row by row; they run on every architecture."""
