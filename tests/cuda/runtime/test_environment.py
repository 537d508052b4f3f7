"""What keeps CuPy arrays from running is judged in one line with its remedy; no GPU needed."""

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cupy_delta.commands import main
from cupy_delta.cuda import environment as environment_of
from cupy_delta.cuda.families import unsupported
from cupy_delta.cuda.runtime.environment import explain
from cupy_delta.extras import EXTRAS, install_command, uninstall_command

pytestmark = pytest.mark.fast

environment_module = sys.modules[explain.__module__]
ROOT = Path(__file__).resolve().parents[3]
TOOLKIT = shlex.quote(EXTRAS["cuda12"][1])


def refuse(error):
    def call(*args):
        raise error

    return call


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """A CuPy on a machine where all is well: an H100, NVRTC, its headers, a cache to write."""
    properties = dict(name=b"NVIDIA H100", major=9, minor=0, totalGlobalMem=80 * 2**30)
    fake = ModuleType("cupy")
    fake.__spec__ = ModuleSpec("cupy", None)
    fake.__version__ = "14.2.0"
    fake.cuda = SimpleNamespace(
        nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
        runtime=SimpleNamespace(
            driverGetVersion=lambda: 12080,
            getDeviceCount=lambda: 1,
            getDeviceProperties=lambda i: properties,
        ),
        compiler=SimpleNamespace(
            _NVRTCProgram=lambda source: SimpleNamespace(compile=lambda options: (b"", None))
        ),
    )
    fake._core = SimpleNamespace(core=SimpleNamespace(assemble_cupy_compiler_options=lambda o: o))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(environment_module, "_cupys", lambda: ["cupy-cuda12x"])
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(cache))
    return fake


def test_all_is_well(cupy):
    found = environment_of()
    assert (found["problems"], found["problem"], found["notices"]) == ([], None, [])
    assert found["facts"]["device 0"] == "NVIDIA H100, compute 9.0, 80 GiB"
    assert not os.listdir(os.environ["CUPY_CACHE_DIR"])


def test_what_runs_is_told_from_the_table_of_refusals(cupy, capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^CuPy arrays +run the CUDA kernels, but not: ", text, re.MULTILINE)
    for option in unsupported():
        assert option in text
    assert "K or V above 256" in unsupported()


def only_problem(capsys):
    """Return the one problem, as the API and as `info` tell it."""
    (problem,) = environment_of()["problems"]
    assert "\n" not in problem
    assert main(["info"]) == 0
    assert capsys.readouterr().out.count(f"cannot be used here: {problem}\n") == 1
    return problem


def test_no_nvrtc(cupy, capsys):
    cupy.cuda.nvrtc.getVersion = refuse(RuntimeError('Failure finding "libnvrtc.so.12"'))
    problem = only_problem(capsys)
    assert "libnvrtc.so.12" in problem and problem.endswith(f"-m pip install {TOOLKIT}")


def test_no_headers(cupy, capsys):
    program = SimpleNamespace(compile=refuse(RuntimeError("cannot open source file cuda_bf16.h")))
    cupy.cuda.compiler._NVRTCProgram = lambda source: program
    problem = only_problem(capsys)
    assert "NVRTC 12.9 cannot compile" in problem and problem.endswith(TOOLKIT)


def test_the_toolkit_is_that_of_the_cupy(cupy, capsys, monkeypatch):
    monkeypatch.setattr(environment_module, "_cupys", lambda: ["cupy-cuda13x"])
    cupy.cuda.nvrtc.getVersion = refuse(RuntimeError("none"))
    assert only_problem(capsys).endswith(shlex.quote(EXTRAS["cuda13"][1]))


def test_two_cupys(cupy, capsys, monkeypatch):
    both = ["cupy-cuda12x", "cupy-cuda13x"]
    monkeypatch.setattr(environment_module, "_cupys", lambda: both)
    (notice,) = environment_of()["notices"]
    assert "cupy-cuda12x and cupy-cuda13x are both installed" in notice
    assert "-m pip uninstall cupy-cuda12x cupy-cuda13x, then " in notice
    assert main(["info"]) == 0
    assert re.search(f"^take care +{re.escape(notice)}$", capsys.readouterr().out, re.MULTILINE)


def test_an_old_cupy(cupy):
    cupy.__version__ = "13.6.0"
    (notice,) = environment_of()["notices"]
    assert "13.6.0 is older than 14.2" in notice
    assert notice.endswith(f"-m pip install --upgrade {shlex.quote(EXTRAS['cuda12'][0])}")


def test_a_cache_that_is_a_file(cupy, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    problem = only_problem(capsys)
    assert f"kernel cache {tmp_path / 'file'} cannot be written" in problem
    assert "a file is in its way" in problem and "CUPY_CACHE_DIR" in problem


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.ENOSPC, "make room there, or set CUPY_CACHE_DIR"),
        (errno.EACCES, "set CUPY_CACHE_DIR to a folder that can be written"),
        (errno.EROFS, "set CUPY_CACHE_DIR to a folder that can be written"),
    ],
)
def test_a_cache_that_cannot_be_written(cupy, capsys, monkeypatch, number, remedy):
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(environment_module.tempfile, "TemporaryFile", lambda dir: refuse(error)())
    problem = only_problem(capsys)
    assert os.strerror(number) in problem and remedy in problem
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert environment_of()["problems"] == []


def test_a_folder_for_temporary_files_that_cannot_be_written(cupy, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert "set TMPDIR to a folder that can be written" in only_problem(capsys)


def test_a_cache_that_was_filled_before_it_became_read_only(cupy, monkeypatch):
    """As in an image that was built for a GPU."""
    (Path(os.environ["CUPY_CACHE_DIR"]) / "0a1b.cubin").write_bytes(b"")
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(environment_module.tempfile, "TemporaryFile", lambda dir: refuse(error)())
    found = environment_of()
    assert found["problems"] == []
    (notice,) = found["notices"]
    assert "only kernels that were compiled before" in notice and "set CUPY_CACHE_DIR" in notice


def test_an_empty_name_of_the_cache(cupy, capsys, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_DIR", "")
    assert only_problem(capsys) == "CUPY_CACHE_DIR is empty: unset it, or set it to a folder"


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_cupy_that_cannot_make_its_cache(capsys, monkeypatch, tmp_path, in_memory):
    """As CuPy does at import, where the folder cannot be made, even if it is to keep nothing."""
    if in_memory:
        monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    (tmp_path / "cupy.py").write_text("import os\nos.makedirs(os.environ['CUPY_CACHE_DIR'])\n")
    (tmp_path / "file").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    for name, why in (("file/cache", "Not a directory"), ("file", "File exists")):
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / name))
        problem = only_problem(capsys)
        assert f"{name} cannot be written ({why}): a file is in its way" in problem


def test_no_home(cupy, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_DIR")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(environment_module, "_folder_problem", lambda: None)
    (notice,) = environment_of()["notices"]
    assert "HOME is not set" in notice and "set HOME or CUPY_CACHE_DIR" in notice


def test_an_archive_has_no_files_for_nvrtc(tmp_path):
    package = tmp_path / "package"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cupy_delta", package / "cupy_delta", ignore=skip)
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", package)
    code = "import cupy_delta.cuda.runtime.sources as s; s.kernel_folder()"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([archive, *sys.path])},
    )
    assert f"imported from the archive {archive}" in found.stderr.splitlines()[-1]


def test_what_keeps_nvrtc_from_its_files_is_one_line(cupy, capsys, monkeypatch):
    error = RuntimeError("cupy_delta is imported from the archive all.zip: unpack it")
    monkeypatch.setattr(environment_module, "kernel_folder", refuse(error))
    assert only_problem(capsys) == str(error)


def test_an_error_of_the_cache_says_what_helps(cupy, monkeypatch, tmp_path):
    """What CuPy raises on a full disk names no file."""
    (tmp_path / "file").write_text("")
    full = OSError(errno.ENOSPC, "No space left on device")
    for nothing_to_say in (full, None, ValueError("q")):
        explain(nothing_to_say)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be written .* set CUPY_CACHE_DIR") as found:
        explain(full)
    assert found.value.errno == errno.ENOSPC and found.value.__cause__ is full
    unreadable = PermissionError(errno.EACCES, "Permission denied", "/x/ab.cubin")
    with pytest.raises(PermissionError, match=r"/x/ab.cubin cannot be read .* remove it, or let"):
        explain(unreadable)


def test_the_command_that_installs_names_this_python(monkeypatch):
    assert install_command("a>=1") == f"{shlex.quote(sys.executable)} -m pip install 'a>=1'"
    monkeypatch.setattr(environment_module.importlib.util, "find_spec", lambda name: None)
    assert install_command("a") == f"uv pip install --python {shlex.quote(sys.executable)} a"
    assert uninstall_command("a") == f"uv pip uninstall --python {shlex.quote(sys.executable)} a"
