"""How weights are held and multiplied by: each projection's form, and several in one product."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.choices.setting import Setting
from benchmarks.choices.trial import Trial, time_call
from benchmarks.model_cost import ITEM_BYTES, Cost
from benchmarks.weights import filled
from llama_jax.config import ModelConfig
from llama_jax.decode.plan import choose_plan
from llama_jax.nn import ops
from llama_jax.nn import projection as projections

Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def in_out(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply x [rows, in] by a weight [in, out]; returns float32, as the project's kernels."""
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return lax.dot(
        x.astype(weight.dtype), weight, precision=precision, preferred_element_type=jnp.float32
    )


def multiply_reduce(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply x [1, in] by a weight [out, in] with no product: a sum that XLA fuses."""
    return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=1)[None]


def weights_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the weights that a token is multiplied by, as [out, in], fused as in `fused`."""
    c = config
    return {
        "qkv": ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.dim),
        "o": (c.dim, c.num_heads * c.head_dim),
        "gate_up": (2 * c.ffn_dim, c.dim),
        "down": (c.dim, c.ffn_dim),
        "lm_head": (c.vocab_size, c.dim),
    }


def projection(setting: Setting) -> Iterator[Trial]:
    """Time each weight's product with rows, in each form that the backend can run."""
    for rows in setting.size.rows:
        for name, (outputs, inputs) in weights_of(setting.config).items():
            for dtype in setting.dtypes:
                moved = outputs * inputs * ITEM_BYTES[dtype] + 4 * rows * (outputs + inputs)
                for form, multiply in _forms(setting, rows).items():
                    shape = (inputs, outputs) if form == "[in, out]" else (outputs, inputs)
                    yield Trial(
                        {"weight": name, "rows": rows, "dtype": dtype},
                        form,
                        functools.partial(_time_product, setting, multiply, shape, rows, dtype),
                        Cost(2 * rows * outputs * inputs, moved),
                        dtype,
                    )


def _forms(setting: Setting, rows: int) -> dict[str, Multiply]:
    kernels = {"plain": projections.plain, "[in, out]": in_out}
    if rows == 1:
        kernels["multiply-reduce"] = multiply_reduce
    if setting.on_cpu:
        kernels["blocked"] = projections.blocked
        if rows == 1:  # of more rows it is `plain`
            kernels["two_rows"] = projections.two_rows
        if kernels.has_kernels():
            kernels["native"] = lambda x, weight: kernels.linears(x, weight)[0]
    return kernels


def _time_product(
    setting: Setting, multiply: Multiply, shape: tuple[int, int], rows: int, dtype: str
) -> float:
    """Return the seconds of one product; several copies of the weight take turns."""
    copies = math.ceil(setting.size.spread / (math.prod(shape) * ITEM_BYTES[dtype]))
    copies = max(2, min(copies, 32))
    if setting.on_cpu and rows > 8:
        copies = 2  # bound by the cores, and slow
    inputs = shape[0] if multiply is in_out else shape[1]
    xs = [filled((rows, inputs), jnp.float32) for _ in range(copies)]
    weights = [filled(shape, jnp.dtype(dtype)) for _ in range(copies)]

    @jax.jit
    def multiply_all(xs: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
        ys: list[jax.Array] = []
        for x, weight in zip(xs, weights, strict=True):
            if ys and setting.on_cpu:
                x = x + 1e-30 * ys[-1][:, :1]  # else a CPU would run several at once
            ys.append(multiply(x, weight))
        return ys

    return time_call(lambda: multiply_all(xs, weights), setting.size.seconds, parts=copies)


def fused(setting: Setting) -> Iterator[Trial]:
    """Time a layer's products: q, k, v and gate, up apart, in one call, or joined at load."""
    c = setting.config
    sizes = weights_of(c)
    del sizes["lm_head"]
    weights = sum(map(math.prod, sizes.values()))
    for rows in [rows for rows in setting.size.rows if rows in (1, max(setting.size.rows))]:
        for dtype in setting.dtypes:
            for way in ("one by one", "several in a call", "joined"):
                yield Trial(
                    {"rows": rows, "dtype": dtype},
                    way,
                    functools.partial(_time_layers, setting, way, rows, dtype),
                    Cost(2 * rows * weights, weights * ITEM_BYTES[dtype]),
                    dtype,
                )


def _time_layers(setting: Setting, way: str, rows: int, dtype: str) -> float:
    """Return the seconds of one layer's norms and products, in a program of several layers."""
    c, sizes = setting.config, weights_of(setting.config)
    plan = choose_plan(c, dtype)
    multiply = projections.IMPLEMENTATIONS[plan.kernels.projection]

    def split(
        x: jax.Array, weights: list[jax.Array], widths: tuple[int, ...]
    ) -> Sequence[jax.Array]:
        if way == "joined":
            ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            return jnp.split(multiply(x, *weights)[0], ends, axis=1)
        if way == "several in a call":
            return multiply(x, *weights)
        return [multiply(x, weight)[0] for weight in weights]

    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    apart = {
        "qkv": [(queries, c.dim), (keys, c.dim), (keys, c.dim)],
        "gate_up": [(c.ffn_dim, c.dim)] * 2,
    }
    layer = {
        name: [sizes[name]] if way == "joined" else apart.get(name, [sizes[name]])
        for name in ("qkv", "o", "gate_up", "down")
    }
    layers = [
        {
            name: [filled(shape, jnp.dtype(plan.weights)) for shape in shapes]
            for name, shapes in layer.items()
        }
        for _ in range(min(setting.size.layers, c.num_layers))
    ]
    norm = filled((c.dim,), jnp.float32)
    x = filled((rows, c.dim), jnp.float32)

    def normed(x: jax.Array) -> jax.Array:
        return ops.rms_norm(x[None], norm, c.norm_eps)[0]

    @jax.jit
    def run(x: jax.Array, layers: list[dict[str, list[jax.Array]]]) -> Any:
        kept = []
        for weights in layers:
            qkv = split(normed(x), weights["qkv"], (queries, keys, keys))
            kept += qkv[1:]  # as a cache does
            x = x + multiply(qkv[0], weights["o"][0])[0]
            gate, up = split(normed(x), weights["gate_up"], (c.ffn_dim,) * 2)
            x = x + multiply(jax.nn.silu(gate) * up, weights["down"][0])[0]
        return x, kept

    return time_call(lambda: run(x, layers), setting.size.seconds, parts=len(layers))
