"""Benchmarks: `python -m benchmarks --list`."""
