"""What the tests of planted mistakes share."""

from __future__ import annotations

import re
import shutil

import nvrtc
import pytest
from emulator import EmulatorFault


def blamed_lines(source, name: str) -> set[int]:
    """Return the lines of a kernel that carry the comment "blame NAME"."""
    lines = source.read_text().splitlines()
    return {i for i, text in enumerate(lines, 1) if re.search(rf"// blame.*\b{name}\b", text)}


def check_located(launch, expected, source, name: str, lines_of=None, has_line=True) -> None:
    """Check that `launch` ends with a fault of this kind and words, at a blamed line."""
    kind, words = expected
    with pytest.raises(EmulatorFault) as caught:
        launch()
    text = str(caught.value)
    assert caught.value.kind == kind, text
    assert words in text
    named = {int(n) for n in re.findall(lines_of or rf"{re.escape(source.name)}:(\d+)", text)}
    assert named & blamed_lines(source, name) or not has_line, text


def check_kind(launch, *kinds: str) -> None:
    """Check that `launch` ends with a fault of one of these kinds."""
    with pytest.raises(EmulatorFault) as caught:
        launch()
    assert caught.value.kind in kinds, str(caught.value)


def plant_in_primitives(monkeypatch, folder, right: str, wrong: str) -> None:
    """Compile with `wrong` in place of `right` in hopper_device.cuh from here on."""
    shutil.copytree(nvrtc.KERNELS, folder / "kernels")
    device = folder / "kernels" / "primitives" / "hopper_device.cuh"
    text = device.read_text()
    assert right in text
    device.write_text(text.replace(right, wrong))
    monkeypatch.setattr(nvrtc, "KERNELS", folder / "kernels")
