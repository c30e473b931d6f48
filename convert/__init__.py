"""Conversion of Meta's and Hugging Face's Llama 2 weights into the project's checkpoints.

Run as `python -m convert`. `llama_jax` imports it on demand only: `Llama.load(convert=True)`.
"""
