"""This machine's limits, measured: how fast memory is read and matrices are multiplied.

    python -m benchmarks.limits

prints them as JSON. The benchmark runs that as a process of its own: on a GPU, JAX would otherwise
hold memory that the engines need.
"""

import dataclasses
import json
import statistics
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.model_cost import ITEM_BYTES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device can do at most."""

    backend: str
    """cpu, gpu or tpu."""
    device: str
    """Its name, as JAX knows it."""
    memory: int | None
    """Bytes that JAX may allocate on it; None: the machine's own memory."""
    bandwidth: float
    """Bytes/s read from memory: the best of several ways."""
    matmul: dict[str, float]
    """FLOP/s of a large matrix product, by dtype."""


def best_seconds(call: Callable[[], Any], *, calls: int) -> float:
    """Return the shortest time of a warm call, over 10 repeats of some calls in flight."""
    jax.block_until_ready(call())

    def run() -> None:
        jax.block_until_ready([call() for _ in range(calls)])

    return min(timeit.repeat(run, number=1, repeat=10)) / calls


def measure_bandwidth(on_cpu: bool) -> float:
    """Return bytes/s of reading."""
    # More than any cache holds. XLA shares out a sum and a product in different ways, and which of
    # them is faster depends on the machine.
    matrix = jnp.ones(((GIB // 4 if on_cpu else GIB) // 4096, 4096), jnp.float32)
    ways = [
        jax.jit(lambda m: m.sum()),
        jax.jit(lambda m: m @ m[0]),
        jax.jit(lambda m: (m * m[0]).sum(axis=1)),
    ]
    calls = 1 if on_cpu else 4
    return matrix.nbytes / min(
        best_seconds(lambda way=way: way(matrix), calls=calls) for way in ways
    )


def measure_matmul(dtype: str, size: int, calls: int) -> float:
    """Return FLOP/s of the product of two square matrices; float32 without TF32."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: lax.dot(x, y, precision=lax.Precision.HIGHEST))
    return 2 * size**3 / best_seconds(lambda: product(a, a), calls=calls)


def measure() -> Limits:
    """Measure JAX's default device, which takes some seconds."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    size, calls = (2048, 1) if on_cpu else (8192, 4)
    dtypes = [d for d in ITEM_BYTES if (d, device.platform) != ("float16", "tpu")]
    stats = None if on_cpu else device.memory_stats()
    return Limits(
        backend=device.platform,
        device=device.device_kind,
        memory=stats and stats["bytes_limit"],
        bandwidth=measure_bandwidth(on_cpu),
        matmul={dtype: measure_matmul(dtype, size, calls) for dtype in dtypes},
    )


def median(samples: list[Limits]) -> Limits:
    """Return the median of each figure: a shared machine is now faster, now slower."""
    return dataclasses.replace(
        samples[0],
        bandwidth=statistics.median(sample.bandwidth for sample in samples),
        matmul={
            dtype: statistics.median(sample.matmul[dtype] for sample in samples)
            for dtype in samples[0].matmul
        },
    )


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure())))
