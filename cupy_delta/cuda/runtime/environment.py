"""What CuPy and CUDA this machine has, and what keeps CuPy arrays from running; never raises."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import packages_distributions

from ...extras import EXTRAS, install_command, uninstall_command
from .sources import kernel_folder

LOWEST_CAPABILITY = 8
LOWEST_CUPY = (14, 2)
# What a kernel may take on disk, as cubin and as source.
ROOM = 2**20
# Two headers that kernels include: of NVRTC itself, and of the CUDA runtime.
PROBE = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n__global__ void probe() {}\n"


def environment() -> dict:
    """Describe the CUDA side of this machine, and judge it.

    Returns
    -------
    dict
        ``facts``, names and values to print; ``problems``, one line for everything that keeps
        CuPy arrays from being used here, with its remedy; ``problem``, the first of them or None;
        ``cannot_compile``, the first that needs no GPU to be one, or None; ``notices``, one line
        for everything that works but will hurt; ``support``, what runs.
    """
    facts: dict[str, str] = {}
    notices: list[str] = []
    broken = _import_problem(facts, notices)
    cannot_compile = [broken] if broken else _compile_problems(facts, notices)
    no_device = None if broken else _device_problem(facts)
    problems = [*cannot_compile, *([no_device] if no_device else [])]
    return {
        "facts": facts,
        "problems": problems,
        "problem": problems[0] if problems else None,
        "cannot_compile": cannot_compile[0] if cannot_compile else None,
        "notices": notices,
        "support": _support(),
    }


def _support() -> str:
    from ..families import unsupported  # which plans, and no CuPy

    refused = unsupported()
    return "run the CUDA kernels" + (f", but not: {'; '.join(refused)}" if refused else "")


def _import_problem(facts: dict[str, str], notices: list[str]) -> str | None:
    """Import CuPy, and say why that does not work."""
    if importlib.util.find_spec("cupy") is None:
        facts["CuPy"] = "not installed"
        return (
            f"CuPy is not installed: {install_command(*EXTRAS['cuda12'])}"
            " (for CUDA 13 with 13 in place of 12)"
        )
    twice = _two_cupys()
    if twice:
        notices.append(twice)
    facts["kernel cache"] = cache_folder()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two CuPys, which is said in a line of our own
            import cupy
    except OSError as error:
        facts["CuPy"] = "cannot be imported"
        # CuPy makes the folder of its cache when it is imported, even if it is to keep nothing.
        if _folder_problem() or _write_error(cache_folder):
            return _folder_problem(error)
        return f"import cupy fails ({_line(error)})"
    except Exception as error:
        facts["CuPy"] = "broken"
        names = _cupys() or ["cupy"]
        return (
            f"import cupy fails ({_line(error)}): reinstall it, {uninstall_command(*names)}, then"
            f" {install_command(*EXTRAS[_extra(names[0])])}"
        )
    facts["CuPy"] = cupy.__version__
    old = _old_cupy(cupy.__version__)
    if old:
        notices.append(old)
    return None


def _compile_problems(facts: dict[str, str], notices: list[str]) -> list[str]:
    """Judge what kernels are compiled with, and where to."""
    import cupy

    facts["NVRTC"] = _try(lambda: ".".join(map(str, cupy.cuda.nvrtc.getVersion())))
    facts["CUDA headers"] = _try(_headers)
    if os.path.expanduser("~") == "~" and "CUPY_CACHE_DIR" not in os.environ:
        notices.append(
            "HOME is not set and this user has none: compiled kernels go to a folder named ~ where"
            " Python was started; set HOME or CUPY_CACHE_DIR"
        )
    unwritable = _folder_problem()
    if unwritable and _has_kernels(cache_folder()):
        notices.append(f"only kernels that were compiled before can run: {unwritable}")
        unwritable = None
    judged = _sources_problem(), _nvrtc_problem(), unwritable
    return [problem for problem in judged if problem]


# ---- one judgement each: a line with its remedy, or None -----------------------------------------


def _two_cupys() -> str | None:
    names = _cupys()
    if len(names) < 2:
        return None
    return (
        f"{' and '.join(names)} are both installed, in one folder, and overwrite each other:"
        f" {uninstall_command(*names)}, then {install_command(*EXTRAS[_extra(names[0])])}"
    )


def _old_cupy(version: str) -> str | None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) >= LOWEST_CUPY:
        return None
    lowest = ".".join(map(str, LOWEST_CUPY))
    newer = install_command("--upgrade", EXTRAS[_extra(" ".join(_cupys()))][0])
    return f"CuPy {version} is older than {lowest}, the oldest that was tried: {newer}"


def _cupys() -> list[str]:
    """Names of the installed distributions that are CuPy."""
    try:
        return sorted(set(packages_distributions().get("cupy", ())))
    except Exception:  # an installation whose metadata cannot be read
        return []


def _extra(name: str) -> str:
    return "cuda13" if "13" in name else "cuda12"


def _sources_problem() -> str | None:
    try:
        kernel_folder()
    except RuntimeError as error:
        return str(error)
    return None


def _nvrtc_problem() -> str | None:
    import cupy

    _, toolkit = EXTRAS[_extra(" ".join(_cupys()))]
    remedy = install_command(toolkit)
    try:
        version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception as error:
        return f"NVRTC, which compiles the kernels, cannot be loaded ({_line(error)}): {remedy}"
    try:
        options = cupy._core.core.assemble_cupy_compiler_options(("--std=c++17",))
        cupy.cuda.compiler._NVRTCProgram(PROBE).compile((*options, "-arch=compute_80"))
    except Exception as error:
        return (
            f"NVRTC {version} cannot compile with the headers it finds ({_line(error)}): {remedy}"
        )
    return None


def cache_folder() -> str:
    """Return the folder where CuPy keeps compiled kernels."""
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def _folder_problem(known: OSError | None = None) -> str | None:
    """Judge the folders that CuPy writes while it compiles; of its cache an error may be known."""
    if not os.environ.get("CUPY_CACHE_DIR", "unset"):
        return "CUPY_CACHE_DIR is empty: unset it, or set it to a folder"
    if cache_in_memory() and known is None:
        return None
    error = known or _write_error(cache_folder)
    if error:
        return f"the kernel cache {cache_folder()} {_cannot(error, 'CUPY_CACHE_DIR')}"
    error = _write_error(tempfile.gettempdir)
    if error:
        return f"the folder of temporary files {_cannot(error, 'TMPDIR')}"
    return None


def cache_in_memory() -> bool:
    """Whether CuPy was told to keep nothing on disk; as it reads this itself."""
    return os.environ.get("CUPY_CACHE_IN_MEMORY", "").strip() == "1"


def _has_kernels(folder: str) -> bool:
    """Whether a cache was filled, say when an image was built, whose folders are read-only now."""
    try:
        return any(name.endswith(".cubin") for name in os.listdir(folder))
    except OSError:
        return False


def _write_error(folder: Callable[[], str]) -> OSError | None:
    try:
        with tempfile.TemporaryFile(dir=folder()) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        return error
    return None


def _cannot(error: OSError, variable: str) -> str:
    """Say that a folder cannot be written, why, and what helps."""
    elsewhere = f"set {variable} to a folder that can be written, before Python starts"
    remedies = {
        errno.ENOSPC: f"make room there, or {elsewhere}",
        errno.EDQUOT: f"make room there, or {elsewhere}",
        errno.ENOTDIR: f"a file is in its way: remove that, or {elsewhere}",
        errno.EEXIST: f"a file is in its way: remove that, or {elsewhere}",
    }
    return f"cannot be written ({error.strerror}): {remedies.get(error.errno or 0, elsewhere)}"


def explain(error: BaseException | None) -> None:
    """Raise an error that says what helps in place of one of CuPy's files, where that is known."""
    if not isinstance(error, OSError):
        return
    if str(error.filename).endswith(".cubin"):
        line = (
            f"the compiled kernel {error.filename} cannot be read ({error.strerror}): remove it, or"
            " let everybody read it"
        )
    else:
        line = _folder_problem() or ""
    if line:
        raise type(error)(error.errno, line) from error


def _device_problem(facts: dict[str, str]) -> str | None:
    import cupy

    facts["driver"] = _try(lambda: str(cupy.cuda.runtime.driverGetVersion()))
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return (
            f"no usable NVIDIA driver ({_line(error)}): install or update it until nvidia-smi"
            " works here; a container needs --gpus all"
        )
    for i in range(count):
        facts[f"device {i}"] = _try(partial(_device, i))
    if not count:
        return "CuPy finds no NVIDIA GPU: look at CUDA_VISIBLE_DEVICES and nvidia-smi"
    majors = [cupy.cuda.runtime.getDeviceProperties(i)["major"] for i in range(count)]
    if max(majors) < LOWEST_CAPABILITY:
        return f"no GPU of compute capability {LOWEST_CAPABILITY}.0 or newer: use NumPy arrays"
    return None


# ---- facts ---------------------------------------------------------------------------------------


def _device(index: int) -> str:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name = properties["name"].decode()
    memory = properties["totalGlobalMem"] / 2**30
    return f"{name}, compute {properties['major']}.{properties['minor']}, {memory:.0f} GiB"


def _headers() -> str:
    from cuda import pathfinder

    return str(pathfinder.find_nvidia_header_directory("cudart") or "not found")


def _try(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except Exception as error:
        return f"unknown ({_line(error)})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
