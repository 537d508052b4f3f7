"""Kernel sources: where they are, and the text that is compiled for one variant."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

# Kernels compiled at a time: each takes a core and up to 50 MB.
AT_ONCE = 8


@cache
def kernel_folder() -> Path:
    """Return the folder of kernels, in an installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "primitives" / "primitives.cuh").is_file():
            return folder
    archive = next((str(path) for path in package.parents if path.is_file()), None)
    if archive:
        raise RuntimeError(
            f"cupy_delta is imported from the archive {archive}, and NVRTC reads kernels from"
            " files: unpack it, or install cupy_delta"
        )
    raise RuntimeError(f"cupy_delta: no CUDA kernels beside {package}; reinstall cupy_delta")


@cache
def digest(folder: Path) -> str:
    """Hash every kernel file: CuPy's cache does not look into included files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.cu*")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def variant_source(file: str, defines: tuple, folder: Path | None = None) -> str:
    """Return the text of one variant: its macros, then the file by include."""
    folder = folder or kernel_folder()
    macros = "".join(f"#define {name} {value}\n" for name, value in defines)
    return f'// kernels {digest(folder)}\n{macros}#include "{file}"\n'
