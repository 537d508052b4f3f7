"""CPU benchmark: the chunked delta rule beside its peers and its floor, in one process.

Contestants, in turn on the same arrays, each repeat one after the other:

- ``cupy_delta``: `chunk_delta_rule`; for the gradients `chunk_delta_rule_fwd` and `_bwd`.
- ``torch``: the chunked delta rule for CPUs in Hugging Face transformers (Qwen3-Next), if it and
  PyTorch are importable; gate 0, gradients by autograd.
- ``products``: only the matrix products of the chunkwise form in the same shapes, NumPy matmul
  over heads in as many threads. No solve, no copies, nothing written: a floor.

The error of each is against the float64 operator, on the first 1024 tokens.

    python benchmarks/cpu.py -o benchmarks/results/DATE-cpu.json
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np

import cupy_delta
from cupy_delta.commands.console import print_table
from cupy_delta.commands.output import write_json
from cupy_delta.reference.parallel import for_each, thread_count

CHUNK = 64


def inputs(T: int, H: int, D: int):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, T, H, D), np.float32) for _ in range(3))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, rng.uniform(0, 1, (1, T, H)).astype(np.float32)


class CupyDelta:
    name = "cupy_delta"

    def __init__(self, arrays):
        self.arrays = arrays

    def forward(self):
        return cupy_delta.chunk_delta_rule(*self.arrays, chunk_size=CHUNK).o

    def both(self):
        forward = cupy_delta.chunk_delta_rule_fwd(*self.arrays, chunk_size=CHUNK)
        return cupy_delta.chunk_delta_rule_bwd(forward.residuals, forward.o).q


class Torch:
    name = "torch"

    def __init__(self, arrays):
        import torch
        from transformers.models.qwen3_next import modeling_qwen3_next as peer

        torch.set_num_threads(thread_count())
        self.torch, self.rule = torch, peer.torch_chunk_gated_delta_rule
        self.tensors = [torch.from_numpy(x) for x in arrays]
        self.g = torch.zeros_like(self.tensors[3])

    def _call(self, q, k, v, beta):
        return self.rule(q, k, v, g=self.g, beta=beta, chunk_size=CHUNK)[0]

    def forward(self):
        with self.torch.no_grad():
            return self._call(*self.tensors).numpy()

    def both(self):
        tensors = [x.clone().requires_grad_() for x in self.tensors]
        o = self._call(*tensors)
        o.backward(o.detach())
        return tensors[0].grad.numpy()


class Products:
    name = "products"

    def __init__(self, arrays):
        _, T, H, D = arrays[0].shape
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((4, CHUNK, D), np.float32)
        state = rng.standard_normal((4, D, D), np.float32)
        pairs = rng.standard_normal((4, CHUNK, CHUNK), np.float32)
        turned = np.ascontiguousarray(rows.swapaxes(1, 2))
        # Forward: K S, Q S, K^T N; K K^T, Q K^T; P N. Backward: 7 and 9 of these kinds.
        state_products = [(rows, state), (rows, state), (turned, rows)]
        self.forward_list = [*state_products, (rows, turned), (rows, turned), (pairs, rows)]
        backward = [*state_products * 2, state_products[0], *[(rows, turned)] * 4]
        self.both_list = [*self.forward_list, *backward, *[(pairs, rows)] * 5]
        self.calls = T // CHUNK * H // 4

    def _run(self, products):
        def one(part: int) -> None:
            for _ in range(part):
                for a, b in products:
                    a @ b

        threads = thread_count()
        for_each(one, [(self.calls // threads,)] * threads)

    def forward(self):
        self._run(self.forward_list)

    def both(self):
        self._run(self.both_list)


def contestants(arrays) -> list:
    found = [CupyDelta(arrays)]
    try:
        found.append(Torch(arrays))
    except ImportError as error:
        print(f"without torch: {error}", file=sys.stderr)
    return [*found, Products(arrays)]


def error_of(contestant_class, arrays, passes: str) -> float | None:
    """Relative error in the Frobenius norm against float64, on at most 1024 tokens."""
    if contestant_class is Products:
        return None
    short = [np.ascontiguousarray(x[:, :1024]) for x in arrays]
    wide = CupyDelta([x.astype(np.float64) for x in short])
    exact = getattr(wide, passes)()
    result = getattr(contestant_class(short), passes)()
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-T", "--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("-H", "--heads", type=int, default=16)
    parser.add_argument("-D", "--head-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", help="JSON file")
    args = parser.parse_args()
    rows = []
    for T in args.tokens:
        arrays = inputs(T, args.heads, args.head_size)
        field = contestants(arrays)
        for passes in ("forward", "both"):
            seconds = {c.name: [] for c in field}
            for repeat in range(args.repeats + 1):
                for c in field:
                    start = time.perf_counter()
                    getattr(c, passes)()
                    if repeat:
                        seconds[c.name].append(time.perf_counter() - start)
            row = {"pass": "forward" if passes == "forward" else "forward+backward", "T": T}
            row["ms"] = {n: statistics.median(s) * 1e3 for n, s in seconds.items()}
            row["spread"] = {
                n: (max(s) - min(s)) / statistics.median(s) for n, s in seconds.items()
            }
            row["error"] = {c.name: error_of(type(c), arrays, passes) for c in field}
            rows.append(row)
            print(f"T = {T}, {row['pass']}: done", file=sys.stderr, flush=True)
    report(args, rows)
    return 0


def report(args, rows: list[dict]) -> None:
    names = list(rows[0]["ms"])
    header = ["pass", "T", *(f"{n} ms" for n in names), "peer / ours", "ours / products"]
    header += [f"{n} error" for n in names if n != "products"]
    table = []
    for row in rows:
        ms = row["ms"]
        peer = f"{ms['torch'] / ms['cupy_delta']:.2f}" if "torch" in ms else "-"
        floor = f"{ms['cupy_delta'] / ms['products']:.2f}"
        errors = [f"{row['error'][n]:.1e}" for n in names if n != "products"]
        table.append(
            [row["pass"], row["T"], *(f"{ms[n]:.1f}" for n in names), peer, floor, *errors]
        )
    print(f"H = {args.heads}, K = V = {args.head_size}, float32, {thread_count()} threads")
    print_table(header, table)
    if args.output:
        packages = ("numpy", "scipy", "torch", "transformers")
        machine = dict(processor=platform.processor() or platform.machine(), threads=thread_count())
        result = dict(
            versions={n: package(n) for n in packages} | {"cupy_delta": cupy_delta.__version__},
            machine=machine,
            heads=args.heads,
            head_size=args.head_size,
            repeats=args.repeats,
            rows=rows,
        )
        write_json(args.output, result)


if __name__ == "__main__":
    sys.exit(main())
