"""Measure the figures of docs/design.md on this machine: `python -m tools.design_figures`."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config import ModelConfig
from llama_jax.decode import sampling
from llama_jax.decode import state as decode_state
from llama_jax.decode import steps as decode
from llama_jax.decode.executor import Executor
from llama_jax.decode.needs import Needs
from llama_jax.decode.plan import choose_plan
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.nn import attention
from llama_jax.nn.transformer import Transformer, param_shapes
from llama_jax.weights.checkpoint import load_checkpoint


def median_ms(call: Callable[[], Any], repeats: int = 9) -> float:
    """Return the median time of a warm call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def weight_layout() -> None:
    """Compare [in, out] with [out, in] for one 4096 x 11008 product."""
    for dtype, rows in ((jnp.float32, 1), (jnp.bfloat16, 2)):
        x = jnp.ones((rows, 4096), dtype)
        speeds = []
        for shape, axis in (((4096, 11008), 0), ((11008, 4096), 1)):
            dims = (((1,), (axis,)), ((), ()))
            weight = jnp.ones(shape, dtype)
            product = jax.jit(
                functools.partial(
                    lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32
                )
            )
            ms = median_ms(functools.partial(product, x, weight))
            speeds.append(weight.nbytes / ms / 1e6)
        print(
            f"{dtype.__name__}, {rows} rows: [in, out] {speeds[0]:.0f}, [out, in] "
            f"{speeds[1]:.0f} GB/s"
        )


def one_product(q, k, v, positions):
    """Attend with one product and one softmax over all slots: the form that lost."""
    scores = jnp.einsum("btnh,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
    visible = jnp.arange(k.shape[2])[None, None, :] <= positions[:, :, None]
    scores = jnp.where(visible[:, None], scores, -1e30)
    return jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores, axis=-1), v)


def attention_speed() -> None:
    """Time the loop over blocks and one product over 4,096 slots of 32 heads."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, 32, 4096, 128)), jnp.float32) for _ in range(2))
    loop, plain = jax.jit(attention.in_blocks, static_argnames="attend_len"), jax.jit(one_product)
    for length in (1, 256):
        q = jnp.asarray(rng.normal(size=(1, length, 32, 128)), jnp.float32)
        positions = (4096 - length + jnp.arange(length, dtype=jnp.int32))[None]
        ours = median_ms(functools.partial(loop, q, k, v, positions, attend_len=4096))
        theirs = median_ms(functools.partial(plain, q, k, v, positions))
        print(f"{length} queries on 4,096 slots: loop {ours:.0f} ms, one product {theirs:.0f} ms")


def attention_bits() -> None:
    """Count the shapes whose bits change with the bucket, 256 to 4,096 slots, in either form."""
    rng = np.random.default_rng(0)
    loop, plain = jax.jit(attention.in_blocks, static_argnames="attend_len"), jax.jit(one_product)
    shapes = list(itertools.product((4, 8, 32), (32, 64, 128), (1, 16, 64, 256)))
    changed = np.zeros(2, int)
    for heads, width, length in shapes:
        q = jnp.asarray(rng.normal(size=(1, length, heads, width)), jnp.float32)
        cache = (jnp.asarray(rng.normal(size=(1, heads, 4096, width))) for _ in range(2))
        k, v = (a.astype(jnp.float32) for a in cache)
        positions = (256 - length + jnp.arange(length, dtype=jnp.int32))[None]
        buckets = (256, 512, 1024, 2048, 4096)
        looped = [np.asarray(loop(q, k, v, positions, attend_len=n)) for n in buckets]
        once = [np.asarray(plain(q, k[:, :, :n], v[:, :, :n], positions)) for n in buckets]
        changed += [any((x != xs[0]).any() for x in xs) for xs in (looped, once)]
    print(
        f"bits change with the bucket: loop {changed[0]}, one product {changed[1]} of "
        f"{len(shapes)} shapes"
    )


def scan_lengths() -> None:
    """Decode 192 tokens of the demo model in scans of several lengths."""
    demo = load_checkpoint(DEMO_CHECKPOINT)
    for steps in (1, 4, 8, 16, 32):
        plan = choose_plan(demo.config, demo.dtype)._replace(decode_steps=steps)
        run = Executor(demo.config, demo.params, demo.dtype, context=512, plan=plan)

        def generate(run: Executor = run, steps: int = steps) -> None:
            params, prompt = sampling.make_params(1, 0.6), [1] * 10
            new = decode_state.make_admission(params, prompt, run.config.vocab_size, limit=500)
            state = run.admit(run.init_state(), 0, new)
            state, first = run.prefill(state, 0, prompt, needs=Needs(noise=True))
            np.asarray(first.tokens)
            for step in range(0, 192, steps):
                state, outputs, _ = run.decode(state, [0], 10 + step, Needs(noise=True))
                np.asarray(outputs.tokens)

        print(f"scans of {steps}: {192e3 / median_ms(generate):,.0f} tokens/s, prefill included")


def sampling_cost() -> None:
    """Draw from 32,000 logits with and without top-p."""
    vocab_size = 32_000
    logits = jax.random.normal(jax.random.key(0), (1, vocab_size))
    shape = 1, vocab_size
    none = jnp.zeros(shape), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
    draw = jax.jit(sampling.sample, static_argnames="filters")
    for name, top_p in (("no filter", None), ("top-p", 0.9)):
        params = jax.tree.map(jnp.asarray, sampling.make_params(1, 0.6, top_p=top_p))
        args = (logits, params, jnp.zeros(1, jnp.int32), *none)
        call = functools.partial(draw, *args, filters=top_p is not None)
        print(f"sampling, {name}: {median_ms(call):.1f} ms")


def compile_7b() -> None:
    """Compile 7B's decode without its weights: seconds, and bytes of temporaries."""
    config = ModelConfig(32000, 4096, 11008, 32, 32, 32, 1e-5, 1e4, 4096)
    for dtype in ("float32", "float16"):
        params = param_shapes(config, dtype)
        state = jax.eval_shape(lambda dtype=dtype: decode_state.init_state(config, 1, 4096, dtype))
        step = functools.partial(
            decode.decode,
            Transformer(config, jnp.dtype(dtype)),
            needs=Needs(),
            num_steps=8,
            attend_len=256,
        )
        began = time.perf_counter()
        program = jax.jit(step, donate_argnums=1).lower(params, state).compile()
        memory: Any = program.memory_analysis()
        temporaries = memory.temp_size_in_bytes / 1e9
        print(
            f"7B {dtype}: compiled in {time.perf_counter() - began:.1f} s, temporaries "
            f"{temporaries:.2f} GB"
        )


if __name__ == "__main__":
    weight_layout()
    attention_speed()
    attention_bits()
    scan_lengths()
    sampling_cost()
    compile_7b()
