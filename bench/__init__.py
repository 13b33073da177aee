"""Benchmarks: `python -m bench` says what there is."""
