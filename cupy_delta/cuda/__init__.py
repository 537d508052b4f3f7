"""The CuPy backend. So far it tells what it finds; the operators run on NumPy arrays."""

from .environment import environment

__all__ = ["environment"]
