"""The GPU benchmark's own arithmetic: rows, floors, turns and report, with NumPy for a GPU."""

import gc
import json
import time
import weakref
from contextlib import nullcontext

import compare
import numpy as np
import pytest
from comparison import contestants, costs, rows, timing
from comparison import report as report_module

import cupy_delta


@pytest.mark.parametrize(
    ("D", "chunk", "forward", "backward"),
    [
        (64, 64, 42.5, 98.3),
        (128, 16, 106.8, 249.9),
        (128, 64, 132.7, 311.3),
        (256, 64, 460.6, 1081.3),
        (256, 128, 530.3, 1245.2),
    ],
)
def test_flops_per_token_and_head(D, chunk, forward, backward):
    row = rows.Row("", (1,), 1, 1, D, D)
    assert rows.flops(row, "forward", chunk) == pytest.approx(forward * 1e3, abs=60)
    assert rows.flops(row, "backward", chunk) == pytest.approx(backward * 1e3, abs=60)


@pytest.mark.parametrize(
    ("D", "G", "forward", "backward"),
    [(64, 1, 516, 904), (128, 1, 1028, 1800), (128, 4, 644, 1032), (128, 2, 772, 1288)],
)
def test_bytes_per_token_and_head(D, G, forward, backward):
    row = rows.Row("", (1,), 1, G, D, D)
    assert rows.traffic(row, "forward", states=0) == forward * G
    assert rows.traffic(row, "backward") == backward * G


def test_floor_is_the_slower_of_products_and_bytes():
    # 16/64 heads: bound by products, 120405 FLOP; 32/32 heads: by bytes, 1028 and the states.
    wide = rows.Row("", (32768,), 16, 64)
    assert rows.floor_ms(wide, "forward") == pytest.approx(120405 * 32768 * 64 / 790e9, rel=1e-4)
    equal = rows.Row("", (8192,) * 4, 32, 32)
    nbytes = 1028 * 32768 * 32 + 4 * 32 * 128 * 128 * 4
    assert rows.floor_ms(equal, "forward") == pytest.approx(nbytes / 4.3e9)


def test_a_row_is_named_by_what_it_is():
    named = [rows.Row("", (64,), 1, 2, 96, 192, decay=0.1, largest_beta=2.0)]
    named += [rows.Row("", (64,) * 3, 2, 2, 64, 64, decay=5.0), rows.Row("", (3, 5), 1, 1)]
    names = ["1x64 h1/2 k96 v192 gated beta 2", "3x64 h2/2 d64 gated 5", "2x3 h1/1"]
    assert [row.name for row in named] == names
    drawn = rows.draw(named[0], np)
    assert (drawn.q.shape[-1], drawn.v.shape[-1]) == (96, 192)
    assert 1 < drawn.beta.max() <= 2
    assert rows.draw(named[1], np).g.mean() == pytest.approx(-5, rel=0.2)
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)


def test_rows_with_a_gate_per_key_channel():
    row = rows.Row("", (64,), 1, 2, per_channel=True)
    assert row.name == "1x64 h1/2 per channel"
    g = rows.draw(row, np).g
    assert g.shape == (1, 64, 2, 128) and -5 <= g.min() < g.max() <= 0
    plain = rows.Row("", (64,), 1, 2)
    gates = 4 * 128 * 64 * 2
    assert rows.traffic(row, "forward") - rows.traffic(plain, "forward") == gates
    assert rows.traffic(row, "backward") - rows.traffic(plain, "backward") == 2 * gates
    for contestant in (contestants.FlaChannel, contestants.Cudnn):
        assert contestant.refusal(row, "backward") is None
        assert contestant.refusal(plain, "forward") == "gates per key channel only"
    assert contestants.FlaGated.refusal(row, "forward") == "no gate per key channel"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_inputs_are_copied_until_the_cache_is_exceeded_three_times(decay):
    row = rows.Row("", (2048,), 2, 8, 96, 192, decay=decay)
    inputs = rows.draw(row, np)
    given = (inputs.q, inputs.k, inputs.v, inputs.beta, *([inputs.g] if decay else []))
    size = sum(x.nbytes for x in given)
    assert row.input_bytes == size
    copies = rows.copies_past_cache(row, 60 << 20)
    assert (copies - 1) * size < 3 * (60 << 20) <= copies * size
    assert rows.copies_past_cache(rows.Row("", (32768,), 16, 64), 60 << 20) == 1


def test_rows_have_names_of_their_own_and_are_chosen_by_group_or_pattern():
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    assert rows.chosen([]) == list(rows.ROWS)
    assert {r.group for r in rows.chosen(["width"])} == {"width"}
    assert [r.name for r in rows.chosen(["1x2048 h2/8"])] == ["1x2048 h2/8"]
    assert len(rows.chosen(["ragged", "1x32768*"])) > len(rows.chosen(["ragged"])) == 3
    for row in rows.ROWS:
        assert sum(row.shortened().lengths) <= 512
        assert (row.shortened().H, row.shortened().HV) == (row.H, row.HV)


def test_contestants_take_turns_and_a_failing_one_stops_none():
    order = []

    def failing():
        raise RuntimeError("no such kernel\nand more")

    def clock(call):
        start = len(order)
        call()
        return 1.0 * (len(order) - start)

    runs = [
        timing.Run("a", "graph", lambda: order.append("a"), 2),
        timing.Run("b", "graph", failing, 2),
        timing.Run("c", "eager", lambda: order.append("c"), 1),
    ]
    assert timing.take_turns(runs, clock, 3) == {"b graph": "RuntimeError: no such kernel"}
    assert "".join(order[4:]) == "aacc" * 3  # after two runs each: two per reading of the clock
    found = timing.summarise(runs)
    assert found["ms"] == {"a": 0.5}
    assert found["eager_ms"] == {"c": 1.0}
    assert found["spread"] == {"a": 0.0}


class OnNumpy(contestants.Ours):
    """Ours on NumPy arrays."""

    def __init__(self, inputs):
        x = inputs
        self.arrays, self.do = (x.q, x.k, x.v, x.beta, x.g), x.do
        self.library, self.options = cupy_delta, {"cu_seqlens": x.cu_seqlens}

    @staticmethod
    def graph(copies, passes, stream):
        return timing.all_calls(copies, passes)

    @staticmethod
    def host(x):
        return x.astype(np.float64)

    @staticmethod
    def synchronise():
        return None


class WithoutGate(OnNumpy):
    name = "fla_gated"

    def __init__(self, inputs):
        super().__init__(inputs)
        self.arrays = self.arrays[:4]


class ForwardOnly(OnNumpy):
    name = "flashinfer"

    @staticmethod
    def refusal(row, passes):
        return "no backward" if passes == "backward" else None

    @staticmethod
    def graph(copies, passes, stream):
        raise RuntimeError("cannot be captured")


class Absent(OnNumpy):
    name = "fla"

    def __init__(self, inputs):
        raise ImportError("No module named 'fla'")


class NoGpu:
    name, cache_bytes, cupy = "no GPU", 10000, np

    class stream:
        synchronize = staticmethod(lambda: None)

    current = staticmethod(nullcontext)
    free = staticmethod(lambda: None)

    @staticmethod
    def clock(call):
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


@pytest.fixture(scope="module")
def report():
    saved = []
    few = [
        rows.Row("gva", (70,), 1, 2, 16, 16),
        rows.Row("ragged", (5, 64, 30), 1, 2, 16, 16, True),
    ]
    args = compare.arguments(["--repeats", "2"])
    field = [OnNumpy, ForwardOnly, Absent]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "driver", lambda: "none")
        compare.run(NoGpu, field, few, args, lambda r: saved.append(json.loads(json.dumps(r))))
    assert [len(r["rows"]) for r in saved] == [0, 1, 2, 3, 4, 4]
    return saved[-1]


def test_report_has_every_row_with_errors_and_what_failed(report):
    assert report["left_out"] == {"fla": "ImportError: No module named 'fla'"}
    assert report["host_us"]["cupy_delta"] > 0
    assert report["install_mb"]["cupy_delta"] > 1
    forward, backward = report["rows"][0], report["rows"][3]
    assert forward["copies"] > 1
    assert set(forward["ms"]) == {"cupy_delta"}
    assert set(forward["eager_ms"]) == {"cupy_delta", "flashinfer"}
    assert forward["failed"] == {"flashinfer graph": "RuntimeError: cannot be captured"}
    assert forward["apart"] == {"flashinfer": 0.0}
    assert backward["failed"] == {"flashinfer": "no backward"}
    for row in report["rows"]:
        assert 1e-4 < row["error"]["cupy_delta"] < 2e-2


def test_first_calls_find_empty_caches_then_warm_ones(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "assert sys.argv[1:] != ['--first-result-of', 'fla'], 'no fla here'\n"
        "folder = os.environ['CUPY_CACHE_DIR']\n"
        "if not os.listdir(folder):\n"
        "    time.sleep(0.5)\n"
        "open(folder + '/kernel', 'w').close()\n"
        "print('at', time.time())\n"
    )
    found = costs.first_call(["cupy_delta", "fla"], str(script))
    assert found["fla"] == {"failed": "AssertionError: no fla here"}
    assert found["cupy_delta"]["cold"] > 0.5
    assert 0 < found["cupy_delta"]["warm"] < found["cupy_delta"]["cold"]


def test_a_contestant_that_leaves_out_the_gate_is_seen():
    args = compare.arguments(["--repeats", "1", "--passes", "forward"])
    gated = [rows.Row("gated", (70,), 1, 2, 16, 16, decay=0.1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "driver", lambda: "none")
        report = compare.run(NoGpu, [OnNumpy, WithoutGate], gated, args, lambda r: None)
    (row,) = report["rows"]
    assert row["row"] == "1x70 h1/2 d16 gated"
    assert row["error"]["cupy_delta"] < 2e-2 < 0.1 < row["error"]["fla_gated"]
    assert row["apart"]["fla_gated"] > 0.1


def test_one_that_refuses_every_row_is_tried_all_the_same():
    """Whether it can be imported is known before anything is timed, and no host time is taken."""

    class Refuses(ForwardOnly):
        refusal = staticmethod(lambda row, passes: "no gate")

    class AbsentToo(Absent):
        refusal = Refuses.refusal

    args = compare.arguments(["--repeats", "1", "--passes", "forward"])
    gated = [rows.Row("gated", (70,), 1, 2, 16, 16, decay=0.1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "driver", lambda: "none")
        report = compare.run(NoGpu, [OnNumpy, Refuses, AbsentToo], gated, args, lambda r: None)
    assert report["left_out"] == {"fla": "ImportError: No module named 'fla'"}
    assert set(report["host_us"]) == {"cupy_delta"}
    assert report["rows"][0]["failed"] == {"flashinfer": "no gate"}


def test_who_takes_no_gate_says_so():
    row = rows.Row("gated", (70,), 1, 2, decay=0.1)
    assert contestants.Fla.refusal(row, "forward") == "no gate"
    assert contestants.Ours.refusal(row, "backward") is None
    for contestant in (contestants.Ours, contestants.FlashQla, contestants.FlashInfer):
        assert contestant.refusal(row, "forward") is None


def test_nothing_is_started_after_the_budget():
    args = compare.arguments(["--budget", "-1"])
    few = [rows.Row("gva", (70,), 1, 2, 16, 16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "driver", lambda: "none")
        report = compare.run(NoGpu, [OnNumpy], few, args, lambda r: None)
    assert report["rows"] == []
    assert report["not_measured"] == ["1x70 h1/2 d16 forward", "1x70 h1/2 d16 backward"]


def test_everybody_has_a_colour_and_a_mark():
    everybody = set(contestants.CONTESTANTS)
    assert everybody == set(report_module.COLOURS) == set(report_module.MARKERS)


@pytest.mark.slow
def test_page_and_figure_are_rendered_from_the_json_file(report, tmp_path, capsys):
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(report))
    assert compare.main(["--render", str(path)]) == 0
    page = (tmp_path / "compare.md").read_text()
    assert "# The chunked delta rule on no GPU" in page
    row = next(x for x in page.splitlines() if x.startswith("| 1x70 h1/2 d16 |"))
    cells = [x.strip() for x in row.strip("|").split("|")]
    assert len(cells) == 6
    assert "**" in cells[2] + cells[3]
    assert cells[3].endswith(" e")
    assert "fla (ImportError: No module named 'fla')" in page
    assert "2 rows without flashinfer, backward: no backward" in page
    assert page in capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_rows_can_be_listed_and_what_cannot_run_is_said(capsys, monkeypatch):
    assert compare.main(["--list", "--rows", "length"]) == 0
    assert "1x131072 h16/16" in capsys.readouterr().out
    assert compare.main(["--rows", "no such"]) == 2
    assert "no row matches" in capsys.readouterr().err
    monkeypatch.setattr("cupy_delta.commands.console.gpu_problem", lambda: "no driver")
    assert compare.main(["--rows", "length"]) == 2
    assert "no GPU can be used: no driver" in capsys.readouterr().err


class Recorder:
    """A stream that records nothing; a graph of it replays by counting."""

    def __init__(self):
        self.launched = 0

    def synchronize(self):
        pass

    def begin_capture(self):
        pass

    def end_capture(self):
        return self

    def launch(self, stream):
        stream.launched += 1


def test_what_replays_a_graph_keeps_what_was_captured():
    class Copy:
        workspace = nullcontext()

        def forward(self):
            pass

    copy, stream = Copy(), Recorder()
    once, alive = contestants.Ours.graph([copy], "forward", stream), weakref.ref(copy)
    del copy
    gc.collect()
    once()
    assert stream.launched == 1 and alive() is not None
    del once
    gc.collect()
    assert alive() is None
