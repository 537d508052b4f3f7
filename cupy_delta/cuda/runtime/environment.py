"""What CuPy and CUDA this machine has; asking never raises."""

from __future__ import annotations

import importlib.util
import os

LOWEST_CAPABILITY = 8


def environment() -> dict:
    """Describe the CUDA side of this machine.

    Returns
    -------
    dict
        ``facts``, names and values to print; ``problem``, one line why CuPy arrays cannot be used
        here and what to do, or None; ``support``, what runs on them.
    """
    facts: dict[str, str] = {}
    return {
        "facts": facts,
        "problem": _explore(facts),
        "support": "run the CUDA kernels; gradients through gates and per-channel gates do not",
    }


def _explore(facts: dict[str, str]) -> str | None:
    if importlib.util.find_spec("cupy") is None:
        facts["CuPy"] = "not installed"
        return 'CuPy is not installed: pip install "cupy_delta[cuda12]" (or cuda13)'
    try:
        import cupy
    except Exception as error:
        facts["CuPy"] = "broken"
        return f"import cupy fails ({_line(error)}): reinstall cupy-cuda12x or cupy-cuda13x"
    facts["CuPy"] = cupy.__version__
    facts["kernel cache"] = os.environ.get("CUPY_CACHE_DIR") or os.path.join(
        "~", ".cupy", "kernel_cache"
    )
    facts["NVRTC"] = _try(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion())))
    facts["CUDA headers"] = _try(_headers)
    facts["driver"] = _try(lambda: str(cupy.cuda.runtime.driverGetVersion()))
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no usable NVIDIA driver ({_line(error)})"
    for i in range(count):
        facts[f"device {i}"] = _try(lambda i=i: _device(i))
    if not count:
        return "CuPy finds no NVIDIA GPU"
    majors = [cupy.cuda.runtime.getDeviceProperties(i)["major"] for i in range(count)]
    if max(majors) < LOWEST_CAPABILITY:
        return f"no GPU of compute capability {LOWEST_CAPABILITY}.0 or newer"
    return None


def _device(index: int) -> str:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name = properties["name"].decode()
    memory = properties["totalGlobalMem"] / 2**30
    return f"{name}, compute {properties['major']}.{properties['minor']}, {memory:.0f} GiB"


def _headers() -> str:
    from cuda import pathfinder

    return str(pathfinder.find_nvidia_header_directory("cudart") or "not found")


def _try(ask) -> str:
    try:
        return ask()
    except Exception as error:
        return f"unknown ({_line(error)})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
