"""Benchmarks of the unit: ``pytest benchmarks/ --benchmark-only``, and ``python -m
benchmarks.{bars,sweep,options}``."""
