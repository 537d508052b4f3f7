"""The guide's code for a GPU, block after block as a reader runs it."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def test_the_guide_runs():
    pytest.importorskip("torch")
    text = GUIDE.read_text()
    names: dict = {}
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        # Numbered as in the page, for the traceback.
        code = "\n" * text[: found.start(1)].count("\n") + found[1]
        exec(compile(code, str(GUIDE), "exec"), names)
