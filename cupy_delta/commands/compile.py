"""Compile the CUDA kernels for given shapes ahead of time, into CuPy's cache."""

from __future__ import annotations

from ..arrays import FLOAT_DTYPES
from .console import positive, positives


def add_arguments(parser) -> None:
    parser.add_argument("-K", "--key-size", type=positives, default=[128], metavar="N[,N...]")
    parser.add_argument("-V", "--value-size", type=positive, metavar="N", help="default: V = K")
    parser.add_argument("--dtype", default="bfloat16", choices=list(FLOAT_DTYPES))
    parser.add_argument("--backward", action="store_true", help="the gradients' kernels, too")


def run_command(args) -> int:
    from .console import gpu_problem
    from .main import CommandError

    problem = gpu_problem()
    if problem:
        raise CommandError(f"no GPU can be used: {problem}")
    raise CommandError("this version has no CUDA kernels to compile")
