"""A stand-in of CuPy, for what carries arrays: memory by address, no device."""

from types import SimpleNamespace

import numpy as np


class Array(np.ndarray):
    """An array of the stand-in: its memory is known by its address."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class Event:
    done = True

    def __init__(self, disable_timing):
        pass

    def record(self):
        pass


class NcclError(RuntimeError):
    pass


def stand_in():
    """Return modules that the adapter takes for CuPy's."""

    def device(function):
        return lambda *arguments: np.array(function(*arguments)).view(Array)

    nccl = SimpleNamespace(
        NCCL_UINT8=1, NcclError=NcclError, groupStart=lambda: None, groupEnd=lambda: None
    )
    stream = SimpleNamespace(ptr=0, synchronize=lambda: None)
    cuda = SimpleNamespace(nccl=nccl, Event=Event, get_current_stream=lambda: stream)
    return {
        "cupy": SimpleNamespace(
            ndarray=Array,
            cuda=cuda,
            asarray=device(np.asarray),
            ascontiguousarray=device(np.ascontiguousarray),
            empty=device(np.empty),
            asnumpy=lambda x: np.array(x).view(np.ndarray),
        ),
        "cupy.cuda": cuda,
        "cupy.cuda.nccl": nccl,
    }
