"""What only a GPU shows of pools: captured prefills, and the engine of the examples."""

import ml_dtypes
import numpy as np
import pytest
from helpers import make_inputs

import cupy_delta as cd

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16"])
def test_a_captured_prefill_follows_what_lies_in_its_arrays(cupy, dtype, pool_dtype):
    """Lengths, slots and the mask are read by kernels: a graph is replayed with others."""
    T, sizes = 700, dict(H=2, G=2, K=64, V=64, dtype=dtype, gate="scalar")
    args, _ = make_inputs(T, **sizes)
    args = [cupy.asarray(x, None if i < 3 else np.float32) for i, x in enumerate(args)]
    rng = np.random.default_rng(0)
    pool_dtype = np.dtype(getattr(ml_dtypes, pool_dtype, pool_dtype))
    pages = cupy.asarray(rng.standard_normal((9, 3, 4, 64, 64)).astype(pool_dtype))
    where = dict(
        cu_seqlens=cupy.asarray([0, 300, 300, T]),
        state_indices=cupy.asarray([2, 3, 4]),
        output_state_indices=cupy.asarray([2, 3, 4]),
        fresh=cupy.asarray([True, False, False]),
    )
    out = cupy.empty_like(args[2])
    stream, workspace = cupy.cuda.Stream(non_blocking=True), cd.Workspace()
    options = dict(qk_l2norm=True, checkpoint_every=64)
    cupy.cuda.Device().synchronize()
    with stream, workspace:
        spare = pages.copy()
        cd.chunk_delta_rule(*args, **where, **options, out=out, state=spare[:, 1])
        stream.synchronize()
        stream.begin_capture()
        result = cd.chunk_delta_rule(*args, **where, **options, out=out, state=spare[:, 1])
        graph = stream.end_capture()
    others = ([0, 1, 699, T], [7, 2, -1], [0, 5, -3], [False, True, False])
    for values in ([x.tolist() for x in where.values()], others):
        for array, value in zip(where.values(), values, strict=True):
            array[...] = cupy.asarray(value)
        spare[...] = pages
        out.fill(float("nan"))
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        wanted = pages.copy()
        again = cd.chunk_delta_rule(*args, **where, **options, state=wanted[:, 1])
        for x, y in ((out, again.o), (result.checkpoints, again.checkpoints), (spare, wanted)):
            assert bool((x.view(np.uint8) == y.view(np.uint8)).all())
        changed = {s for s in range(9) if not bool((wanted[s, 1] == pages[s, 1]).all())}
        assert changed == {
            s for s, n in zip(values[2], np.diff(values[0]), strict=True) if s >= 0 and n
        }
        assert bool((wanted[:, ::2] == pages[:, ::2]).all())


def test_the_engine_on_a_gpu(cupy, capsys):
    import serving

    assert serving.main(["--device", "gpu"]) == 0
    assert "beside each alone" in capsys.readouterr().out
