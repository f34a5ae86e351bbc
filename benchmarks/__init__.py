"""Benchmarks of the unit: ``pytest benchmarks/ --benchmark-only``, and scripts that run by ``python -m
benchmarks.NAME``. The page ``docs/benchmarking.md`` describes them."""

import os

# torch.profiler reads this level when torch is imported. Without it the profiler prints its starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
