"""The open choices of `python -m benchmarks.sweep`: each function lists the ways to be timed."""
