"""The parts of `benchmarks/compare.py`: rows, floors, contestants, timing, costs and the report."""
