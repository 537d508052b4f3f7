"""What a contestant costs beside its kernels: first call, host time per call, size on disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import numpy as np

from .contestants import CONTESTANTS, Ours
from .rows import Row, draw
from .timing import one_line

VERSIONS = (
    *("cupy-cuda12x", "cupy-cuda13x", "numpy", "torch", "triton", "fla-core", "flash_qla"),
    *("tilelang", "flashinfer-python", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend"),
)
CACHES = (
    *("CUPY_CACHE_DIR", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR"),
    *("TILELANG_TMP_DIR", "CUTE_DSL_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"),
)
FIRST = Row("first", (1024,), 4, 4)


def first_result(name: str) -> None:
    """Compute one forward of a small problem; prints the time of day at its end."""
    contestant = CONTESTANTS[name]
    copy = contestant(draw(FIRST, np, dtype="float16"))
    copy.forward()
    contestant.synchronise()
    print("at", time.time())


def first_call(names: list[str], script: str, seconds: float = 240) -> dict[str, dict]:
    """Seconds from the start of Python to the first result: empty caches, then warm ones."""
    found: dict[str, dict] = {}
    for name in names:
        found[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            env = os.environ | {key: os.path.join(folder, key) for key in CACHES}
            for key in CACHES:
                os.mkdir(env[key])
            for state in ("cold", "warm"):
                command = [sys.executable, script, "--first-result-of", name]
                options = {"env": env, "capture_output": True, "text": True, "timeout": seconds}
                start = time.time()
                try:
                    done = subprocess.run(command, check=False, **options)
                    at = re.search(r"^at (\S+)$", done.stdout, re.MULTILINE)
                    if at is None:
                        last = done.stderr.strip().splitlines()[-1:]
                        found[name]["failed"] = "".join(last)[:200]
                        break
                    found[name][state] = float(at[1]) - start
                except subprocess.TimeoutExpired as error:
                    found[name]["failed"] = one_line(error)
                    break
    return found


def host_microseconds(gpu, contestant, row: Row, calls: int = 200) -> float:
    """Time the host needs to issue one forward of a small problem, nothing waited for."""
    with gpu.current():
        copy = contestant(draw(row, gpu.cupy))
        for _ in range(20):
            copy.forward()
        gpu.stream.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            copy.forward()
        elapsed = time.perf_counter() - start
    return elapsed / calls * 1e6


def versions() -> dict[str, str]:
    import cupy_delta

    found = {"cupy_delta": cupy_delta.__version__, "python": sys.version.split()[0]}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def driver() -> str:
    """The driver's version as nvidia-smi names it, else the newest CUDA it supports."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        import cupy

        return f"CUDA {cupy.cuda.runtime.driverGetVersion()}"


def installed_mb(contestant) -> tuple[float, list[str]]:
    """Megabytes of a distribution and all it requires, as their records say; what is missing."""
    total, missing, seen = 0.0, [], set()
    todo = [contestant.distribution]
    if contestant.name == Ours.name:
        total, todo = _own_bytes(), ["numpy", "scipy", "ml_dtypes", "threadpoolctl", _cupy()]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        total += sum(file.size or 0 for file in found.files or ())
        todo += [needed for r in found.requires or () if (needed := _required(r))]
        if name == "fla-core":  # its PyTorch and Triton are extras
            todo += ["torch", "triton"]
    return total / 1e6, sorted(missing)


def _required(requirement: str) -> str | None:
    """The name in a requirement that holds here, extras aside."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        text, _, marker = requirement.partition(";")
        return None if marker else re.match(r"[\w.-]+", text.strip())[0]
    parsed = Requirement(requirement)
    holds = parsed.marker is None or parsed.marker.evaluate({"extra": ""})
    return parsed.name if holds else None


def _own_bytes() -> int:
    import cupy_delta

    package = Path(cupy_delta.__file__).parent
    folders = [package, package.parent / "kernels"]
    kinds = (".py", ".cu", ".cuh", ".h")
    files = (f for folder in folders for f in folder.rglob("*") if f.suffix in kinds)
    return sum(f.stat().st_size for f in files)


def _cupy() -> str:
    for name in ("cupy-cuda13x", "cupy-cuda12x"):
        try:
            distribution(name)
            return name
        except PackageNotFoundError:
            continue
    return "cupy"
