"""Where commands write: refused before the work, standard output, devices, exit statuses."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta
from cupy_delta import starting
from cupy_delta.commands import bench, check, demo, main, run
from cupy_delta.commands.main import COMMANDS, _parser

SMALL = ["bench", "-T", "8", "-D", "4", "-H", "1", "--device", "cpu", "--repeats", "1"]


@pytest.fixture
def arrays(tmp_path):
    """Name of a file with a right call; changes replace its arrays."""

    def save(dtype=np.float32, **changes):
        (q, k, v, beta, _), _ = make_inputs(20, H=2, dtype=dtype)
        np.savez(tmp_path / "in.npz", **dict(q=q, k=k, v=v, beta=beta) | changes)
        return str(tmp_path / "in.npz")

    return save


@pytest.fixture
def no_work(monkeypatch):
    """Work that must not begin."""

    def work(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr(check, "_error", work)
    monkeypatch.setattr(bench, "_time", work)
    monkeypatch.setattr(demo, "simulate", work)
    monkeypatch.setattr(run, "_load", work)


def command(option, path, arrays):
    """Arguments of a command that writes to a path, by the option that names it."""
    return {
        "check --json": ["check", "--json", path],
        "bench -o": [*SMALL, "-o", path],
        "bench --plot": [*SMALL, "--plot", path],
        "demo -o": ["demo", "-o", path],
        "run -o": ["run", arrays(), "-o", path],
    }[option]


OPTIONS = ["check --json", "bench -o", "bench --plot", "demo -o", "run -o"]
NO_JSON = ["bench --plot", "demo -o", "run -o"]


def error_of(capsys, argv):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("option", OPTIONS)
def test_what_cannot_be_written_is_refused_before_the_work(
    capsys, tmp_path, arrays, no_work, option
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, reason in (
        ("nowhere/x", "cannot be written (No such file or directory)"),
        ("nowhere/../x", "cannot be written (No such file or directory)"),
        ("file/../x", "cannot be written (Not a directory)"),
        ("x/", "cannot be written (it names a directory)"),
        ("file/x", "cannot be written (Not a directory)"),
        ("folder", "cannot be written (it is a directory)"),
    ):
        path = os.path.join(tmp_path, name)
        assert f"{path}: {reason}" in error_of(capsys, command(option, path, arrays))
    assert sorted(os.listdir(tmp_path / "folder")) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_a_name_that_is_empty(capsys, arrays, no_work, option):
    assert "expected the name of a file to write, got ''" in error_of(
        capsys, command(option, "", arrays)
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_full_disk_is_noticed_before_the_work(tmp_path, arrays, option):
    """A limit on the size of files stands for it."""
    (tmp_path / "folder").mkdir()
    argv = command(option, str(tmp_path / "folder" / "x"), arrays)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
    process = start("-B", "-m", "cupy_delta", *argv, stdout=subprocess.PIPE, preexec_fn=limit)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error.count("\n")) == (2, "", 1)
    assert error.endswith("x: cannot be written (File too large)\n")
    assert os.listdir(tmp_path / "folder") == []


def test_two_results_in_one_file(capsys, tmp_path, no_work):
    path, same = str(tmp_path / "x"), str(tmp_path / "." / "x")
    error = error_of(capsys, [*SMALL, "-o", path, "--plot", same])
    assert "expected another file for each result" in error
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_read_only_file_is_kept(capsys, monkeypatch, tmp_path, arrays, no_work, option):
    path = tmp_path / "kept"
    path.write_text("kept")
    allowed = lambda x, mode: x != str(path)  # noqa: E731  root may write everything
    monkeypatch.setattr("cupy_delta.commands.output.os.access", allowed)
    assert "it is read-only" in error_of(capsys, command(option, str(path), arrays))
    assert path.read_text() == "kept"


@pytest.mark.parametrize("option", NO_JSON)
def test_only_json_goes_to_the_output(capsys, arrays, no_work, option):
    error = error_of(capsys, command(option, "-", arrays))
    assert "-: expected the name of a file; only JSON goes to the output" in error


@pytest.mark.parametrize("option", NO_JSON)
def test_endings_that_promise_something_else(capsys, tmp_path, arrays, no_work, option):
    error = error_of(capsys, command(option, str(tmp_path / "x.txt"), arrays))
    assert "x.txt: expected a name that ends in " in error and "got .txt" in error
    assert (".npz" if option == "run -o" else ".png, ") in error


def test_json_to_the_output(capsys, monkeypatch):
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    assert main(["check", "--device", "cpu", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert {row["verdict"] for row in json.loads(captured.out)} == {"ok"}
    assert "4 of 4 cases within their bounds" in captured.err
    assert main([*SMALL, "-o", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["T"] == 8
    assert "tokens/s" in captured.err


def test_a_device_is_written_to_and_a_link_followed(tmp_path, arrays):
    """Not replaced by a file, as /dev/null would be for root."""
    before = os.stat("/dev/null")
    assert main(["run", arrays(), "-o", "/dev/null"]) == 0
    assert main(["demo", "-o", "/dev/null"]) == 0
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode) and after.st_ino == before.st_ino
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.npz"
    link.symlink_to(tmp_path / "there" / "out.npz")
    assert main(["run", arrays(), "-o", str(link)]) == 0
    assert link.is_symlink()
    assert np.load(link)["o"].shape == (1, 20, 2, 7)


def test_a_pipe_is_written_to(tmp_path, arrays):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    copy = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    assert main([*SMALL, "-o", str(pipe)]) == 0
    out, _ = copy.communicate(timeout=60)
    assert json.loads(out)["rows"]
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_an_open_file_is_written_to_by_its_number():
    """As shells name what reads it: `bench -o >(command)`."""
    reader, writer = os.pipe()
    argv = [*SMALL, "-o", f"/dev/fd/{writer}"]
    process = start("-m", "cupy_delta", *argv, stdout=subprocess.PIPE, pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader) as file:
        assert json.load(file)["rows"]
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_run_says_which_outputs_are_not_finite(capsys, tmp_path, arrays):
    out = str(tmp_path / "out.npz")
    path = arrays(k=np.full((1, 20, 2, 5), 1e10, np.float32))
    assert main(["run", path, "-o", out, "--operator", "recurrent"]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "values of o, the first at batch row 0, token 2, head 0; " in captured.err
    assert "of 70 values of final_state, the first at sequence 0, head 0; keys" in captured.err
    assert "--qk-l2norm" in captured.err and "When it diverges" in captured.err
    bad = ~np.isfinite(np.load(out)["o"])
    assert f"not finite: {bad.sum()} of 280 values of o" in captured.err
    assert main(["run", path, "-o", out, "--qk-l2norm"]) == 0


def test_run_says_that_inputs_are_not_finite(capsys, tmp_path, arrays):
    v = np.ones((1, 20, 2, 7), np.float32)
    v[0, 4, 1, 2] = np.nan
    assert main(["run", arrays(v=v), "-o", str(tmp_path / "out.npz")]) == 3
    error = capsys.readouterr().err
    assert (
        "in.npz there are 1 of 280 values of v, the first at batch row 0, token 4, head 1" in error
    )
    assert "--qk-l2norm" not in error


@pytest.mark.parametrize(
    "name, shape, value, place",
    [
        ("g", (1, 20, 2), np.nan, "1 of 40 values of g, the first at batch row 0, token 0, head 0"),
        ("initial_state", (1, 2, 5, 7), np.inf, "1 of 70 values of initial_state, the first at"),
    ],
)
def test_run_blames_optional_inputs_too(capsys, tmp_path, arrays, name, shape, value, place):
    x = np.zeros(shape, np.float32)
    x.flat[0] = value
    g = np.zeros((1, 20, 2), np.float32)
    g[0, 7] = -np.inf  # forgets all, which is no reason
    path = arrays(**{"g": g, name: x})
    assert main(["run", path, "-o", str(tmp_path / "out.npz")]) == 3
    error = capsys.readouterr().err
    assert f"in.npz there are {place}" in error
    assert "values of g" not in error or name == "g"
    assert "--qk-l2norm" not in error


def test_run_tells_how_to_read_bfloat16(capsys, tmp_path, arrays):
    out = str(tmp_path / "out.npz")
    path = arrays(ml_dtypes.bfloat16)
    assert main(["run", path, "-o", out, "--bfloat16"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    expression = shown.removeprefix("read o with ")
    o = eval(expression, dict(np=np, ml_dtypes=ml_dtypes))
    inputs = [np.load(path)[n].view(ml_dtypes.bfloat16) for n in ("q", "k", "v", "beta")]
    assert np.array_equal(o, cupy_delta.chunk_delta_rule(*inputs).o)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_run_on_whatever_there_is(monkeypatch, tmp_path, arrays, device):
    monkeypatch.setattr("cupy_delta.commands.console.gpu_problem", lambda: "no driver")
    assert main(["run", arrays(), "-o", str(tmp_path / "out.npz"), "--device", device]) == 0


@pytest.mark.parametrize("name", ["check", "bench", "demo"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_a_seed_is_a_whole_number(capsys, name, value):
    with pytest.raises(SystemExit) as stop:
        main([name, f"--seed={value}"])
    assert stop.value.code == 2
    assert f"expected a whole number of at least 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_statuses_are_told(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "exit status: 0 success" in capsys.readouterr().out
    subparsers = next(a for a in _parser()._actions if a.dest == "command")
    assert [a.dest for a in subparsers.choices[name]._actions if not a.help] == []


def start(*argv, path=None, **streams):
    folders = [*([str(path)] if path else []), *sys.path]
    return subprocess.Popen(
        [sys.executable, *argv],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        **streams,
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", ["argparse", "statistics"])
def test_interruption_while_a_command_is_imported(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    process = start("-m", "cupy_delta", "info", path=tmp_path)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


@pytest.fixture
def interruptible():
    """A process that was started in the background of a shell ignores Ctrl-C, and so do its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ml_dtypes", "statistics"])
@pytest.mark.parametrize("program", [["-m", "cupy_delta"], ["cupy_delta"]])
def test_a_signal_while_a_command_is_imported(
    tmp_path, monkeypatch, interruptible, module, program
):
    """Of the library, before a line of the command has run, and of the command."""
    (tmp_path / f"{module}.py").write_text(
        "import sys, time; print(file=sys.stderr, flush=True); time.sleep(60)"
    )
    # As pip writes it.
    script = "import sys\nfrom cupy_delta.__main__ import run\nsys.exit(run())\n"
    (tmp_path / "cupy_delta").write_text(script)
    monkeypatch.chdir(tmp_path)
    process = start(*program, "info", path=tmp_path)
    assert process.stderr.readline() == "\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_an_error_with_its_traceback_has_the_status_of_an_error(tmp_path):
    argv = ["run", str(tmp_path / "none.npz"), "-o", str(tmp_path / "x.npz"), "--traceback"]
    process = start("-m", "cupy_delta", *argv)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" in error


def test_a_command_that_works_can_clear_up(monkeypatch, interruptible):
    """Once all is imported Ctrl-C is an exception."""
    signal.signal(signal.SIGINT, starting._end)
    found = []
    monkeypatch.setattr(
        demo, "simulate", lambda seed: found.append(signal.getsignal(signal.SIGINT))
    )
    assert main(["demo", "-o", "/dev/null"]) == 2
    assert found == [signal.default_int_handler]


def test_a_signal_while_others_import_the_library_is_an_exception(tmp_path, interruptible):
    (tmp_path / "ml_dtypes.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    program = "try:\n import cupy_delta\nexcept KeyboardInterrupt:\n print('caught')"
    process = start("-c", program, "-m", "cupy_delta", path=tmp_path, stdout=subprocess.PIPE)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "caught\n", "")


def closed(*argv, streams):
    """Run a command that is given some of its streams closed, and return status and output."""
    close = lambda: [os.close(stream) for stream in streams]  # noqa: E731
    process = start("-m", "cupy_delta", *argv, stdout=subprocess.PIPE, preexec_fn=close)
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


@pytest.mark.slow
def test_streams_that_are_closed():
    status, out, error = closed(*SMALL, "-o", "-", streams=[1])
    assert (status, out, error) == (2, "", "cupy_delta bench: -: the output is closed\n")
    status, out, _ = closed(*SMALL, "-o", "-", streams=[2])
    assert status == 0 and json.loads(out)["rows"]
    assert closed("info", streams=[1, 2])[0] == 0
    assert closed("run", "nowhere.npz", "-o", "x.npz", streams=[1, 2])[0] == 2


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_an_error_output_that_is_full_stops_no_work(tmp_path, arrays):
    diverging = arrays(k=np.full((1, 20, 2, 5), 1e10, np.float32))
    with open("/dev/full", "w") as full:
        for argv, status in (
            (["bench", "-T", "8", "-D", "4", "-H", "1", "--device", "cpu"], 0),
            (["run", diverging, "-o", str(tmp_path / "out.npz")], 3),
            (["run", str(tmp_path / "none.npz"), "-o", str(tmp_path / "out.npz")], 2),
        ):
            command = [sys.executable, "-m", "cupy_delta", *argv]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, env=environment)
            assert done.returncode == status


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = start("-m", "cupy_delta", "info", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == "cupy_delta info: [Errno 28] No space left on device\n"
