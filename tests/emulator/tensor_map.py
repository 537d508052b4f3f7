"""What the driver would encode for TMA, in a form that the emulator's runtime reads."""

import numpy as np

# As in runtime/bulk.cpp, innermost axis first.
TENSOR_MAP = np.dtype(
    [
        ("magic", "u8"),
        ("base", "u8"),
        ("pitches", "u8", 3),
        ("sizes", "i4", 4),
        ("box", "i4", 4),
        ("element", "i4"),
        ("unused", "u1", 52),
    ]
)


def tensor_map(x: np.ndarray, shape: tuple, box: tuple) -> np.void:
    """Encode what TMA copies: boxes of an array of 16-bit elements, seen with four axes.

    Parameters
    ----------
    x : ndarray
        In emulated memory, C-contiguous; it must outlive the launches.
    shape, box : tuple of 4 int
        Outermost axis first. A box is 16, 32 or 64 elements wide, which is how far its swizzle
        reaches, and 1 to 256 along the other axes.

    Returns
    -------
    void
        The 128 bytes of a kernel's argument ``const __grid_constant__ TensorMap``.
    """
    if not x.flags.c_contiguous or x.itemsize != 2 or x.size != np.prod(shape):
        raise ValueError(f"{x.dtype} array of shape {x.shape} is no contiguous one of {shape}")
    sizes = len(shape) == len(box) == 4 and all(1 <= n <= 256 for n in box)
    if not sizes or box[-1] not in (16, 32, 64):
        raise ValueError(f"a box of {box} in {shape}")
    if x.ctypes.data % 16 or shape[-1] % 8:
        raise ValueError("TMA needs rows at multiples of 16 bytes")
    pitches = np.cumprod(shape[:0:-1], dtype=np.uint64) * x.itemsize
    described = np.zeros((), TENSOR_MAP)
    described["magic"], described["base"] = 0x70616D726F736E74, x.ctypes.data
    described["pitches"], described["element"] = pitches, x.itemsize
    described["sizes"], described["box"] = shape[::-1], box[::-1]
    return described[()]
