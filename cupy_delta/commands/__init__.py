"""What ``python -m cupy_delta COMMAND`` does, one file per command."""

from .main import main

__all__ = ["main"]
