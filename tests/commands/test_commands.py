"""The command line: what it prints and writes, and one-line errors that lose nothing."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from helpers import definition, deviation, make_inputs

import cupy_delta
from cupy_delta.commands import bench, check, demo, main, run


def npz_inputs(tmp_path, dtype=np.float32, **extra):
    args, kw = make_inputs(70, H=1, G=2, gate="scalar", initial=True, dtype=dtype)
    arrays = dict(zip(("q", "k", "v", "beta", "g"), args, strict=True))
    arrays |= {"initial_state": kw["initial_state"]} | extra
    np.savez(tmp_path / "in.npz", **arrays)
    return str(tmp_path / "in.npz"), args, kw


def one_line_error(capsys, *argv):
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def python(*argv, path=None, **env):
    folders = [*([str(path)] if path else []), *sys.path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)} | env
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env)


def test_version_and_help():
    result = python("-m", "cupy_delta", "--version")
    assert result.stdout == f"cupy_delta {cupy_delta.__version__}\n"
    text = python("-m", "cupy_delta", "--help").stdout
    for command in ("info", "check", "bench", "demo", "run", "compile"):
        assert re.search(rf"^    {command} +[A-Z]", text, re.MULTILINE)
    assert "exit status" in text


@pytest.mark.slow
def test_commands_without_docstrings():
    assert python("-OO", "-m", "cupy_delta", "--version").returncode == 0
    assert "--qk-l2norm" in python("-OO", "-m", "cupy_delta", "run", "--help").stdout


def test_wrong_command_is_refused():
    result = python("-m", "cupy_delta", "fly")
    assert result.returncode == 2
    assert "invalid choice" in result.stderr


def test_info_tells_versions_and_what_runs(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, value in (("numpy", np.__version__), ("cupy_delta", cupy_delta.__version__)):
        assert re.search(rf"^{name} +{re.escape(value)}$", text, re.MULTILINE)
    assert re.search(r"^NumPy arrays +run the NumPy/SciPy backend on \d+ threads$", text, re.M)
    assert re.search(r"^CuPy arrays +\S", text, re.MULTILINE)


def test_info_judges_the_number_of_threads(capsys, monkeypatch):
    monkeypatch.setenv("CUPY_DELTA_NUM_THREADS", "many")
    assert main(["info"]) == 0
    line = "cannot be used here: CUPY_DELTA_NUM_THREADS: expected a positive integer, got 'many'"
    assert re.search(rf"^NumPy arrays +{line}$", capsys.readouterr().out, re.MULTILINE)


def test_info_survives_a_broken_cupy(tmp_path):
    (tmp_path / "cupy.py").write_text("raise RuntimeError('libcuda is\\nthe wrong one')")
    result = python("-m", "cupy_delta", "info", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "import cupy fails (libcuda is the wrong one): reinstall" in result.stdout


def test_info_without_a_device(tmp_path):
    (tmp_path / "cupy.py").write_text("__version__ = '99.0'")
    result = python("-m", "cupy_delta", "info", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^CuPy +99.0$", result.stdout, re.MULTILINE)
    assert "CuPy arrays" in result.stdout and "no usable NVIDIA driver" in result.stdout


@pytest.mark.slow
def test_info_names_a_gpu_that_is_too_old(tmp_path):
    (tmp_path / "cupy.py").write_text(
        "import types\n"
        "__version__ = '99.0'\n"
        "properties = dict(name=b'Old', totalGlobalMem=2**33, major=7, minor=5)\n"
        "runtime = types.SimpleNamespace(driverGetVersion=lambda: 1, getDeviceCount=lambda: 1,\n"
        "    getDeviceProperties=lambda i: properties)\n"
        "cuda = types.SimpleNamespace(runtime=runtime)\n"
    )
    result = python("-m", "cupy_delta", "info", path=tmp_path)
    assert "Old, compute 7.5, 8 GiB" in result.stdout
    assert "no GPU of compute capability 8.0 or newer" in result.stdout


def test_check_passes_and_writes_its_table(capsys, tmp_path):
    path = tmp_path / "check.json"
    assert main(["check", "--device", "cpu", "--seed", "3", "--json", str(path)]) == 0
    count = len(check.CASES) * len(check.BOUNDS)
    assert f"{count} of {count} cases within their bounds on the cpu" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert len(rows) == count
    assert {row["verdict"] for row in rows} == {"ok"}


def test_check_passes_with_a_seed_whose_keys_are_hard(capsys, monkeypatch):
    """The worst of the first 1,500 in float32."""
    monkeypatch.setattr(check, "CASES", [x for x in check.CASES if x.correlation])
    assert main(["check", "--device", "cpu", "--seed", "422"]) == 0
    assert "4 of 4 cases within their bounds" in capsys.readouterr().out


def test_check_fails_when_an_operator_is_wrong(capsys, monkeypatch):
    right = check.chunk_delta_rule

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        result.o[..., 0, 0, 0] += result.o.dtype.type(1e-9)
        return result

    monkeypatch.setattr(check, "chunk_delta_rule", wrong)
    assert main(["check", "--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_says_where_outputs_are_not_finite(capsys, monkeypatch, value):
    right = check.recurrent_delta_rule

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        result.o[0, 5:, 1, 3] = value
        return result

    monkeypatch.setattr(check, "recurrent_delta_rule", wrong)
    monkeypatch.setattr(check, "CASES", [x for x in check.CASES if x.name == "recurrent"])
    monkeypatch.setattr(check, "_exact", lambda case, a: list(right(*map(a.get, INPUTS), None)))
    INPUTS = ("q", "k", "v", "beta")
    assert main(["check", "--device", "cpu"]) == 3
    out = capsys.readouterr().out
    count = 125
    place = f"{count} of 33280 values of o, the first at batch row 0, token 5, head 1"
    assert out.count("NOT FINITE") == 4
    for dtype in check.BOUNDS:
        assert f"recurrent, {dtype}: not finite: {place}\n" in out


def test_bench_writes_json_and_a_plot(capsys, tmp_path):
    argv = ["bench", "-T", "32,64", "-H", "2", "-D", "8", "--backward", "--repeats", "2"]
    out, plot = tmp_path / "b.json", tmp_path / "b.png"
    assert main([*argv, "--device", "cpu", "-o", str(out), "--plot", str(plot)]) == 0
    report = json.loads(out.read_text())
    assert [(r["pass"], r["T"]) for r in report["rows"]] == [
        (p, T) for T in (32, 64) for p in ("forward", "backward")
    ]
    assert all(r["ms"] > 0 and r["tokens_per_s"] > 0 for r in report["rows"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out


def test_work_counts_the_products():
    flop, size = bench.work("forward", 64, 1, 128, 128, 2)
    products = 3 * 2 * 64 * 128 * 128 + 4 * 64 * 64 * 128 * 2 / 2
    assert flop == products
    assert size == 64 * (4 * 128 * 2 + 4)


@pytest.mark.parametrize("flag", ["-T", "-D", "--repeats"])
@pytest.mark.parametrize("value", ["0", "x", "1,-2"])
def test_bench_refuses_bad_numbers(capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        main(["bench", flag, value])
    assert stop.value.code == 2
    assert "expected a positive integer" in capsys.readouterr().err


def test_demo_shows_that_the_rule_overwrites(capsys, tmp_path):
    path = tmp_path / "demo.png"
    assert main(["demo", "-o", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    last = rows[-1]
    assert int(last[0]) == demo.ROUNDS
    assert float(last[1]) < 0.5 < 2 < float(last[2])


def test_demo_without_matplotlib_prints_the_table(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "-o", str(tmp_path / "demo.png")]) == 0
    assert "pip install 'matplotlib>=3.8' 'rich>=13'" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_bench_plot_without_matplotlib_is_refused_before_timing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in one_line_error(capsys, "bench", "--plot", "x.png")


@pytest.mark.parametrize("operator", ["chunk", "recurrent"])
def test_run_applies_the_operator(capsys, tmp_path, operator):
    path, args, kw = npz_inputs(tmp_path, np.float64)
    out = str(tmp_path / "out.npz")
    assert main(["run", path, "-o", out, "--operator", operator, "--scale", "2"]) == 0
    o, final = definition(*args, **kw, scale=2.0)
    with np.load(out) as result:
        assert deviation(result["o"], o) < 1e-12
        assert deviation(result["final_state"], final) < 1e-12
    assert "o (1, 70, 2, 7) float64" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["in.npz", "out.npz"]


def test_run_reads_and_writes_bfloat16_as_raw_items(capsys, tmp_path):
    path, args, kw = npz_inputs(tmp_path, ml_dtypes.bfloat16)
    out = str(tmp_path / "out.npz")
    assert "is it --bfloat16?" in one_line_error(capsys, "run", path, "-o", out)
    assert main(["run", path, "-o", out, "--bfloat16"]) == 0
    with np.load(out) as result:
        o = result["o"].view(ml_dtypes.bfloat16)
    assert np.array_equal(o, cupy_delta.chunk_delta_rule(*args, **kw).o)


def test_run_names_what_is_wrong_with_the_input(capsys, tmp_path):
    out = str(tmp_path / "out.npz")
    missing = str(tmp_path / "none.npz")
    assert "cannot be read (No such file" in one_line_error(capsys, "run", missing, "-o", out)
    assert "cannot be read (Is a dir" in one_line_error(capsys, "run", str(tmp_path), "-o", out)
    junk = tmp_path / "junk.npz"
    junk.write_bytes(b"PK\x03\x04 nothing")
    assert "not a readable .npz file" in one_line_error(capsys, "run", str(junk), "-o", out)
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    assert "expected an .npz file" in one_line_error(capsys, "run", str(single), "-o", out)
    objects = tmp_path / "objects.npz"
    np.savez(objects, q=np.array([{}]), k=1, v=1, beta=1)
    assert "not a readable .npz file" in one_line_error(capsys, "run", str(objects), "-o", out)
    path, _, _ = npz_inputs(tmp_path, extra=np.zeros(3))
    assert "found q, k, v, beta, g, initial_state, extra" in one_line_error(
        capsys, "run", path, "-o", out
    )
    path, _, _ = npz_inputs(tmp_path, beta=np.zeros((1, 3, 2), np.float32))
    assert "beta: expected (B, T, HV) = (1, 70, 2)" in one_line_error(
        capsys, "run", path, "-o", out
    )
    assert not os.path.exists(out)


def test_run_refuses_its_own_input_and_odd_flags(capsys, tmp_path):
    path, _, _ = npz_inputs(tmp_path)
    before = Path(path).read_bytes()
    assert "another file than the input" in one_line_error(capsys, "run", path, "-o", path)
    around = str(tmp_path / "nowhere" / ".." / Path(path).name)
    assert "cannot be written" in one_line_error(capsys, "run", path, "-o", around)
    assert Path(path).read_bytes() == before
    argv = ["run", path, "-o", "x.npz", "--operator", "recurrent", "--chunk-size", "16"]
    assert "has no chunks" in one_line_error(capsys, *argv)


def full_disk(*args, **kwargs):
    """Stands in for whatever writes into an open file, its first argument or its second."""
    file = next(x for x in args if hasattr(x, "write"))
    file.write(b"half a file")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", ["run", "demo", "bench"])
def test_a_full_disk_leaves_the_old_file(capsys, monkeypatch, tmp_path, command):
    from matplotlib.figure import Figure

    path, _, _ = npz_inputs(tmp_path)
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    monkeypatch.setattr(run.np, "savez", full_disk)
    monkeypatch.setattr(Figure, "savefig", full_disk)
    argv = {
        "run": ["run", path, "-o"],
        "demo": ["demo", "-o"],
        "bench": ["bench", "-T", "8", "-D", "4", "-H", "1", "--device", "cpu", "--plot"],
    }[command]
    assert main([*argv, str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("cannot be written (No space left on device)")
    assert out.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["in.npz", "out"]


def test_run_into_a_missing_folder(capsys, tmp_path):
    path, _, _ = npz_inputs(tmp_path)
    out = str(tmp_path / "nowhere" / "out.npz")
    assert "cannot be written (No such file" in one_line_error(capsys, "run", path, "-o", out)


def test_commands_for_a_gpu_say_why_there_is_none(capsys, monkeypatch):
    for module in ("console", "compile"):
        monkeypatch.setattr(f"cupy_delta.commands.{module}.gpu_problem", lambda: "no driver")
    assert "no GPU can be used: no driver" in one_line_error(capsys, "compile")
    assert "no GPU can be used: no driver" in one_line_error(capsys, "check", "--device", "gpu")


def test_compile_prepares_what_a_call_needs(capsys, monkeypatch):
    from cupy_delta.commands import compile as command
    from cupy_delta.cuda.spec import DeviceFacts

    class Recorder:
        facts = DeviceFacts(sm_count=132, shared_bytes=227 * 1024)
        compiled: ClassVar = []

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def prepare(self, launches):
            self.compiled.extend((x.entry, dict(x.defines)) for x in launches)

    monkeypatch.setattr(command, "current_device", Recorder)
    argv = ["compile", "-K", "64,128", "-B", "64", "--dtype", "float16"]
    argv += ["--passes", "backward", "step"]
    assert main([*argv, "--qk-l2norm"]) == 0
    entries = [name for name, _ in Recorder.compiled]
    each = {"wy_factors": 1, "forward": 1, "backward_state": 1, "backward_chunk": 1}
    assert {name: entries.count(name) // 2 for name in each} == each
    assert entries.count("decode") == 6 and entries.count("l2norm") == 4
    steps = [(d["ONE_TOKEN"], d["AHEAD"] > 0) for name, d in Recorder.compiled if name == "decode"]
    # Of one token, of several, and of several of which some are accepted.
    assert sorted(steps) == [(0, False)] * 2 + [(0, True)] * 2 + [(1, True)] * 2
    assert {d["HEAD_K"] for _, d in Recorder.compiled if "HEAD_K" in d} == {64, 128}
    assert f"{len(entries)} kernels ready" in capsys.readouterr().out
    assert main([*argv, "--gate"]) == 0
    assert {d["HAS_GATE"] for name, d in Recorder.compiled if name == "backward_chunk"} == {0, 1}


def test_compile_refuses_heads_that_no_call_has(capsys):
    error = one_line_error(capsys, "compile", "--heads", "3", "--value-heads", "4")
    assert "--value-heads: expected a multiple of --heads = 3, got 4" in error


@pytest.mark.parametrize(
    "passes, option, value",
    [
        (["forward", "backward"], "--pool-dtype", "bfloat16"),
        (["forward", "step"], "--checkpoint-every", "64"),
        (["step", "recurrent"], "--chunk-size", "32"),
    ],
)
def test_compile_refuses_options_of_other_passes(capsys, passes, option, value):
    """Nothing would be compiled for the calls that somebody has in mind."""
    error = one_line_error(capsys, "compile", "--passes", *passes, option, value)
    assert f"{option}: expected with --passes " in error
    assert f", got {' '.join(passes)}\n" in error


@pytest.mark.parametrize(
    "options", [[], ["--gate"], ["--gate", "channel", "--raw", "softplus"]], ids=" ".join
)
def test_compile_refuses_narrow_gates_that_no_call_has(capsys, options):
    error = one_line_error(capsys, "compile", "--narrow-gate", *options)
    assert "--narrow-gate: expected with --gate channel and without --raw" in error


@pytest.mark.slow
def test_traceback_on_request(tmp_path):
    argv = ["-m", "cupy_delta", "run", str(tmp_path / "none.npz"), "-o", "x.npz"]
    assert "Traceback" not in python(*argv).stderr
    assert "Traceback" in python(*argv, "--traceback").stderr
    assert "Traceback" in python("-m", "cupy_delta", "--traceback", *argv[2:]).stderr


def test_interruption_is_quiet(capsys, monkeypatch):
    def interrupt(seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "simulate", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
