"""How fast is it, against this machine's limits and other programs: `python -m benchmarks`."""
