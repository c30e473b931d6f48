"""What XLA makes of the decode program: its operations, copies and memory. Nothing runs."""

import collections
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.choices.setting import Setting
from benchmarks.choices.trial import Trial
from llama_jax.decode import state as decode_state
from llama_jax.decode import steps as decode
from llama_jax.decode.plan import choose_plan
from llama_jax.nn import attention
from llama_jax.nn.transformer import Transformer, param_shapes

COUNTED = ("copy", "convert", "fusion", "custom-call", "dot", "while", "conditional")
"""Operations of interest; a product may be a custom call, a fusion or a dot."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\]")


def hlo(setting: Setting) -> Iterator[Trial]:
    """Count the operations of the decode program at batch 1; a summary goes to a file."""
    for dtype in setting.dtypes:
        plan = choose_plan(setting.config, dtype)
        yield Trial(
            {"dtype": dtype},
            f"decode({plan.decode_steps}, {2 * attention.BLOCK})",
            functools.partial(_summarise, setting, dtype),
        )


def _summarise(setting: Setting, dtype: str) -> dict[str, int]:
    """Compile the program of the shortest contexts, without weights; write and return counts."""
    config, plan = setting.config, choose_plan(setting.config, dtype)
    slots = 2 * attention.BLOCK
    sizes = (config, 1, min(config.max_seq_len, 8 * slots), plan.cache)
    state = jax.eval_shape(lambda: decode_state.init_state(*sizes))
    step = functools.partial(
        decode.decode,
        Transformer(config, jnp.dtype(plan.weights), plan.kernels),
        num_steps=plan.decode_steps,
        attend_len=slots,
    )
    program = (
        jax.jit(step, donate_argnums=1).lower(param_shapes(config, plan.weights), state).compile()
    )
    memory: Any = program.memory_analysis()
    counts, moves = count_operations(program.as_text() or "")
    amounts = {name: counts[name] for name in COUNTED} | {
        f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes", 0)
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    lines = [f"{setting.shape} {dtype}: {plan}", f"cache of {sizes[2]} slots, {slots} read"]
    lines += [f"{name}: {value:,}" for name, value in amounts.items()]
    lines += ["", "all operations outside fusions:"]
    lines += [f"{count:6} {name}" for name, count in counts.most_common()]
    lines += ["", "the largest copies and conversions outside fusions:"]
    lines += [f"{size / 1e6:10.3f} MB  {count:4} x {what}" for size, what, count in moves]
    path = setting.folder / f"compiled-{setting.name}-{dtype}.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return amounts


def count_operations(text: str) -> tuple[collections.Counter[str], list[tuple[int, str, int]]]:
    """Count the operations of a compiled module that run by themselves.

    Args:
        text: the module's HLO. What is inside a fusion is no operation of its own.

    Returns:
        Counts by name; and (bytes, text, count) of the 20 largest kinds of copy and conversion.
    """
    inside = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    counts: collections.Counter[str] = collections.Counter()
    moves: collections.Counter[tuple[int, str]] = collections.Counter()
    computation = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            computation = found[1]
        found = _OPERATION.match(line)
        if not found or computation in inside:
            continue
        shape, name = found.groups()
        counts[name] += 1
        if name.startswith(("copy", "convert")):
            moves[_bytes(shape), f"{name} {shape}"] += 1
    largest = sorted(moves, reverse=True)[:20]
    return counts, [(size, what, moves[size, what]) for size, what in largest]


def _bytes(shape: str) -> int:
    """Return the bytes of the arrays of a shape like `f32[2,3]{1,0}`; pred counts as nothing."""
    return sum(
        int(bits) // 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in _ARRAY.findall(shape)
    )
