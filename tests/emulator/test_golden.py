"""The emulator's primitives against what an NVIDIA GPU gave, kept in tests/golden/primitives.npz.

On a machine with a GPU, `python tests/emulator/test_golden.py` writes the file anew.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.fast

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "primitives.npz"
SOURCE = HERE / "kernels" / "primitives.cu"
SHARED = 896
OUTPUTS = {
    "products": ((2, 4, 32), np.float32),
    "words": ((2, 12, 32), np.uint32),
    "tf32_products": ((4, 32), np.float32),
    "conversions": ((24, 32), np.uint32),
    "copied": ((32,), np.float32),
}


def inputs():
    """Random matrices, and numbers with ties, subnormals of 16 bits, infinities and NaN."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((16, 16))
    elements = matrix.astype(ml_dtypes.bfloat16).view(np.uint16)
    halves = matrix.astype(np.float16).view(np.uint16)
    numbers, factors = rng.standard_normal((2, 6, 32)).astype(np.float32)
    numbers[0, :8] = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519]
    numbers[5, :8] = [65520, 1e30, -np.inf, np.inf, 6e-8, 2.9e-8, 3.1e-5, -6.1e-5]
    numbers[5, 8:12] = [1 + 2**-11, 1 + 2**-10 + 2**-11, np.nan, 2**-25]
    return elements, halves, numbers, factors


def from_emulator(**how):
    from emulator import Kernel, copy_in, empty

    outputs = {name: empty(shape, dtype, name) for name, (shape, dtype) in OUTPUTS.items()}
    arguments = [copy_in(x) for x in inputs()]
    Kernel(SOURCE, "primitives", **how).launch(1, 32, SHARED, [*arguments, *outputs.values()])
    return outputs


def from_gpu():
    import cupy

    kernels = HERE.parent.parent / "kernels"
    module = cupy.RawModule(
        code=SOURCE.read_text(), options=("--std=c++17", f"-I{kernels}"), backend="nvrtc"
    )
    outputs = {name: cupy.zeros(shape, dtype) for name, (shape, dtype) in OUTPUTS.items()}
    arguments = (*map(cupy.asarray, inputs()), *outputs.values())
    module.get_function("primitives")((1,), (32,), arguments, shared_mem=SHARED)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return {n: x.get() for n, x in outputs.items()} | {"gpu": np.array(name)}


def nearest_tf32(x, away):
    """TF32 of a float as bits: 10 binary digits, of two nearest ones the even, or further, one."""
    bits = x.view(np.uint32)
    half = np.uint32(0x1000) if away else 0xFFF + (bits >> 13 & 1)
    return np.where(np.isfinite(x), (bits + half) & ~np.uint32(0x1FFF), bits).astype(np.uint32)


# Where each conversion to TF32 is: of two nearest ones it takes another on 9.0.
TF32 = slice(2, None, 4)
LEGS = [
    dict(leg="source"),
    dict(leg="source", sm=90),
    *(dict(leg="ptx", sm=sm) for sm in (80, 90, 120)),
]


@pytest.fixture(scope="module", params=LEGS, ids=lambda how: "-".join(map(str, how.values())))
def both(request):
    with np.load(GOLDEN) as file:
        golden = {name: file[name] for name in file.files}
    rounded = [nearest_tf32(inputs()[2], away) for away in (False, True)]
    assert any(np.array_equal(golden["conversions"][TF32], x) for x in rounded)
    golden["conversions"][TF32] = rounded[request.param.get("sm", 80) != 90]
    return from_emulator(**request.param), golden


@pytest.mark.parametrize("name", ["words", "conversions", "copied"])
def test_data_movement_and_conversions_are_equal_to_the_bit(both, name):
    emulated, golden = both
    x, y = (np.ascontiguousarray(results[name]).view(np.uint32) for results in both)
    assert np.array_equal(x, y), np.argwhere(x != y)
    assert emulated[name].any() and golden[name].any()


@pytest.mark.parametrize("name", ["products", "tf32_products"])
def test_products_agree_up_to_the_order_of_sums(both, name):
    emulated, golden = both
    x, y = emulated[name], golden[name]
    assert np.abs(y).max() > 1
    assert np.allclose(x, y, rtol=3e-6, atol=3e-6)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez(GOLDEN, **from_gpu())
    print(f"wrote {GOLDEN}")
