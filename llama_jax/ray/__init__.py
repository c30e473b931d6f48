"""Files of requests on Ray Data, and replicas of the server on Ray Serve: the extra `ray`."""

from llama_jax.ray.driver import Pool, Progress, run_batch
from llama_jax.ray.serving import serve_app
from llama_jax.ray.worker import Worker

__all__ = ["Pool", "Progress", "Worker", "run_batch", "serve_app"]
