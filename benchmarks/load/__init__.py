"""Load for a server, and what it does to it: `python -m benchmarks.serve`."""
