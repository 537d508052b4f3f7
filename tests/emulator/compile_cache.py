"""Compile every shared library once, for all checkouts on this machine.

What is kept is known by the content of what it is made from: the text of the unit, the files that
it includes, the flags and the compiler. No path of a checkout is in a name or in a library, so a
second checkout, or the same one after a move, compiles nothing again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Where compiled kernels are kept, in place of the user's cache folder.
FOLDER_VARIABLE = "CUPY_DELTA_EMULATOR_CACHE"
# A file to which a line is added for everything that is made: seconds of processor time, name and
# the test that asked for it.
LOG_VARIABLE = "CUPY_DELTA_EMULATOR_LOG"
# What is kept in all; beyond it, what was not used for longest goes, but nothing of the last hour,
# which another process may be about to load.
LIMIT_BYTES = 2 << 30
RECENT_SECONDS = 3600

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def compiler() -> str:
    """The C++ compiler, from CXX or the path."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise RuntimeError(f"the emulator needs a C++ compiler, and there is no {name}")
    return name


@cache
def compiler_version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs; it is made when it is missing."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        folder = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "cupy_delta" / "emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"the emulator cannot keep what it compiles: {error}; set {FOLDER_VARIABLE} to a "
            "folder that can be written"
        ) from error
    return folder


def included(text: str, roots: list[Path], at: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file that a text includes, and of what those include.

    Conditions are not looked at: a file counts also where a macro leaves it out. What no root has
    is left to the compiler to miss.
    """
    seen: set[Path] = set()
    todo = [(text, at)]
    while todo:
        text, at = todo.pop()
        for name in INCLUDE.findall(text):
            places = (root / name for root in ([at] if at else []) + roots)
            path = next((p for p in places if p.is_file()), None)
            if path and path not in seen:
                seen.add(path)
                content = path.read_bytes()
                yield name, content
                todo.append((content.decode(), path.parent))


def digest_of(unit: str, roots: list[Path], *more: str) -> str:
    """Return a name for what is made from a unit, its included files and `more`."""
    digest = hashlib.sha256(repr((unit, more)).encode())
    for name, content in sorted(included(unit, roots)):
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return a file of the cache; when it is missing, `make` writes it at the path it is given.

    It appears whole or not at all, whoever else makes the same one at the same time.
    """
    path = cache_folder() / name
    try:
        os.utime(path)
        return path
    except FileNotFoundError:
        pass  # never made, or removed by another process just now
    except PermissionError:
        return path  # of a cache that another user fills
    remove_old()
    with tempfile.TemporaryDirectory(prefix="part-", dir=path.parent) as folder:
        part = Path(folder) / name
        before = os.times()
        make(part)
        os.replace(part, path)
    if log := os.environ.get(LOG_VARIABLE):
        took = sum(os.times()[:4]) - sum(before[:4])
        test = os.environ.get("PYTEST_CURRENT_TEST", "-").removesuffix(" (call)")
        with open(log, "a") as file:
            file.write(f"{took:.2f} {name} {test}\n")
    return path


@cache
def remove_old() -> None:
    """Remove what was not used for longest while more than LIMIT_BYTES are kept; once a process."""
    shrink(cache_folder(), LIMIT_BYTES, RECENT_SECONDS)


def shrink(folder: Path, limit: int, recent: float) -> None:
    """Remove the oldest entries of a folder beyond `limit` bytes, and parts of runs that died."""
    entries = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        old = time.time() - status.st_mtime > recent
        if path.name.startswith("part-"):
            if old:
                shutil.rmtree(path, ignore_errors=True)
        else:
            entries.append((status.st_mtime, status.st_size, old, path))
    size = sum(entry[1] for entry in entries)
    for _, bytes_, old, path in sorted(entries):
        if size <= limit or not old:
            break
        path.unlink(missing_ok=True)
        size -= bytes_


def shared_library(
    name: str, units: list[str], flags: list[str], roots: list[Path], header: str | None = None
) -> Path:
    """Compile units of C++, which may include files of `roots`, to one shared library.

    A header that all of them include before anything that could change it is compiled once.
    """
    cxx = compiler()
    digest = digest_of("\n".join(units), roots, cxx, compiler_version(cxx), *flags)

    def make(part: Path) -> None:
        sources = [part.with_name(f"{i}.cpp") for i in range(len(units))]
        for source, unit in zip(sources, units, strict=True):
            source.write_text(unit)
        first = []
        if header is not None:
            part.with_name("first.h").write_text(f'#include "{header}"\n')  # for want of the other
            part.with_name("first.h.gch").symlink_to(precompiled(header, flags, roots))
            first = ["-include", "first.h"]
        names = [source.name for source in sources]
        compile_in(part.parent, ["-shared", *first, *names, "-o", part.name], flags, roots)

    return kept(f"{name}-{digest}.so", make)


def precompiled(header: str, flags: list[str], roots: list[Path]) -> Path:
    """Return a header as g++ reads it fastest, for units with the same flags."""
    unit, cxx = f'#include "{header}"\n', compiler()
    flags = [flag for flag in flags if not flag.startswith("-l")]  # nothing is linked
    digest = digest_of(unit, roots, cxx, compiler_version(cxx), *flags)

    def make(part: Path) -> None:
        part.with_name("first.h").write_text(unit)
        compile_in(part.parent, ["-x", "c++-header", "first.h", "-o", part.name], flags, roots)

    return kept(f"header-{digest}.gch", make)


def compile_in(folder: Path, arguments: list[str], flags: list[str], roots: list[Path]) -> None:
    """Call the compiler in a folder that has no name of its own in what is compiled.

    Files are known by names that are the same in every checkout: those of links to the roots.
    """
    command = [compiler(), *flags, f"-ffile-prefix-map={folder}=.", *arguments]
    for i, root in enumerate(roots):
        (folder / f"root{i}").symlink_to(root)
        command += [f"-Iroot{i}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
