"""fla's context parallelism, as `scaling.py` times ours: one process for each GPU.

python benchmarks/scaling_peer.py --seconds 60    (with fla-core and torch installed)
python benchmarks/scaling_peer.py --only cut --lengths 131072    one row, compiled once
python benchmarks/scaling_peer.py --gpus 1 --only alone --lengths 65536    a share, not its exchange

Its gated delta rule with g = 0, since the rule without a gate has no context parallelism there.
Each GPU has consecutive tokens of one sequence. "One GPU" is the same operator without it. Times
are in milliseconds, from a common start to the last rank's end, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time

HEADS, VALUE_HEADS, SIZE = 16, 32, 128
LENGTHS = (131072, 32768, 524288)
PASSES = ("forward", "forward and backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="by default all")
    parser.add_argument(
        "--only",
        choices=("alone", "cut"),
        help="one GPU with so many tokens (no share of as many can take less), or all of them",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no row begins")
    args = parser.parse_args()
    import torch

    size = args.gpus or torch.cuda.device_count()
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_IB_DISABLE", "1")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    end = time.time() + args.seconds
    torch.multiprocessing.spawn(work, (size, tuple(args.lengths), end, args.only), size)
    return 0


def work(rank: int, size: int, lengths: tuple[int, ...], end: float, only: str | None) -> None:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device(rank))
    session = Session(rank, size)
    for T in lengths:
        for what in PASSES:
            row = session.row(what, T, only, end)
            if rank > 0:
                continue
            # As soon as it is measured: the next one may compile for minutes.
            if what in session.failed:
                print(f"fla {what}, T {T}: {session.failed[what]}", flush=True)
            else:
                rounded = {k: round(x, 3) if isinstance(x, float) else x for k, x in row.items()}
                print(json.dumps(rounded), flush=True)
        if session.over(end):
            break
    dist.destroy_process_group()


class Session:
    """One rank's timings."""

    def __init__(self, rank: int, size: int):
        import torch
        import torch.distributed as dist
        from fla.ops.cp import build_cp_context
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        self.torch, self.dist, self.rank, self.size = torch, dist, rank, size
        self.rule, self.context = chunk_gated_delta_rule, build_cp_context
        self.failed: dict[str, str] = {}  # what this version refuses, and why

    def row(self, what: str, T: int, only: str | None, end: float) -> dict:
        """One pass with T tokens: on one GPU, on all, and with T for each if there is time."""
        row: dict = {"fla": what, "T": T}
        if only != "cut":
            row["one GPU"] = self.alone(what, T)
        if only != "alone":
            row[f"{self.size} GPUs"] = self.cut(what, T)
        if only is None:
            row["times as fast"] = row["one GPU"] / row[f"{self.size} GPUs"]
            if not self.over(end):
                row["T for each"] = self.cut(what, T * self.size)
                row["efficiency"] = row["one GPU"] / row["T for each"]
        return row

    def alone(self, what: str, T: int) -> float:
        """Time one GPU; the others tune their kernels meanwhile, for minutes, and then wait."""
        return self.one_pass(what, T, {}, only_first=True)

    def cut(self, what: str, T: int) -> float:
        ends = self.torch.tensor([0, T], dtype=self.torch.long)
        context = self.context(ends.to("cuda"), self.dist.group.WORLD, cu_seqlens_cpu=ends)
        return self.one_pass(what, T // self.size, {"cp_context": context})

    def one_pass(self, what: str, T: int, options: dict, only_first: bool = False) -> float:
        q, k, v, do, g, beta = self.arrays(T)

        def forward():
            with self.torch.no_grad():
                self.rule(q, k, v, g, beta, **options)

        def both():
            o, _ = self.rule(q, k, v, g, beta, **options)
            self.torch.autograd.grad(o, (q, k, v, beta), do)

        once = forward if what == "forward" else both
        return self.time(what, once, only_first and self.rank > 0)

    def arrays(self, T: int):
        torch = self.torch
        generator = torch.Generator("cuda").manual_seed(2)

        def normal(heads: int):
            return torch.randn(
                *(1, T, heads, SIZE), generator=generator, device="cuda", dtype=torch.bfloat16
            )

        q, k = (torch.nn.functional.normalize(normal(HEADS), dim=-1) for _ in "qk")
        v, do = normal(VALUE_HEADS), normal(VALUE_HEADS)
        beta = torch.rand(1, T, VALUE_HEADS, generator=generator, device="cuda")
        for x in (q, k, v, beta):
            x.requires_grad_()
        return q, k, v, do, torch.zeros_like(beta), beta

    def time(self, what: str, once, idle: bool, repeats: int = 7) -> float:
        """Return the median over repeats of the slowest rank's milliseconds; NaN if any fails.

        An idle rank does not take part in the repeats.
        """
        works = True
        try:
            for _ in range(2):
                once()
                self.torch.cuda.synchronize()
        except (RuntimeError, ImportError) as error:
            works, self.failed[what] = False, str(error).splitlines()[0]
        if not self.agreed(works):
            self.failed.setdefault(what, "another rank failed")
            return math.nan
        spent = []
        for _ in range(repeats):
            self.dist.barrier()
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            if not idle:
                once()
            self.torch.cuda.synchronize()
            spent.append(1e3 * (time.perf_counter() - start))
        every = self.torch.tensor(spent, device="cuda")
        self.dist.all_reduce(every, self.dist.ReduceOp.MAX)
        return statistics.median(every.tolist())

    def agreed(self, works: bool) -> bool:
        """Whether it works on every rank."""
        every = self.torch.tensor([float(works)], device="cuda")
        self.dist.all_reduce(every, self.dist.ReduceOp.MIN)
        return bool(every.item())

    def over(self, end: float) -> bool:
        """Whether the time is over, as rank 0 says."""
        said = self.torch.tensor([float(time.time() > end)], device="cuda")
        self.dist.broadcast(said, 0)
        return bool(said.item())


if __name__ == "__main__":
    sys.exit(main())
