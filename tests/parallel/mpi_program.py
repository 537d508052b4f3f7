"""Run by tests/parallel/test_mpi.py on several ranks of MPI: cut problems against whole ones.

By tests/gpu/test_mpi.py with the word cupy: the ranks have CuPy arrays, and device after it for an
MPI that takes these as they are.
"""

import sys

import numpy as np
from mpi4py import MPI
from shares import on_one_rank, on_rank, problem, worst

from cupy_delta import parallel
from cupy_delta.parallel import transfers


def cases(size: int, gates=(None, "scalar", "channel"), **options):
    """Random cuts of ragged and of full batches; with and without a scan."""
    rng = np.random.default_rng(size)
    for seed in range(6):
        tokens = [int(n) for n in rng.integers(0, 30, size)]
        options |= dict(H=2, G=2, initial=seed % 2 == 0, gate=gates[seed % len(gates)])
        options = {"K": 5, "V": 3} | options
        options |= dict(B=1, cu_seqlens=None)
        if seed < 4:
            inner = np.sort(rng.integers(0, sum(tokens) + 1, 3))
            options["cu_seqlens"] = [0, *map(int, inner), sum(tokens)]
        else:
            options["B"] = 2
        yield tokens, problem(tokens, seed=seed, **options), seed % 2


def on_host(x):
    """Results with NumPy arrays in place of CuPy's; what stays on its rank is left out."""
    if isinstance(x, tuple):
        parts = [on_host(y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x.get() if hasattr(x, "get") else x


def main() -> None:
    world, words = MPI.COMM_WORLD, sys.argv[1:]
    communicator = parallel.MPICommunicator(world, 60, device_buffers="device" in words)
    array, options = np.asarray, {}
    if "cupy" in words:
        import cupy

        cupy.cuda.Device(world.rank % cupy.cuda.runtime.getDeviceCount()).use()
        array = cupy.asarray
        options = dict(gates=(None, "scalar"), dtype=np.float32, K=16, V=24)
    deviations = []
    for tokens, whole, scans in cases(world.size, **options):
        transfers.GATHERED = 1 if scans else 16
        own = on_rank(communicator, tokens, *whole, array=array, states_on="all")
        shares = world.gather(on_host(own))
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
