"""What tests of communicators share."""

import sys

import pytest
from stand_in import stand_in


@pytest.fixture
def cupy(monkeypatch):
    modules = stand_in()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["cupy"]
