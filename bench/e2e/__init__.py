"""Training end to end: `python -m bench.e2e --help`."""
