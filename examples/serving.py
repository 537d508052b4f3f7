"""A small inference engine: continuous batching, a prefix cache and speculative decoding.

Requests come while others are served. Each has a slot in pages of states, (slots, layers, HV, K,
V), which `chunk_delta_rule` and `delta_rule_step` update in place, one layer after the other:
``pages[:, layer]``. A round of the engine is

1. a prefill: some tokens of the prompts that are not read to their end, of different lengths end to
   end. A prompt that begins as one before is taken up from the longest beginning whose state is
   kept (`checkpoint_every`); it is read where it lies, by as many as want to;
2. a step of all others: the tokens that were accepted in the round before, which their states take
   up (`accepted`), and after them drafts, which are only looked at. So drafts cost no second step,
   and one that is rejected is never written.

On a GPU (``--device gpu``) the steps of all rounds are one CUDA graph per layer: slots, lengths and
what is accepted are values in device memory. Free slots are full of NaN. In the end every request
is compared with itself alone, token by token in float64.

Run ``python examples/serving.py``; the picture of who had which slot when (``-o pool.png``) needs
matplotlib: the extra ``plot``.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
from serving_model import HV, LAYERS, STATE, VOCABULARY, H, K, Model, V
from surroundings import parser_of, save_figure, surroundings

from cupy_delta import Workspace, delta_rule_step
from cupy_delta.commands.console import positive

CHECKPOINT = 64  # tokens between states that are kept of a prompt
PREFILL = 256  # tokens of prompts per round
ACTIVE, CACHED, DRAFTS = 8, 6, 3  # requests at once, beginnings that are kept, drafts per step
MOST = 2 * (1 + DRAFTS)  # tokens of a request in a step: accepted ones, and drafts
TOLERANCE = 2e-3


@dataclass
class Request:
    """A prompt, and what has become of it."""

    number: int
    arrival: int
    prompt: list[int]
    wanted: int  # new tokens
    said: list[int] = field(default_factory=list)
    logits: list = field(default_factory=list)  # from which each of them was chosen
    slot: int = -1
    read: int = 0  # tokens of the prompt that its state has taken up
    pending: list[int] = field(default_factory=list)  # said, and not taken up yet
    taken_up: int = 0  # tokens that it did not have to read
    proposed: int = 0
    accepted: int = 0

    def say(self, logits) -> int:
        """Choose the likeliest token, if another one is wanted."""
        token = int(logits.argmax())
        self.said.append(token)
        self.pending.append(token)
        self.logits.append(logits)
        return token

    @property
    def finished(self) -> bool:
        return len(self.said) >= self.wanted

    def drafts(self) -> list[int]:
        """Guess what comes: what came after the same two tokens before."""
        all_tokens = self.prompt + self.said
        count = min(DRAFTS, self.wanted - len(self.said) - 1)
        for at in range(len(all_tokens) - 3, 0, -1):
            if all_tokens[at - 1 : at + 1] == all_tokens[-2:]:
                return (all_tokens[at + 1 :])[:count]
        return [7 * all_tokens[-1] % VOCABULARY] * count


def stream(count: int, seed: int = 0) -> list[Request]:
    """Make requests that arrive one after the other, many with the same beginning."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(VOCABULARY, size=n).tolist() for n in (200, 330, 64)]
    arrival, requests = 0, []
    for number in range(count):
        beginning = beginnings[rng.integers(3)] if rng.random() < 0.7 else []
        own = rng.integers(VOCABULARY, size=rng.integers(1, 150)).tolist()
        requests.append(Request(number, arrival, beginning + own, int(rng.integers(4, 40))))
        arrival += int(rng.poisson(1.5))
    return requests


class PrefixCache:
    """Slots with the states after beginnings of prompts; the least recently used is given up."""

    def __init__(self, slots: list[int]):
        self.free, self.slots = slots, OrderedDict()

    def longest(self, prompt: list[int]) -> tuple[int, int]:
        """Return how many tokens of a prompt are known, and the slot of the state after them."""
        for length in range((len(prompt) - 1) // CHECKPOINT * CHECKPOINT, 0, -CHECKPOINT):
            key = tuple(prompt[:length])
            if key in self.slots:
                self.slots.move_to_end(key)
                return length, self.slots[key]
        return 0, -1

    def place(self, beginning: list[int]) -> int | None:
        """Return a slot for a beginning that is not known yet."""
        key = tuple(beginning)
        if key in self.slots:
            return None
        slot = self.free.pop() if self.free else self.slots.popitem(last=False)[1]
        self.slots[key] = slot
        return slot


class Steps:
    """`delta_rule_step` of rounds, layer by layer; on a GPU replayed from CUDA graphs."""

    def __init__(self, model: Model, pages):
        self.xp, self.pages, self.on_gpu = model.xp, pages, model.xp is not np
        self.graphs: list = [None] * LAYERS
        if self.on_gpu:
            self.stream = model.xp.cuda.Stream(non_blocking=True)
            self.workspace, self.kept = Workspace(), [self.buffers(model) for _ in range(LAYERS)]

    def buffers(self, model: Model) -> dict:
        """Make what a graph reads and writes, for the largest round."""
        T, dtype = ACTIVE * MOST, model.embedding.dtype
        shapes = dict(q=(H, K), k=(H, K), v=(HV, V), beta=(HV,), g=(HV,), out=(HV, V))
        kept = {name: self.xp.zeros((1, T, *shape), dtype) for name, shape in shapes.items()}
        for name, size in (
            ("state_indices", ACTIVE),
            ("cu_seqlens", ACTIVE + 1),
            ("accepted", ACTIVE),
        ):
            kept[name] = self.xp.zeros(size, np.int64)
        return kept

    def step(self, layer: int, inputs: tuple, where: dict):
        """Advance the states of a layer, and return the outputs of all tokens."""
        state = dict(state=self.pages[:, layer], qk_l2norm=True)
        if not self.on_gpu:
            return delta_rule_step(*inputs, **where, **state)
        kept, T = self.kept[layer], inputs[0].shape[1]
        for name, x in zip(("q", "k", "v", "beta", "g"), inputs, strict=True):
            kept[name][:, :T] = x
        for name, x in where.items():
            # Rows without a request: no slot, no token.
            kept[name][...] = x[-1] if name == "cu_seqlens" else -1 if "indices" in name else 0
            kept[name][: len(x)] = x
        current = self.xp.cuda.get_current_stream()
        self.stream.wait_event(current.record())
        with self.stream:
            if self.graphs[layer] is None:
                self.graphs[layer] = self.capture(kept | state)
            self.graphs[layer].launch()
        current.wait_event(self.stream.record())
        return kept["out"][:, :T]

    def capture(self, arguments: dict):
        """Record a step as a graph; what it is made of stays where it is."""
        with self.workspace:
            nobody = dict(accepted=self.xp.zeros(ACTIVE, np.int64))
            delta_rule_step(**arguments | nobody)  # compiles, and writes no state
            self.stream.begin_capture()
            delta_rule_step(**arguments)
            return self.stream.end_capture()


class Engine:
    """Serves requests, a round after the other."""

    def __init__(self, model: Model, requests: list[Request]):
        self.model, self.xp = model, model.xp
        slots = ACTIVE + CACHED
        self.pages = model.xp.full((slots, LAYERS, *STATE), np.nan, np.float32)
        self.cache = PrefixCache(list(range(ACTIVE, slots)))
        self.free = list(range(ACTIVE))
        self.coming, self.reading, self.running = deque(requests), [], []
        self.steps = Steps(model, self.pages)
        # In every round: slot, request or beginning, and what happened there.
        self.rounds: list[list[tuple[int, int | tuple, str]]] = []
        self.tokens = dict(prefill=0, step=0)

    def serve(self) -> None:
        """Serve all requests to their end."""
        while self.coming or self.reading or self.running:
            self.rounds.append([])
            while self.free and self.coming and self.coming[0].arrival < len(self.rounds):
                request = self.coming.popleft()
                request.slot = self.free.pop()
                self.reading.append(request)
            stepping = list(self.running)
            if self.reading:
                self.prefill()
            if stepping:
                self.decode(stepping)
            self.rounds[-1] += [(s, key, "kept") for key, s in self.cache.slots.items()]
            for request in [x for x in self.running if x.finished]:
                self.running.remove(request)
                self.pages[request.slot] = np.nan
                self.free.append(request.slot)

    def note(self, request: Request, what: str) -> None:
        self.rounds[-1].append((request.slot, request.number, what))

    def prefill(self) -> None:
        """Read some tokens of prompts, and keep the states after their beginnings."""
        parts, sources, budget = [], [], PREFILL
        for request in self.reading:
            if budget == 0:
                break
            start, source = request.read, request.slot
            if start == 0:
                start, source = self.cache.longest(request.prompt)
            rest = len(request.prompt) - start
            # Whole runs of checkpoints: what follows then has the bits that it would have at once.
            count = rest if rest <= budget else budget // CHECKPOINT * CHECKPOINT
            if count == 0:
                break
            request.taken_up += start - request.read
            parts.append((request, start, start + count))
            sources.append(source)
            budget -= count
        ends = np.cumsum([0] + [end - start for _, start, end in parts])
        tokens = np.concatenate([r.prompt[start:end] for r, start, end in parts])
        logits, checkpoints = self.model.prefill(
            self.xp.asarray(tokens),
            self.pages,
            CHECKPOINT,
            cu_seqlens=ends,
            state_indices=np.array(sources),
            output_state_indices=np.array([r.slot for r, _, _ in parts]),
        )
        self.tokens["prefill"] += len(tokens)
        for (request, start, end), first, after in zip(parts, ends, ends[1:], strict=False):
            self.note(request, "prefill")
            for i in range((end - start) // CHECKPOINT):
                slot = self.cache.place(request.prompt[: start + (i + 1) * CHECKPOINT])
                if slot is not None:
                    self.pages[slot] = checkpoints[first // CHECKPOINT + i]
            request.read = end
            if end == len(request.prompt):
                self.reading.remove(request)
                self.running.append(request)
                request.say(self.host(logits[after - 1]))

    def decode(self, requests: list[Request]) -> None:
        """Take up what was accepted in the round before, and look at drafts."""
        drafts = [request.drafts() for request in requests]
        rows = [r.pending + more for r, more in zip(requests, drafts, strict=True)]
        ends = np.cumsum([0] + [len(row) for row in rows])
        where = dict(
            cu_seqlens=ends,
            state_indices=np.array([r.slot for r in requests]),
            accepted=np.array([len(r.pending) for r in requests]),
        )
        if self.steps.on_gpu:
            where = {name: self.xp.asarray(x) for name, x in where.items()}
        logits = self.host(
            self.model.logits(
                self.xp.asarray(np.concatenate(rows)),
                lambda layer, *inputs: self.steps.step(layer, inputs, where),
            )
        )
        self.tokens["step"] += int(ends[-1])
        for request, more, first in zip(requests, drafts, ends, strict=False):
            self.note(request, "step")
            at = first + len(request.pending) - 1
            request.pending = []
            request.proposed += len(more)
            for i, draft in enumerate([*more, None]):
                if request.say(logits[at + i]) != draft:
                    break
                request.accepted += 1

    def host(self, x) -> np.ndarray:
        return x if self.xp is np else x.get()


def deviation(model: Model, request: Request) -> float:
    """Return how far logits lie from those of the request alone, and tokens from the likeliest."""
    tokens = request.prompt + request.said[:-1]
    alone = model.alone(tokens)[len(request.prompt) - 1 :]
    worst = float(np.abs(np.array(request.logits) - alone).max() / np.abs(alone).max())
    chosen = alone[np.arange(len(request.said)), request.said]
    short = float((alone.max(axis=1) - chosen).max() / np.abs(alone).max())
    return np.inf if np.isnan(worst) else max(worst, short)


def draw(path: str, engine: Engine) -> None:
    """Draw who had which slot when."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    colours, shades = plt.get_cmap("tab20").colors[:14], dict(prefill=0.45, step=1.0, kept=0.5)
    named = set()
    for i, events in enumerate(engine.rounds):
        for slot, owner, what in events:
            colour = colours[owner % 14] if isinstance(owner, int) else "0.6"
            box = dict(facecolor=colour, alpha=shades[what], linewidth=0)
            axes.broken_barh([(i, 1)], (slot - 0.4, 0.8), **box)
            if (slot, owner) not in named:
                named.add((slot, owner))
                name = owner if isinstance(owner, int) else f"|{len(owner)}"
                axes.text(i + 0.15, slot, name, fontsize=7, va="center")
    axes.set(xlabel="round", ylabel="slot", xlim=(0, len(engine.rounds)))
    axes.set(yticks=range(ACTIVE + CACHED), ylim=(-0.6, ACTIVE + CACHED - 0.4))
    axes.set_title(
        "slots of the pool: requests by number, pale while their prompts are read;"
        " grey, beginnings that are kept, by length"
    )
    save_figure(figure, path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, None)
    parser.add_argument("--requests", type=positive, default=40, help="default: 40")
    options = parser.parse_args(argv)
    found = surroundings(options.device, options.output)
    if found is None:
        return 2
    xp, drawn = found
    requests = stream(options.requests)
    engine = Engine(Model.random(xp, np.float32), requests)
    start = time.perf_counter()
    engine.serve()
    seconds = time.perf_counter() - start
    said = sum(len(r.said) for r in requests)
    proposed = max(1, sum(r.proposed for r in requests))
    prompts = sum(len(r.prompt) for r in requests)
    print(f"requests          {len(requests)} in {len(engine.rounds)} rounds, {seconds:.2f} s")
    print(f"tokens read       {engine.tokens['prefill']}, of prompts with {prompts}:")
    print(f"                  {sum(r.taken_up for r in requests)} were taken up from beginnings")
    print(f"tokens said       {said}, {said / seconds:.0f} per second")
    print(f"drafts accepted   {sum(r.accepted for r in requests)} of {proposed}")
    exact = Model.random(np, np.float64)
    worst = max(deviation(exact, request) for request in requests)
    print(f"beside each alone {worst:.1e} of the largest logit")
    if drawn:
        draw(options.output, engine)
        print(f"picture           {options.output}")
    if not worst < TOLERANCE:
        print("a request was not served as it is alone", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
