"""A plugin of pytest that keeps what emulated kernels leave in memory; see compare_revisions.py.

It imports nothing of a checkout by itself, so that it can be used in any.
"""

import hashlib
import json
import os
from pathlib import Path

RECORD = "CUPY_DELTA_RECORD_BITS"
digests: dict[str, str] = {}


def pytest_runtest_setup(item):
    """Add the arrays of every launch of a test, as they are after it, to the test's digest."""
    from emulator import EmulatorDevice

    total = hashlib.sha256()
    launch_alone = vars(EmulatorDevice).get("launch_alone", EmulatorDevice.launch)

    def launch(device, launch, arrays):
        launch_alone(device, launch, arrays)
        for name in [name for _, name in launch.pointers] + [box.name for _, box in launch.boxes]:
            x = arrays[name]
            total.update(b"none" if x is None else repr(x.shape).encode() + x.tobytes())
        digests[item.nodeid] = total.hexdigest()

    EmulatorDevice.launch_alone = launch_alone
    EmulatorDevice.launch = launch


def pytest_sessionfinish(session):
    Path(os.environ[RECORD]).write_text(json.dumps(digests))
