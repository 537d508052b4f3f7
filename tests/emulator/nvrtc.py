"""NVRTC through ctypes: what CuPy compiles with, from its wheel; needs no GPU and no driver."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"


class Compiled(NamedTuple):
    ptx: str
    log: str
    cubin: bytes


class CompileError(RuntimeError):
    """NVRTC refuses a kernel; the message is its log."""


@cache
def library() -> ctypes.CDLL:
    """The NVRTC of the wheel nvidia-cuda-nvrtc-cu12."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob("cuda_nvrtc/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    raise RuntimeError("no NVRTC: install nvidia-cuda-nvrtc-cu12, or cupy_delta[test]")


def version() -> str:
    """Return the version of the NVRTC that compiles."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value} of {Path(library()._name).stat().st_size} bytes"


def compile_source(
    source: str, arch: str, options: tuple = (), kernels: Path = KERNELS
) -> Compiled:
    """Compile to PTX; for a real architecture, ``"sm_80"``, also by ptxas, whose log comes back."""
    nvrtc, program = library(), ctypes.c_void_p()
    arguments = (f"--gpu-architecture={arch}", "--std=c++17", f"-I{kernels}", *options)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        array = (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments))
        failed = nvrtc.nvrtcCompileProgram(program, len(arguments), array)
        log = _bytes(program, "ProgramLog").decode()
        if failed:
            raise CompileError(log)
        ptx = _bytes(program, "PTX").decode()
        return Compiled(ptx, log, _bytes(program, "CUBIN"))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    """Return a result of a program, without the zero at the end of a text; empty if it has none."""
    size = ctypes.c_size_t()
    if getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        return b""
    buffer = ctypes.create_string_buffer(max(1, size.value))
    if getattr(library(), f"nvrtcGet{what}")(program, buffer):
        return b""
    return buffer.raw if what == "CUBIN" else buffer.value
