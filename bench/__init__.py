"""Benchmarks: `python -m bench` runs the suites, other files are studies of their own."""
