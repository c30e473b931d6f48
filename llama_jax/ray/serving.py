"""Serving: the server's application in replicas of Ray Serve."""

import asyncio
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.decode.compile_cache import use_compile_cache
from llama_jax.errors import InputError
from llama_jax.llama import Llama
from llama_jax.ray import cores as share
from llama_jax.ray.gpus import check_gpus
from llama_jax.server.app import app_of
from llama_jax.server.service import Service
from llama_jax.server.settings import Settings

NAME = "llama_jax"
"""Of the deployment, for the configuration of `serve run`."""

_STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_WATCH_S = 0.05
_FLUSH_S = 5
"""For answers that were broken off to reach their clients."""

_LOGGER = logging.getLogger("llama_jax.ray")


class Replica:
    """A model and its application; Ray Serve makes one for each replica.

    It is ready once its programs are compiled, and unhealthy once its engine has stopped. When it
    is to end, requests in flight go on until Ray Serve's deadline.

    Args:
        load: arguments of `Llama.load`.
        settings: of `Settings`, without `local_only`; the token is by default the process's own
            $LLAMA_JAX_API_TOKEN.
        insecure: without a token, answer to any name of the machine.
    """

    def __init__(
        self, load: Mapping[str, Any], settings: Mapping[str, Any], *, insecure: bool = False
    ):
        if warning := use_compile_cache():
            _LOGGER.warning(warning)
        token = settings.get("api_token", os.environ.get("LLAMA_JAX_API_TOKEN"))
        own = {"api_token": token, "local_only": token is None and not insecure}
        self._service = Service(Llama.load(**load), Settings(**{**settings, **own}))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application; Ray Serve calls it."""
        from ray import serve

        return ready_when_warm(self._service, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Tell Ray Serve whether to replace this replica.

        Raises:
            RuntimeError: the engine has stopped.
        """
        if self._service.failed:
            raise RuntimeError("the engine stopped; the log above says why")


def ready_when_warm(service: Service, name: str) -> ASGIApp:
    """Return the application of a service, which has started when the service is ready.

    Args:
        service: what answers.
        name: of the replica; responses have it as `x-replica-id`.
    """
    app = app_of(service)

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                while not (service.ready or service.failed):
                    await asyncio.sleep(_WATCH_S)
                if service.failed:
                    message = {"type": "lifespan.startup.failed", "message": "the engine stopped"}
            elif message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica-id"] = name
            await send(message)

        await app(scope, receive, send_named)

    return wrapped


def serve_app(
    checkpoint: str | None = None,
    *,
    replicas: int | Sequence[int] = 1,
    slots: int = 8,
    max_queue: int = 64,
    cores: int = 1,
    gpus: float = 0.0,
    sticky: bool = True,
    insecure: bool = False,
    load: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Return an application for `ray.serve.run`: the server's, in replicas.

    Without a token, in `api_token` or in a replica's $LLAMA_JAX_API_TOKEN, only requests to a name
    of their machine are answered, as with `run.py serve`.

    Args:
        checkpoint: see `Llama.load`; readable on every node.
        replicas: how many; two numbers, the fewest and the most: as the requests in flight and in
            the queue need, so many for each as it has slots.
        slots: of each replica.
        max_queue: requests that may wait in each replica, and at each of Ray Serve's proxies;
            further ones get status 503.
        cores: that each replica computes with.
        gpus: of each; the model is split over them.
        sticky: send requests with the same `x-session-id` to the same replica, which has their
            prompt in its prefix cache. $RAY_SERVE_SESSION_ID_HEADER_KEY names another header.
        insecure: without a token, answer to any name.
        load: further arguments of `Llama.load`.
        **settings: of `Settings`.

    Raises:
        InputError: a number or a setting is out of range, or Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'llama_jax[ray]'") from None
    _check(replicas, cores, gpus)
    chosen = Settings(**settings)  # a mistake shows here, not in a replica
    model = {"path": checkpoint, "slots": slots, "max_queue": max_queue}
    model |= {"devices": max(1, math.floor(gpus))} | dict(load or {})
    options: dict[str, Any] = {
        "name": NAME,
        "max_ongoing_requests": slots + max_queue,
        "max_queued_requests": max_queue,
        "graceful_shutdown_timeout_s": chosen.drain_s + _FLUSH_S,
        "ray_actor_options": {
            "num_cpus": cores,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": dict(share.environment(cores))},
        },
        **_scaling(replicas, slots),
    }
    if sticky:
        options["request_router_config"] = {"request_router_class": _STICKY}
    replica = serve.deployment(**options)(serve.ingress()(Replica))
    return replica.bind(model, dict(settings), insecure=insecure)


def build(args: dict[str, Any]) -> Any:
    """Return `serve_app` for the `args` of a configuration file of Ray Serve's."""
    return serve_app(**args)


def _check(replicas: int | Sequence[int], cores: int, gpus: float) -> None:
    bounds = [replicas, replicas] if isinstance(replicas, int) else list(replicas)
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
        raise InputError(f"replicas is {replicas!r:.40}, expected one number from 1, or two")
    if type(cores) is not int or cores < 1:
        raise InputError(f"cores is {cores!r:.40}, expected a whole number from 1")
    check_gpus("gpus", gpus)


def _scaling(replicas: int | Sequence[int], slots: int) -> dict[str, Any]:
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    fewest, most = replicas
    # Ray Serve counts requests in flight and those that wait, here and in its proxies.
    scaling = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": slots}
    return {"autoscaling_config": scaling}
