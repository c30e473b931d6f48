"""The HTTP server: the model card's routes as Workers AI serves them, and OpenAI's.

It is an extra (`pip install llama_jax[serve]`): nothing else of the package imports it.
"""
