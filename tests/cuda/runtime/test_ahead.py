"""Kernels compiled for an architecture that is not here, as in an image: NVRTC and no driver."""

import errno
import os
import stat
import subprocess
import sys

import pytest

# A process on a GPU: CuPy as it is but for the driver, which would tell the architecture and load
# what was compiled. Prints how many programs NVRTC had to compile; CuPy compiles an empty one, of
# no kernels, in every process.
FIRST_CALL = """
import sys
from types import SimpleNamespace
import cupy
from cupy._core import core
from cupy.cuda import compiler

compiler._get_arch = lambda: "90"
compiler._get_arch_for_options_for_nvrtc = compiler._get_arch_for_options_for_nvrtc.__wrapped__
compiler.function = SimpleNamespace(Module=__import__(
    "cupy_delta.cuda.runtime.ahead", fromlist=["NotLoaded"]).NotLoaded)
cupy.cuda.Device = lambda index: SimpleNamespace(use=lambda: None)
cupy.RawModule = lambda code, options: SimpleNamespace(compile=lambda: core.compile_with_cache(
    code, options, prepend_cupy_headers=False))
compiled, right = [], compiler._NVRTCProgram.compile

def compile(program, *args):
    compiled.append(program.src)
    return right(program, *args)

compiler._NVRTCProgram.compile = compile
from cupy_delta.cuda.architectures import ARCHITECTURES
from cupy_delta.cuda.runtime.device import _prepared
from cupy_delta.cuda.variants import launches_of

K, passes = int(sys.argv[1]), tuple(sys.argv[2:])
for name, T, accepting in (("forward", 64, 0), ("step", 1, 0), ("step", 4, 0), ("step", 4, 1)):
    if name in passes:
        some = dict(dtype="float32", K=K, V=K, T=T, H=16, accepting=bool(accepting))
        _prepared(0, tuple(launches_of(ARCHITECTURES["sm_90"], (name,), **some)))
print(len([source for source in compiled if source]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python with a kernel cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUPY_")}
    env |= {"CUPY_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*argv, **more):
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, env=env | more, timeout=300
        )
        return done

    run.cache = cache
    return run


COMPILE = ["-m", "cupy_delta", "compile", "--arch", "sm_90", "--dtype", "float32"]


def test_a_first_call_compiles_nothing_more(python):
    done = python(*COMPILE, "--K", "16", "-T", "64", "--passes", "forward", "step")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 kernels ready for sm_90: decode, forward, wy_factors")
    assert "compiling: 4/4" in done.stderr
    files = list(python.cache.iterdir())
    assert len(files) == 5  # and the empty program that comes before several
    assert all(file.read_bytes()[40:44] == b"\x7fELF" for file in files)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
    assert python("-c", FIRST_CALL, "16", "forward", "step").stdout == "0\n"
    # What was not asked for is compiled by the call that needs it.
    assert python("-c", FIRST_CALL, "17", "step").stdout == "2\n"


def test_what_was_there_before_can_be_read_by_everybody_too(python, tmp_path):
    """In an image whose builder has made a call, or of which a file is broken."""
    argv = [*COMPILE, "--K", "16", "--passes", "recurrent"]
    assert python(*argv, CUPY_CACHE_DIR=str(tmp_path)).returncode == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    other = tmp_path / "of-somebody-else.cubin"
    other.write_bytes(b"")
    for file in (*before, other):
        file.chmod(0o600)
    min(before).write_bytes(b"broken")
    assert python(*argv, CUPY_CACHE_DIR=str(tmp_path)).returncode == 0
    assert {file: file.read_bytes() for file in before} == before
    modes = [stat.S_IMODE(file.stat().st_mode) for file in (*before, other)]
    assert modes == [0o644] * len(before) + [0o600]


def test_one_kernel_alone_is_ready_for_calls_of_several(python, tmp_path):
    """Such calls begin with the empty program, however few were compiled at a time."""
    some = ["--K", "16", "--passes", "recurrent"]
    done = python(*COMPILE, *some, CUPY_CACHE_DIR=str(tmp_path))
    assert done.stdout.startswith("1 kernel ready"), done.stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_compiled_is_said_first(python):
    done = python(*COMPILE, "--K", "300")
    assert done.returncode == 2 and "K = 300: CuPy arrays support head sizes" in done.stderr
    done = python(*COMPILE, CUPY_CACHE_IN_MEMORY="1")
    assert done.returncode == 2 and "CUPY_CACHE_IN_MEMORY is set" in done.stderr
    done = python(*COMPILE, CUPY_CACHE_DIR=__file__)
    assert done.returncode == 2 and "kernels cannot be compiled" in done.stderr
    done = python("-m", "cupy_delta", "compile", "--multiprocessors", "8")
    assert done.returncode == 2 and "expected with --arch alone" in done.stderr


def test_a_disk_that_is_full_is_said(monkeypatch):
    from cupy_delta.cuda.architectures import ARCHITECTURES
    from cupy_delta.cuda.runtime.ahead import Architecture

    monkeypatch.setenv("CUPY_CACHE_DIR", __file__)
    with pytest.raises(OSError, match="set CUPY_CACHE_DIR"), Architecture(ARCHITECTURES["sm_80"]):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_architecture_that_nvrtc_does_not_know(monkeypatch):
    from cupy.cuda import compiler

    from cupy_delta.cuda.architectures import ARCHITECTURES
    from cupy_delta.cuda.runtime.ahead import Architecture

    monkeypatch.setattr(compiler, "_get_max_compute_capability", lambda: "90")
    with pytest.raises(NotImplementedError, match=r"sm_120: NVRTC .* compiles for sm_90 at most"):
        Architecture(ARCHITECTURES["sm_120"])
