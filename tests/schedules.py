"""Random schedules over a pool: what an engine does to slots, each act beside the token loop.

Slots are a layer of pages full of NaN. Every act is compared with the float64 token loop from what
its slots hold, and then all memory but the slots that it names has to be as it was, to the bit.
"""

from __future__ import annotations

import numpy as np
from helpers import definition, deviation, unit

import cupy_delta as cd

ACTS = ("prefill", "resume", "step", "verify", "commit", "evict")


class Schedule:
    """An engine's pool, and a source of chance.

    Parameters
    ----------
    dtype, pool_dtype
        Of inputs and of the pool.
    bounds : tuple of float
        Largest deviations of outputs and of states, of one act.
    chunk, most : int
        Tokens per chunk, and the longest prompt.
    """

    def __init__(
        self,
        seed,
        *,
        dtype,
        pool_dtype,
        bounds,
        K,
        V,
        chunk=None,
        every=16,
        most=40,
        gate="scalar",
        layout="kv",
        slots=7,
        H=1,
        G=2,
    ):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.bounds, self.gate, self.layout = dtype, bounds, gate, layout
        self.H, self.HV, self.K, self.V = H, H * G, K, V
        self.chunk, self.every, self.most = chunk, every, most
        self.state = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        shape = (self.HV, K, V) if layout == "kv" else (self.HV, V, K)
        self.whole = np.full((slots, 3, *shape), np.nan, pool_dtype)
        self.pool = self.whole[:, 1]
        self.alive: set[int] = set()
        self.done = dict.fromkeys(ACTS, 0)

    # ---- chance ----------------------------------------------------------------------------------

    def inputs(self, T):
        rng, heads = self.rng, (1, T, self.HV)
        q, k = unit(rng.standard_normal((2, 1, T, self.H, self.K)))
        v, beta = rng.standard_normal((*heads, self.V)), rng.uniform(0, 1, heads)
        g = None
        if self.gate is not None:
            g = -rng.exponential(0.2, (*heads, self.K) if self.gate == "channel" else heads)
            g[rng.uniform(size=g.shape) < 0.02] = -np.inf
        return [None if x is None else x.astype(self.dtype) for x in (q, k, v, beta, g)]

    def some(self, slots, most):
        """Choose some of the slots, in any order."""
        slots = sorted(slots)
        return self.rng.permutation(slots)[: self.rng.integers(1, most + 1)] if slots else []

    def empty(self):
        return set(range(len(self.pool))) - self.alive

    # ---- acts ------------------------------------------------------------------------------------

    def act(self, what: str) -> None:
        """Do something, if there are slots to do it to."""
        if getattr(self, what)() is not False:
            self.done[what] += 1

    def run(self, acts: int) -> None:
        while sum(self.done.values()) < acts:
            self.act(ACTS[self.rng.integers(len(ACTS))])

    def prefill(self):
        """New requests, in empty slots: by a mask, or by a negative index."""
        written = self.some(self.empty(), 3)
        if not len(written):
            return False
        fresh = self.rng.random(len(written)) < 0.5
        read = np.where(fresh, written, -1)
        self.whole_sequences(read, written, fresh)

    def resume(self):
        """Prompts that go on: in their slots, or several from one into empty ones."""
        read = self.some(self.alive, 3)
        if not len(read):
            return False
        free = self.rng.permutation(sorted(self.empty()))
        if len(free) and self.rng.random() < 0.5:
            read = np.full(min(len(free), 3), read[0])
            return self.whole_sequences(read, free[: len(read)])
        self.whole_sequences(read, np.where(self.rng.random(len(read)) < 0.8, read, -1))

    def step(self):
        """New tokens of some requests, and rows without one."""
        slots = self.some(self.alive, 4)
        if not len(slots):
            return False
        slots = np.where(self.rng.random(len(slots)) < 0.8, slots, -1)
        self.tokens(slots, slots)

    def verify(self):
        """Drafts of which nothing is kept."""
        slots = self.some(self.alive, 3)
        if not len(slots):
            return False
        self.tokens(slots, slots, accept=lambda lengths: np.zeros_like(lengths))

    def commit(self):
        """Drafts of which some are kept, where they were or in empty slots."""
        read = self.some(self.alive, 3)
        if not len(read):
            return False
        free = self.rng.permutation(sorted(self.empty()))
        written = free[: len(read)] if len(free) >= len(read) and self.rng.random() < 0.3 else read
        self.tokens(read, written, accept=lambda n: self.rng.integers(0, n + 1))

    def evict(self):
        """Requests that are done: their slots are full of NaN again."""
        for slot in self.some(self.alive, 2):
            self.pool[slot] = np.nan
            self.alive.remove(slot)

    # ---- calls, and what they should have done ---------------------------------------------------

    def whole_sequences(self, read, written, fresh=None):
        lengths = self.rng.integers(0, self.most, len(read))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        args, start = self.inputs(ends[-1]), self.states(read)
        where = dict(state_indices=read, output_state_indices=written)
        if fresh is not None:
            start[fresh] = 0
            where["fresh"] = fresh
        elif np.array_equal(read, written):
            del where["output_state_indices"]
        every = self.every if self.rng.random() < 0.3 else None
        before = self.whole.copy()
        result = cd.chunk_delta_rule(
            *args,
            cu_seqlens=ends,
            state=self.pool,
            **where,
            **self.options(),
            chunk_size=self.chunk,
            checkpoint_every=every,
        )
        self.compare(result.o, before, args, ends, start, written, lengths)
        for n in range(len(read) if every else 0):
            for i in range(lengths[n] // every):
                part = [
                    None if x is None else x[:, ends[n] : ends[n] + (i + 1) * every] for x in args
                ]
                _, exact = self.loop(part, start[n : n + 1], None)
                found = result.checkpoints[:, ends[n] // every + i]
                assert deviation(found, exact) < self.bounds[1]

    def tokens(self, read, written, accept=None):
        lengths = self.rng.integers(0, 4, len(read))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        args, start = self.inputs(ends[-1]), self.states(read)
        where, kept = dict(state_indices=read), lengths
        if accept is not None:
            where["accepted"] = kept = accept(lengths)
        if read is not written:
            where["output_state_indices"] = written
        before = self.whole.copy()
        o = cd.delta_rule_step(*args, state=self.pool, cu_seqlens=ends, **where, **self.options())
        for n in np.flatnonzero(np.asarray(read) < 0):
            assert not o[:, ends[n] : ends[n + 1]].any()
        self.compare(o, before, args, ends, start, written, kept, skipped=np.asarray(read) < 0)

    def options(self):
        return dict(state_layout=self.layout)

    def states(self, read):
        """What slots hold, in the dtype of states; zero for none."""
        read = np.asarray(read)
        return np.where(
            (read >= 0)[:, None, None, None], self.pool[read].astype(self.state), 0
        ).astype(self.state)

    def loop(self, args, start, ends):
        return definition(*args, initial_state=start, cu_seqlens=ends, state_layout=self.layout)

    def compare(self, o, before, args, ends, start, written, kept, skipped=None):
        exact, _ = self.loop(args, start, ends)
        for n, slot in enumerate(written):
            tokens = slice(ends[n], ends[n + 1])
            if skipped is not None and skipped[n]:
                continue
            assert deviation(o[:, tokens], exact[:, tokens]) < self.bounds[0]
            part = [None if x is None else x[:, ends[n] : ends[n] + kept[n]] for x in args]
            _, state = self.loop(part, start[n : n + 1], None)
            if slot >= 0:
                assert deviation(self.pool[slot], state[0]) < self.bounds[1]
                before[slot, 1] = self.pool[slot]
                self.alive.add(int(slot))
        assert self.whole.tobytes() == before.tobytes()
