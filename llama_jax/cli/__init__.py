"""The command line: `llama-jax`, and `python run.py` from a checkout."""
