"""What the examples ask for: a device for their arrays, and pictures that can be drawn.

Both are looked at before the work, and what is missing is one line that says what helps.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from cupy_delta.commands.console import gpu_problem
from cupy_delta.commands.main import CommandError
from cupy_delta.commands.output import check_picture, save_figure
from cupy_delta.extras import EXTRAS, install_command

__all__ = ["can_draw", "parser_of", "save_figure", "surroundings"]


def parser_of(doc: str | None, picture: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows of devices and of a picture, by default of this name or none.

    It describes the program by the first line of what its module says, nothing with python -OO.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    shown = "default: %(default)s" if picture else "default: none"
    parser.add_argument("-o", "--output", default=picture, help=f"picture to write ({shown})")
    return parser


def surroundings(device: str, picture: str | None):
    """Return NumPy or CuPy, and whether a picture can be drawn; None, once it is said why not."""
    try:
        if device == "gpu" and (problem := gpu_problem()):
            raise CommandError(f"no GPU can be used: {problem}")
        drawn = picture is not None and can_draw()
        if drawn:
            check_picture(picture)
    except CommandError as error:
        print(error, file=sys.stderr)
        return None
    if device == "cpu":
        return np, drawn
    import cupy

    return cupy, drawn


def can_draw() -> bool:
    """Tell whether there is matplotlib, and what helps if there is none."""
    try:
        import matplotlib
    except ImportError:
        print(f"no picture: {install_command(*EXTRAS['plot'])}")
        return False
    matplotlib.use("Agg")
    return True
