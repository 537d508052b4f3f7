"""A process comes to its end, whatever it has started and not waited for."""

import subprocess
import sys
import textwrap

import pytest

# A gradient by way of calls that are still to come when the program is through.
PROGRAM = """
    import sys
    import jax, numpy as np
    from cupy_delta.jax import chunk_delta_rule, host

    run = host.run

    def counted(*args):
        run(*args)
        print("done", flush=True)
        if sys.argv[1] == "fails":
            raise ValueError("nobody asks")

    host.run = counted
    k = np.random.default_rng(0).standard_normal((1, 1000, 4, 32), np.float32)

    @jax.jit
    def loss(k):
        return chunk_delta_rule(k, k, k, k[..., 0], qk_l2norm=True).o.sum()

    def start():
        return [jax.grad(loss)(k) for _ in range(5)]

    if sys.argv[1] == "dropped":
        start()
    else:
        results = start()
"""


@pytest.mark.parametrize("results", ["kept", "fails", "dropped"])
def test_what_is_not_waited_for_does_not_keep_the_process(results):
    argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), results]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    # What has an array is computed to its end, with all that it does.
    calls = result.stdout.split().count("done")
    assert calls == {"kept": 10, "fails": 5}.get(results, calls)
