"""Show versions, devices and what runs where.

Works on a machine with nothing but NumPy and SciPy, and with a broken CuPy: every reason why CuPy
arrays cannot be used is then one line of the output, with what helps.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from ..version import __version__

PACKAGES = ("numpy", "scipy", "ml_dtypes", "threadpoolctl", "matplotlib", "rich")


def add_arguments(parser) -> None:
    del parser


def run_command(args) -> int:
    from ..cuda import environment
    from ..reference.parallel import thread_count

    del args
    lines = [("cupy_delta", __version__)]
    lines.append(("Python", f"{platform.python_version()} on {platform.platform(terse=True)}"))
    lines += [(name, _version(name)) for name in PACKAGES]
    try:
        lines.append(("NumPy arrays", f"run the NumPy/SciPy backend on {thread_count()} threads"))
    except ValueError as error:  # of the environment variable
        lines.append(("NumPy arrays", f"cannot be used here: {error}"))
    cuda = environment()
    lines += [(name, value) for name, value in cuda["facts"].items()]
    lines += [("CuPy arrays", f"cannot be used here: {line}") for line in cuda["problems"]]
    if not cuda["problems"]:
        lines.append(("CuPy arrays", cuda["support"]))
    lines += [("take care", line) for line in cuda["notices"]]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name.ljust(width)}  {value}")
    return 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
