"""Kernels for compute capability 9.0: 16-bit arrays in chunks of 64, with TMA and wgmma."""

from . import backward, channel, forward, shares, tiles, training

__all__ = ["backward", "channel", "forward", "shares", "tiles", "training"]
