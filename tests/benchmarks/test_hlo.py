"""Traffic read off a compiled program, against programs whose traffic is known."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.hlo import Exchange, Module

SIZE = 4096


def loop_of(step, *args):
    """Compile a loop of 16 turns that carries the first argument, which is donated."""

    def run(carry, *rest):
        return lax.fori_loop(0, 16, lambda i, carry: step(i, carry, *rest), carry)

    return Module(jax.jit(run, donate_argnums=0).lower(*args).compile().as_text())


def test_an_update_in_place_moves_the_update_and_a_copy_moves_all():
    array = jnp.zeros((SIZE, SIZE))

    def write(i, carry):
        return lax.dynamic_update_slice(carry, jnp.full((1, SIZE), 1.0), (i, jnp.int32(0)))

    module = loop_of(write, array)
    assert module.traffic(module.loop()) < 10 * 4 * SIZE
    assert module.large_results(module.loop(), SIZE * SIZE) == []
    module = loop_of(lambda i, carry: write(i, carry).T, array)
    shapes = [shape for _, shape in module.large_results(module.loop(), SIZE * SIZE)]
    assert set(shapes) == {(SIZE, SIZE)}
    assert 2 <= module.traffic(module.loop()) / (4 * SIZE * SIZE) / len(shapes) < 2.01


def test_a_product_reads_its_weight_and_a_look_up_one_row():
    weight, x = jnp.ones((SIZE, SIZE)), jnp.ones((1, SIZE))
    module = loop_of(lambda _, x, weight: jnp.tanh(x @ weight), x, weight)
    assert 1 <= module.traffic(module.loop()) / (4 * SIZE * SIZE) < 1.01
    module = loop_of(lambda i, x, weight: x + weight[i][None], x, weight)
    assert module.traffic(module.loop()) < 10 * 4 * SIZE


def test_a_question_to_the_device_is_counted():
    def step(i, x):
        return lax.cond(x[0, 0] > i, jnp.sin, jnp.cos, x)

    module = loop_of(step, jnp.ones((8, SIZE)))
    assert module.conditionals(module.loop()) == 1
    module = loop_of(lambda i, x: x + i, jnp.ones((8, SIZE)))
    assert module.conditionals(module.loop()) == 0


def test_a_program_without_a_loop_is_refused():
    module = Module(jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text())
    with pytest.raises(ValueError, match="no loop"):
        module.loop()


def test_what_a_tpu_fetches_counts_once():
    """A quarter of a weight to the vector memory, a row of it read there, and the result written.

    The text has what only a TPU's programs have: layouts with tiles and memories, asynchronous
    copies and slices, and a fusion that only renames.
    """
    tiled = "{1,0:T(8,128)(2,1)}"
    fast = "{1,0:T(8,128)(2,1)S(1)}"
    module = Module(
        textwrap.dedent(f"""\
        HloModule jit_decode, is_scheduled=true

        %renaming (p.1: bf16[4096,4096]) -> bf16[4096,4096] {{
          %p.1 = bf16[4096,4096]{tiled} parameter(0)
          ROOT %bitcast.1 = bf16[4096,4096]{tiled} bitcast(%p.1)
        }}

        %product (p.2: bf16[4096,4096], p.3: bf16[8,4096]) -> f32[8,4096] {{
          %p.2 = bf16[4096,4096]{tiled} parameter(0)
          %p.3 = bf16[8,4096]{fast} parameter(1)
          %renamed = bf16[4096,4096]{tiled} fusion(%p.2), kind=kLoop, calls=%renaming
          ROOT %dot = f32[8,4096]{tiled} convolution(%p.3, %renamed), dim_labels=bf_oi->bf
        }}

        ENTRY %main (w: bf16[4096,4096], v: bf16[4096,4096], x: bf16[8,4096]) -> f32[8,4096] {{
          %w = bf16[4096,4096]{tiled} parameter(0)
          %v = bf16[4096,4096]{tiled} parameter(1)
          %x = bf16[8,4096]{tiled} parameter(2)
          %slice-start = ((bf16[4096,4096]{tiled}), bf16[1024,4096]{fast}, s32[]{{:S(2)}}) \
slice-start(%w), slice={{[0:1024], [0:4096]}}
          %slice-done = bf16[1024,4096]{fast} slice-done(%slice-start)
          %copy-start = (bf16[8,4096]{fast}, bf16[8,4096]{tiled}, u32[]{{:S(2)}}) copy-start(%x)
          %copy-done = bf16[8,4096]{fast} copy-done(%copy-start)
          %half = bf16[1024,4096]{fast} negate(%slice-done)
          ROOT %out = f32[8,4096]{tiled} fusion(%v, %copy-done), kind=kOutput, calls=%product
        }}
        """)
    )
    expected = 2 * 1024 * 4096 + 2 * 8 * 4096 + 2 * 4096 * 4096 + 4 * 8 * 4096
    assert module.traffic(module.entry) == expected


def test_what_devices_exchange_is_counted_by_operation():
    """Four turns of a loop with an all-gather; then one in two halves, and a sum.

    Of eight devices each gets seven parts of what is gathered.
    """
    module = Module(
        textwrap.dedent("""\
        HloModule jit_decode, is_scheduled=true

        %add (a: f32[], b: f32[]) -> f32[] {
          %a = f32[] parameter(0)
          %b = f32[] parameter(1)
          ROOT %sum = f32[] add(%a, %b)
        }

        %turn (p.1: (s32[], bf16[1,64])) -> (s32[], bf16[1,64]) {
          %p.1 = (s32[], bf16[1,64]{1,0}) parameter(0)
          %i = s32[] get-tuple-element(%p.1), index=0
          %part = bf16[1,64]{1,0} get-tuple-element(%p.1), index=1
          %all = bf16[1,512]{1,0} all-gather(%part), dimensions={1}
          %cut = bf16[1,64]{1,0} slice(%all), slice={[0:1], [64:128]}
          ROOT %next = (s32[], bf16[1,64]{1,0}) tuple(%i, %cut)
        }

        %goes_on (p.2: (s32[], bf16[1,64])) -> pred[] {
          %p.2 = (s32[], bf16[1,64]{1,0}) parameter(0)
          %j = s32[] get-tuple-element(%p.2), index=0
          %turns = s32[] constant(4)
          ROOT %less = pred[] compare(%j, %turns), direction=LT
        }

        ENTRY %main (x: (s32[], bf16[1,64]), y: f32[1,64]) -> f32[1,512] {
          %x = (s32[], bf16[1,64]{1,0}) parameter(0)
          %y = f32[1,64]{1,0} parameter(1)
          %loop = (s32[], bf16[1,64]{1,0}) while(%x), condition=%goes_on, body=%turn
          %ags = (f32[1,64]{1,0}, f32[1,512]{1,0}) all-gather-start(%y), dimensions={1}
          %agd = f32[1,512]{1,0} all-gather-done(%ags)
          ROOT %reduced = f32[1,512]{1,0} all-reduce(%agd), to_apply=%add
        }
        """)
    )
    gathers = Exchange(5, 4 * 7 * 64 * 2 + 7 * 64 * 4)
    assert module.collectives(module.entry) == {
        "all-gather": gathers,
        "all-reduce": Exchange(1, 512 * 4),
    }
    assert module.collectives(module.loop()) == {"all-gather": Exchange(1, 7 * 64 * 2)}
    loop, start = 4 * (2 * 64 + 2 * 512 + 2 * 64 + 2 * 64), 4 * 64 + 4 * 512
    assert module.traffic(module.entry) == loop + start + 2 * 4 * 512
