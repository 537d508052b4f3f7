"""What the emulator compiles is kept by content, for every checkout, and does not grow for ever."""

import os
import shutil
import zlib

import compile_cache
import emulator
import nvrtc
import pytest
from emulator import Kernel
from test_golden import SOURCE

pytestmark = pytest.mark.fast

SQUARE = '#include "part.h"\nextern "C" int square(int x) { return multiply(x, x); }\n'
PART = "static int multiply(int a, int b) { return a * b; }\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own."""
    emulator.runtime()
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_compiler(monkeypatch):
    """Return a function after which nothing can be compiled."""

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    def take_away():
        monkeypatch.setattr(compile_cache.subprocess, "run", refuse)
        monkeypatch.setattr(nvrtc, "compile_source", refuse)

    return take_away


def checkout(path, monkeypatch):
    """Go to a copy of what the emulator compiles."""
    shutil.copytree(emulator.KERNELS, path / "kernels")
    for name in ("include", "runtime", "interpreter"):
        shutil.copytree(emulator.HERE / name, path / "emulator" / name)
    monkeypatch.setattr(emulator, "KERNELS", path / "kernels")
    monkeypatch.setattr(emulator, "HERE", path / "emulator")
    monkeypatch.setattr(nvrtc, "KERNELS", path / "kernels")


@pytest.mark.parametrize("leg", ["source", "ptx"])
def test_another_checkout_compiles_nothing(folder, tmp_path, monkeypatch, no_compiler, leg):
    def kernels():
        [l2norm] = emulator.KERNELS.rglob("l2norm.cu")
        Kernel(l2norm, "l2norm", dict(DTYPE="float", HEAD_K=64, BACKWARD=0), leg=leg)
        Kernel(SOURCE, "primitives", leg=leg)
        return sorted(folder.iterdir())

    with monkeypatch.context() as patch:
        checkout(tmp_path / "one", patch)
        first = kernels()
    for path in first:
        content = path.read_bytes()
        content = zlib.decompress(content) if path.suffix == ".z" else content
        assert str(tmp_path).encode() not in content, path.name
        assert str(SOURCE.parent).encode() not in content, path.name
    with monkeypatch.context() as patch:
        checkout(tmp_path / "two", patch)
        no_compiler()
        assert kernels() == first


def test_another_translation_compiles_nothing(folder, monkeypatch, no_compiler):
    """What NVRTC made is kept beside the program that is made of it."""
    Kernel(SOURCE, "primitives", leg="ptx")
    [program] = folder.glob("program-*")
    content = program.read_bytes()
    no_compiler()
    program.unlink()
    Kernel(SOURCE, "primitives", leg="ptx")
    assert program.read_bytes() == content


def test_what_counts_is_what_is_included(folder, tmp_path):
    def compiled(part, *flags):
        (tmp_path / "part.h").write_text(part)
        return compile_cache.shared_library("square", [SQUARE], ["-fPIC", *flags], [tmp_path])

    first = compiled(PART)
    (tmp_path / "unused.h").write_text("")
    assert compiled(PART) == first
    assert len({first, compiled(PART + "\n"), compiled(PART, "-O2")}) == 3


def test_the_compiler_counts(folder, tmp_path, monkeypatch):
    (tmp_path / "part.h").write_text(PART)
    first = compile_cache.shared_library("square", [SQUARE], ["-fPIC"], [tmp_path])
    monkeypatch.setattr(compile_cache, "compiler_version", lambda name: "another")
    assert compile_cache.shared_library("square", [SQUARE], ["-fPIC"], [tmp_path]) != first


def test_what_does_not_compile_leaves_nothing(folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"no\.h"):
        compile_cache.shared_library("square", ['#include "no.h"'], [], [tmp_path])
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=compile_cache.FOLDER_VARIABLE):
        compile_cache.cache_folder()


def test_what_is_made_is_logged(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.LOG_VARIABLE, str(tmp_path / "log"))
    for name in ("one", "two", "one"):
        compile_cache.kept(name, lambda part: part.write_bytes(bytes(100)))
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [(float(line[0]) < 1, line[1]) for line in lines] == [(True, "one"), (True, "two")]
    assert all(line[2].endswith("::test_what_is_made_is_logged") for line in lines)


def test_what_was_not_used_for_longest_goes(folder):
    compile_cache.cache_folder()
    for age, name in enumerate(("new", "used", "old", "oldest")):
        path = compile_cache.kept(name, lambda part: part.write_bytes(bytes(100)))
        os.utime(path, (path.stat().st_mtime - 10_000 * age,) * 2)
    (folder / "part-of-a-run-that-died").mkdir()
    os.utime(folder / "part-of-a-run-that-died", (0, 0))
    (folder / "part-of-a-run").mkdir()
    compile_cache.kept("used", lambda part: pytest.fail("it is there"))
    compile_cache.shrink(folder, limit=300, recent=3600)
    assert {x.name for x in folder.iterdir()} == {"new", "used", "old", "part-of-a-run"}
    # What was just used may be about to be loaded.
    compile_cache.shrink(folder, limit=0, recent=3600)
    assert {x.name for x in folder.iterdir()} == {"new", "used", "part-of-a-run"}
