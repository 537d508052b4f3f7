"""One sequence over several GPUs of a machine, by NCCL: is it right, and how does it scale.

python benchmarks/scaling.py -o benchmarks/results/DATE-GPU-scaling.json

One process for each GPU (all that there are, or --gpus). First every share is compared with the
same call on one GPU, and calls that do not fit together must be errors on every rank. Then strong
scaling (the same T on one GPU and on all), weak scaling (T for each), what the pieces cost, and at
the end a rank that dies. Times are in milliseconds, from a common start to the last rank's end,
medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from queue import Empty

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HEADS, VALUE_HEADS, SIZE = 16, 32, 128
LENGTHS = (131072, 32768, 524288)  # in order of importance
LAST_ROW = 18.0  # seconds that the last row and what follows may take
NCCL_SECONDS = 20.0  # from the start until all ranks have met
PERIOD = 4096  # tokens that are drawn; longer sequences repeat them
STEPS = (
    "check_products",
    "check_shares",
    "check_errors",
    "time_first",
    "check_other_shares",
    "time_others",
    "check_death",
)
PASSES = {"forward": "forward", "both": "forward and backward"}
# The largest deviation from one GPU's numbers, against their largest.
TOLERANCE = {"bfloat16": 3e-2, "float16": 5e-3, "float32": 1e-4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="by default all")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--quick", action="store_true", help="the checks alone")
    parser.add_argument("--seconds", type=float, default=140.0, help="after which it stops itself")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    start = time.time()
    # Ranks of one machine need no other network to find each other.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # this process stays without a CUDA context
        found, name = pool.apply(_facts)
    size = args.gpus or found
    said, names = context.Queue(), context.Queue()
    steps = [x for x in STEPS if x.startswith("check_") or not args.quick]
    call = (size, tuple(args.lengths), steps, start + args.seconds - LAST_ROW, said, names)
    workers = [
        context.Process(target=work, args=(rank, *call), daemon=True) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    results: dict = {"gpu": name, "gpus": size, "heads": [HEADS, VALUE_HEADS], "size": SIZE}
    failed, up, ended = 0, 0, 0
    while ended < size:
        end = start + args.seconds - 2 if up == size else start + NCCL_SECONDS
        try:
            kind, *words = said.get(timeout=max(0.1, end - time.time()))
        except Empty:
            failed += 1
            print("FAILED: no word from a rank; all are stopped", flush=True)
            break
        if kind == "up":
            up += 1
        elif kind == "end":
            ended += 1
        elif kind == "row":
            results.setdefault("rows", []).append(words[0])
            print("  ".join(f"{k} {v}" for k, v in words[0].items()), flush=True)
        else:
            failed += kind == "failed"
            print(*words, flush=True)
    for worker in workers:
        worker.join(1)
        worker.kill()
    results["seconds"] = round(time.time() - start, 1)
    print(f"{results['seconds']} s, {failed} failed", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed > 0)


def _facts():
    import cupy
    from cupy.cuda import nccl

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{name}, NCCL {nccl.get_version()}, CuPy {cupy.__version__}", flush=True)
    return cupy.cuda.runtime.getDeviceCount(), name


def work(rank: int, size: int, lengths, steps, deadline: float, said, names) -> None:
    """Do everything that one rank does."""
    import cupy
    from cupy.cuda import nccl

    cupy.cuda.Device(rank).use()
    if rank == 0:  # who makes the name must live, for the others ask it
        name = nccl.get_unique_id()
        for _ in range(size - 1):
            names.put(name)
    else:
        name = names.get()
    comm = nccl.NcclCommunicator(size, name, rank)
    said.put(("up",))
    session = Session(comm, lengths, deadline, said)
    for step in steps:
        start = time.monotonic()
        try:
            words = getattr(session, step)()
            if rank == 0 and words:
                said.put(("said", f"{step}: {words} ({time.monotonic() - start:.1f} s)"))
        except Exception:
            said.put(("failed", f"{step}, rank {rank}: FAILED\n{traceback.format_exc()}"))
    said.put(("end",))
    said.close()
    said.join_thread()
    os._exit(0)  # a communicator whose other end is gone cannot be taken down in order


class Session:
    """One rank's checks and timings."""

    def __init__(self, comm, lengths, deadline: float, queue):
        import cupy

        import cupy_delta
        from cupy_delta import parallel

        self.cupy, self.cd, self.parallel = cupy, cupy_delta, parallel
        self.comm, self.queue, self.deadline, self.lengths = comm, queue, deadline, lengths
        self.waiting = parallel.NCCLCommunicator(comm, timeout=15)
        self.free = parallel.NCCLCommunicator(comm, timeout=None)
        self.rank, self.size = self.waiting.rank, self.waiting.size

    # ---- is it right -----------------------------------------------------------------------------

    def check_products(self) -> str:
        """The backward's products, on each GPU alone; if they fail, only forwards are timed."""
        import ml_dtypes

        from cupy_delta.parallel.products import outer_sum

        self.passes = {"forward": PASSES["forward"]}
        rng, worst = np.random.default_rng(0), {}
        for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
            a = rng.standard_normal((2, 77, 3, 48)).astype(dtype)
            b = rng.standard_normal((2, 77, 3, 32)).astype(dtype)
            wanted = np.einsum("bthk,bthv->bhkv", a.astype(np.float64), b.astype(np.float64))
            found = self.cupy.asnumpy(outer_sum(self.cupy.asarray(a), self.cupy.asarray(b)))
            worst[np.dtype(dtype).name] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if not max(worst.values()) < 1e-5:
            raise AssertionError(f"products: {worst}")
        self.passes = PASSES
        return f"{worst}"

    def check_shares(self) -> str:
        """Compare this rank's share with one GPU's call on everything."""
        return self.check_cases(
            ("bfloat16", None, "kv", False, 2), ("bfloat16", "", "kv", False, 1)
        )

    def check_other_shares(self) -> str:
        if not self.time_left():
            return "no time"
        return self.check_cases(("float32", "", "vk", False, 1), ("bfloat16", None, "kv", True, 1))

    def check_cases(self, *cases) -> str:
        said = []
        for dtype, ragged, layout, gate, B in cases:
            worst = max(self.gathered(self.check_share(dtype, ragged is not None, layout, gate, B)))
            words = f"{dtype}{'' if ragged is None else ' ragged'}{' gated' * gate}"
            said.append(f"{words} {worst:.1e}")
            if not worst < TOLERANCE[dtype]:
                raise AssertionError(f"{said[-1]} of at most {TOLERANCE[dtype]}")
        return "deviations from one GPU: " + ", ".join(said)

    def check_share(self, dtype, ragged: bool, layout, gate: bool, B: int) -> float:
        import ml_dtypes

        rng = np.random.default_rng(1)
        H, HV, K, V = 2, 4, SIZE, SIZE
        tokens = [300 + 37 * r for r in range(self.size)]
        if self.size > 2:
            tokens[1] = 0
        T = sum(tokens)
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)

        def array(*shape):
            return self.cupy.asarray(rng.standard_normal(shape).astype(kind))

        q, k, v, do = array(B, T, H, K), array(B, T, H, K), array(B, T, HV, V), array(B, T, HV, V)
        beta = self.cupy.asarray(rng.uniform(0, 1, (B, T, HV)).astype(np.float32))
        g = self.cupy.asarray(-0.05 * rng.random((B, T, HV), np.float32)) if gate else None
        ends = np.array([0, 100, 100, T - 150, T]) if ragged else None
        N = B if ends is None else len(ends) - 1
        shape = (N, HV, K, V) if layout == "kv" else (N, HV, V, K)
        states = [self.cupy.asarray(rng.standard_normal(shape).astype(np.float32)) for _ in "ab"]
        options = dict(
            initial_state=states[0], cu_seqlens=ends, qk_l2norm=True, state_layout=layout
        )
        start = sum(tokens[: self.rank])
        own = slice(start, start + tokens[self.rank])
        every = (q, k, v, beta, g)
        share = [None if x is None else self.cupy.ascontiguousarray(x[:, own]) for x in every]
        cut = options | dict(tokens=tokens, states_on="all")
        results, wanted = [], []
        for _ in range(2):  # the second call agrees on nothing any more
            o, final = self.parallel.chunk_delta_rule(self.waiting, *share, **cut)
        results += [o, final]
        o, final = self.cd.chunk_delta_rule(*every, **options)
        wanted += [o[:, own], final]
        names = [*("q", "k", "v", "beta"), *["g"] * gate]
        o, final, residuals = self.parallel.chunk_delta_rule_fwd(self.waiting, *share, **cut)
        d = self.cupy.ascontiguousarray(do[:, own])
        gradients = self.parallel.chunk_delta_rule_bwd(residuals, d, states[1])
        results += [o, final, *(getattr(gradients, x) for x in names), gradients.initial_state]
        o, final, residuals = self.cd.chunk_delta_rule_fwd(*every, **options)
        gradients = self.cd.chunk_delta_rule_bwd(residuals, do, states[1])
        wanted += [o[:, own], final, *(getattr(gradients, x)[:, own] for x in names)]
        wanted.append(gradients.initial_state)
        worst = 0.0
        for x, y in zip(results, wanted, strict=True):
            if y.size:
                x, y = (self.cupy.asnumpy(z).astype(np.float64) for z in (x, y))
                difference = np.abs(x - y).max() / np.abs(y).max()
                worst = max(worst, np.inf if np.isnan(difference) else float(difference))
        return worst

    def check_errors(self) -> str:
        """Calls that do not fit together are errors on every rank."""
        if self.size == 1:
            return "one rank fits itself"
        names = []
        for spoil in ("dtype", "K", "argument"):
            kind, K = np.float32, 64
            if self.rank == self.size - 1:
                kind, K = np.float16 if spoil == "dtype" else kind, 32 if spoil == "K" else K
            q, v = self.cupy.zeros((1, 8, 1, K), kind), self.cupy.zeros((1, 8, 1, 64), kind)
            beta = self.cupy.zeros((1, 8, 1 + (spoil == "argument" and self.rank == 0)), kind)
            try:
                self.parallel.chunk_delta_rule(self.waiting, q, q, v, beta)
                raise AssertionError(f"{spoil}: no error")
            except (TypeError, ValueError) as error:
                names.append(f"{type(error).__name__}: {error}")
        return "; ".join(names)

    def check_death(self) -> str:
        """The last rank leaves without a word; the others must hear of it."""
        q, k, v, _, beta = self.arrays(1024)
        call = (q, k, v, beta)
        tokens = [1024] * self.size
        self.parallel.chunk_delta_rule(self.waiting, *call, tokens=tokens)
        self.meet()
        if self.rank == self.size - 1:
            return ""
        patient = self.parallel.NCCLCommunicator(self.comm, timeout=3)
        start = time.monotonic()
        try:
            self.parallel.chunk_delta_rule(patient, *call, tokens=tokens)
        except (TimeoutError, RuntimeError) as error:
            spent = time.monotonic() - start
            self.cupy.cuda.get_current_stream().synchronize()
            return f"after {spent:.1f} s {type(error).__name__}: {error}"
        raise AssertionError("no error from a rank that is gone")

    # ---- how fast --------------------------------------------------------------------------------

    def arrays(self, T: int):
        """Return q, k, v, do in bfloat16 and beta, of T tokens."""
        import ml_dtypes

        rng = np.random.default_rng(2)

        def draw(heads: int, unit: bool):
            x = rng.standard_normal((1, min(T, PERIOD), heads, SIZE), np.float32)
            if unit:
                x /= np.linalg.norm(x, axis=-1, keepdims=True)
            x = self.cupy.asarray(x.astype(ml_dtypes.bfloat16).view(np.uint16))
            x = self.cupy.tile(x, (1, -(-T // PERIOD), 1, 1))[:, :T]
            return self.cupy.ascontiguousarray(x).view(ml_dtypes.bfloat16)

        q, k = (draw(HEADS, unit=True) for _ in "qk")
        v, do = (draw(VALUE_HEADS, unit=False) for _ in "vo")
        beta = self.cupy.random.default_rng(3).random((1, T, VALUE_HEADS), np.float32)
        return q, k, v, do, beta

    def time_first(self) -> str:
        """Time the first length, and what the pieces of it cost."""
        T = self.lengths[0]
        self.time_strong(T)
        if self.time_left():
            self.time_pieces(T // self.size)
        return f"T = {T}"

    def time_others(self) -> str:
        """Time weak scaling of the first length, then all of the others."""
        for T in self.lengths:
            if not self.time_left():
                return f"no time for T = {T}"
            alone = self.alone if self.lengths[0] == T else self.time_strong(T)
            if not self.time_left():
                return f"no time for {self.size} times T = {T}"
            larger = self.time_cut(T * self.size, "free")
            for what, words in self.passes.items():
                row = {"T for each": T, "of": words, f"{self.size} GPUs": round(larger[what], 3)}
                self.row(row | {"efficiency": round(alone[what] / larger[what], 3)})
        return "all lengths"

    def time_strong(self, T: int) -> dict:
        alone = self.time_alone(T)
        cut = {name: self.time_cut(T, name) for name in ("waiting", "free")}
        for what, words in self.passes.items():
            row = {
                "T": T,
                "of": words,
                "one GPU": round(alone[what], 3),
                f"{self.size} GPUs": round(cut["waiting"][what], 3),
                "without host waits": round(cut["free"][what], 3),
            }
            best = min(x[what] for x in cut.values())
            self.row(row | {"times as fast": round(alone[what] / best, 2)})
        if self.lengths[0] == T:
            self.alone = alone
        return alone

    def time_left(self) -> bool:
        return all(self.gathered(time.time() < self.deadline))

    def row(self, row: dict) -> None:
        if self.rank == 0:
            self.queue.put(("row", row))

    def time_alone(self, T: int) -> dict:
        q, k, v, do, beta = self.arrays(T) if self.rank == 0 else [None] * 5
        found = {}
        for what in self.passes:

            def once(what=what):
                if self.rank:
                    return
                if what == "forward":
                    self.cd.chunk_delta_rule(q, k, v, beta)
                else:
                    residuals = self.cd.chunk_delta_rule_fwd(q, k, v, beta).residuals
                    self.cd.chunk_delta_rule_bwd(residuals, do)

            found[what] = self.time(once)
        self.release()
        return found

    def time_cut(self, T: int, which: str) -> dict:
        share = T // self.size
        q, k, v, do, beta = self.arrays(share)
        communicator, tokens = getattr(self, which), [share] * self.size
        p, found = self.parallel, {}
        for what in self.passes:

            def once(what=what, call=(communicator, q, k, v, beta), do=do):
                if what == "forward":
                    p.chunk_delta_rule(*call, tokens=tokens)
                else:
                    p.chunk_delta_rule_bwd(p.chunk_delta_rule_fwd(*call, tokens=tokens)[2], do)

            found[what] = self.time(once)
        del q, k, v, do, beta, once
        self.release()
        return found

    def time_pieces(self, T: int) -> None:
        """Time what the cost model of docs/parallel.md is made of, on each GPU alone."""
        from cupy_delta import cuda, problem

        q, k, v, do, beta = self.arrays(T)
        names = ("scale", "initial_state", "cu_seqlens", "out")
        options = dict.fromkeys(names) | dict(qk_l2norm=False, state_layout="kv")
        call = problem.operator_problem(q, k, v, beta, None, **options)
        residuals = self.cd.chunk_delta_rule_fwd(q, k, v, beta).residuals
        state = self.cupy.zeros((1, VALUE_HEADS, SIZE, SIZE), np.float32)
        told = self.cd.Transfer(state, state)
        rows = self.cupy.zeros((16, 2 * state.size), np.float32)
        pieces = {"sequence_transfer": lambda: self.cd.sequence_transfer(k, v, beta)}
        for name, training in (("forward", False), ("forward with residuals", True)):
            begin = partial(cuda.begin_forward, call, "transfer", training)
            pieces[f"{name}, first half"] = begin
            pieces[f"{name}, second half"] = partial(cuda.finish_forward, begin(), state)
        begin = partial(cuda.begin_backward, residuals, do, None, "transfer")
        pieces["backward, first half"] = begin
        pieces["backward, second half"] = partial(cuda.finish_backward, begin(), do, state)
        pieces["forward"] = lambda: self.cd.chunk_delta_rule(q, k, v, beta)
        pieces["forward with residuals"] = lambda: self.cd.chunk_delta_rule_fwd(q, k, v, beta)
        pieces["backward"] = lambda: self.cd.chunk_delta_rule_bwd(residuals, do)
        pieces["apply"] = lambda: told.apply(state)
        for ranks in (2, 4, 16):
            joined = partial(cuda.joined, rows, range(ranks), state.shape)
            pieces[f"{ranks} ranks joined"] = joined
        row = {"T of a rank": T}
        row |= {name: round(self.time(once), 3) for name, once in pieces.items()}
        for size in (2**10, 2**21, 2**22, 2**26):
            x = self.cupy.zeros(size, np.uint8)
            for name in ("all_gather", "shift"):
                arguments = (x,) if name == "all_gather" else (x, 1)
                once = partial(getattr(self.free, name), *arguments)
                row[f"{name} of {size} bytes"] = round(self.time(once), 4)
        self.row(row)

    def time(self, once, repeats: int = 7) -> float:
        """Return the median over repeats of the slowest rank's milliseconds."""
        stream = self.cupy.cuda.get_current_stream()
        for _ in range(2):
            once()
            stream.synchronize()
        spent = []
        for _ in range(repeats):
            self.meet()
            start = time.perf_counter()
            once()
            stream.synchronize()
            spent.append(1e3 * (time.perf_counter() - start))
        every = self.gathered(spent)
        return statistics.median(max(times) for times in zip(*every, strict=True))

    # ---- together --------------------------------------------------------------------------------

    def gathered(self, x) -> list:
        """Return a number, or several, of every rank."""
        return self.waiting.all_gather(np.asarray(x, np.float64)).tolist()

    def meet(self) -> None:
        """Wait for every rank."""
        self.gathered(0.0)

    def release(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    sys.exit(main())
