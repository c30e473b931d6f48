"""Run Llama 2 from a checkout: `python run.py --help`. The code is in llama_jax/cli."""

from llama_jax.cli.main import entry

if __name__ == "__main__":
    entry()
