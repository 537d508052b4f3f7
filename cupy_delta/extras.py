"""What optional parts need, and the command that installs it beside this Python.

The command names the packages themselves and not ``cupy_delta[...]``, so that it works from a
checkout and in an environment that is not activated. The same lists are the extras of setup.cfg.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys

EXTRAS = {
    "cuda12": ("cupy-cuda12x>=14.2", "cuda-toolkit[cudart,nvrtc]==12.*"),
    "cuda13": ("cupy-cuda13x>=14.2", "cuda-toolkit[cudart,nvrtc]==13.*"),
    "examples": ("matplotlib>=3.8", "padasip>=1.2", "statsmodels>=0.14"),
    "jax": ("jax>=0.5",),
    "parallel": ("mpi4py>=4",),
    "plot": ("matplotlib>=3.8", "rich>=13"),
}


def install_command(*requirements: str) -> str:
    """Return the command line that installs some packages for the Python that runs.

    Examples
    --------
    >>> from cupy_delta.extras import EXTRAS, install_command
    >>> install_command(*EXTRAS["plot"]).endswith("install 'matplotlib>=3.8' 'rich>=13'")
    True
    """
    return _pip("install", *requirements)


def uninstall_command(*names: str) -> str:
    """Return the command line that takes some packages away from the Python that runs."""
    return _pip("uninstall", *names)


def _pip(verb: str, *words: str) -> str:
    python = sys.executable or "python3"
    if importlib.util.find_spec("pip") is not None:
        return shlex.join([python, "-m", "pip", verb, *words])
    # An environment that was made by uv has no pip of its own.
    return shlex.join(["uv", "pip", verb, "--python", python, *words])
