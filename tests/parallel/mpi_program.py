"""Run by tests/parallel/test_mpi.py on several ranks of MPI: cut problems against whole ones."""

import sys

import numpy as np
from mpi4py import MPI
from shares import on_one_rank, on_rank, problem, worst

from cupy_delta import parallel
from cupy_delta.parallel import transfers


def cases(size: int):
    """Random cuts of ragged and of full batches; with and without a scan."""
    rng = np.random.default_rng(size)
    for seed in range(6):
        tokens = [int(n) for n in rng.integers(0, 30, size)]
        options = dict(H=2, G=2, K=5, V=3, initial=seed % 2 == 0)
        options["gate"] = (None, "scalar", "channel")[seed % 3]
        if seed < 4:
            inner = np.sort(rng.integers(0, sum(tokens) + 1, 3))
            options["cu_seqlens"] = [0, *map(int, inner), sum(tokens)]
        else:
            options["B"] = 2
        yield tokens, problem(tokens, seed=seed, **options), seed % 2


def main() -> None:
    world = MPI.COMM_WORLD
    communicator = parallel.MPICommunicator(world, timeout=60)
    deviations = []
    for tokens, whole, scans in cases(world.size):
        transfers.GATHERED = 1 if scans else 16
        shares = world.gather(on_rank(communicator, tokens, *whole, states_on="all"))
        if world.rank == 0:
            # Residuals of MPI stay on their rank; the rest is arrays.
            deviations.append(worst(shares, on_one_rank(*whole)))
    try:
        dtype = np.float32 if world.rank else np.float64
        x, beta = np.ones((1, 1, 1, 1), dtype), np.ones((1, 1, 1), dtype)
        parallel.chunk_delta_rule(communicator, x, x, x, beta)
        said = "no error"
    except TypeError as error:
        said = f"TypeError: {error}"
    errors = world.gather(said)
    if world.rank == 0:
        print(max(deviations), *errors, sep="\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
