"""What docs/guide.md shows of PyTorch on the CPU."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def test_bfloat16_goes_to_numpy_and_back():
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (x for x in blocks if "torch.int16" in x)
    names = dict(torch=torch, np=np, ml_dtypes=ml_dtypes)
    exec(block, names)
    tensor, array = names["tensor"], names["array"]
    assert array.dtype == ml_dtypes.bfloat16
    assert np.array_equal(array.astype(np.float32), tensor.float().numpy())
    array[0, 0, 0, 0] = 3  # the same memory
    assert float(tensor[0, 0, 0, 0]) == 3
