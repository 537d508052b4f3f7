"""PyTorch is no dependency, not even of the tests: what needs it is collected where it is."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") else ["test_torch_*.py"]
