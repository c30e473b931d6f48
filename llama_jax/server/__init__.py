"""The HTTP server: the routes of Workers AI and of OpenAI.

It needs the extra `serve` (`pip install llama_jax[serve]`). Nothing else in the package imports it.
"""
