"""Compile the programs for GPUs or TPUs that are not there, and say what they would move.

  python -m benchmarks.aot --target=v5e:2x2 --shape=7b --dtype=bfloat16
  python -m benchmarks.aot --target=h100 --shape=7b --dtype=float16 --batch=8
  python -m benchmarks.aot --target=v6e:2x4 --devices=8 --shape=70b --batch=8

Nothing is run: memory is the compiler's sum, traffic is read off the optimised program, and the
time is what the chip's data sheet says of both. All is of each device. See benchmarks/README.md.
"""

import dataclasses
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from tqdm import tqdm

from benchmarks import command
from benchmarks.cases import WEIGHTS
from benchmarks.hlo import Exchange, Module
from benchmarks.model_cost import Cost, chunk_cost, decode_cost
from benchmarks.report import problems, table
from benchmarks.shapes import SHAPES, load_shape
from benchmarks.topologies import TARGETS, find_target
from llama_jax.config import ModelConfig
from llama_jax.decode.chips import Chip
from llama_jax.decode.compiled import lower
from llama_jax.decode.model_programs import Decode, Prefill
from llama_jax.decode.needs import Needs
from llama_jax.decode.plan import DETERMINISM, Plan, accelerator_plan
from llama_jax.decode.program import Program, Target
from llama_jax.decode.replicas import specs
from llama_jax.decode.state import init_state
from llama_jax.errors import InputError
from llama_jax.jax_settings import pinned_settings
from llama_jax.nn.sharding import choose_shards, make_mesh, place, replicas_of, shards_of
from llama_jax.nn.transformer import Transformer, param_shapes

FLAGS = command.make_flags(
    "7b",
    target=("v5e", f"{', '.join(TARGETS)}; a TPU's topology may follow, as in v5e:2x2."),
    devices=(1, "Devices that the model is split over."),
    dtype=("bfloat16", "Of weights and cache."),
    weights=("full", "full, or int8: projections are."),
    batch=(["1", "8"], "Slots."),
    context=(4096, "Positions of each slot's cache, all attended to."),
    layers=(1000, "Layers at most; bytes and compile time grow with them."),
    prefill=(256, "Tokens of a prompt's chunk."),
    programs=(["decode", "prefill"], "What is compiled."),
    determinism=("strict", f"{' or '.join(DETERMINISM)}; see run.py --help."),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled for a chip, and what its compiler and its text say.

    Of several devices, what is said is of each.
    """

    program: str
    batch: int
    compile_s: float
    argument_bytes: int
    aliased_bytes: int
    """Of the arguments, those that are updated in place."""
    temp_bytes: int
    traffic: int
    """Bytes read and written by one decode step, or by one chunk."""
    cost: Cost
    """The least that any program would do."""
    conditionals: int
    """Times that one step asks the device what to do next."""
    collectives: dict[str, Exchange]
    """What one decode step, or one chunk, exchanges with other devices, by operation."""
    collectives_outside: int
    """Those that a decode program runs once, outside its steps."""
    large_results: list[tuple[str, tuple[int, ...]]]
    """The arrays with as many numbers as the smallest weight matrix that one step writes, and their
    instructions. Updates in place are left out."""

    @property
    def of_ideal(self) -> float:
        """Traffic as a multiple of the least."""
        return self.traffic / self.cost.bytes

    def row(self, chip: Chip) -> dict[str, Any]:
        """Return the columns of a table; GB are 10^9 bytes."""
        seconds = Cost(self.cost.flops, self.traffic).limit_seconds(chip.bandwidth, chip.flops)
        exchanged = {}
        if self.collectives:
            counts = [f"{each.count} {kind}" for kind, each in self.collectives.items()]
            received = sum(each.received for each in self.collectives.values())
            exchanged = {"collectives": ", ".join(counts), "received MB": received / 1e6}
            if chip.interconnect is not None:
                exchanged["exchange ms"] = 1e3 * received / chip.interconnect
        return {
            "program": self.program,
            "batch": self.batch,
            "compile s": self.compile_s,
            "arguments GB": self.argument_bytes / 1e9,
            "in place GB": self.aliased_bytes / 1e9,
            "temp GB": self.temp_bytes / 1e9,
            "fits": "yes" if self.argument_bytes + self.temp_bytes <= chip.memory else "no",
            "traffic GB": self.traffic / 1e9,
            "of ideal": self.of_ideal,
            "computed ms": 1e3 * seconds,
            **exchanged,
        }


def compile_program(
    program: Program, config: ModelConfig, plan: Plan, batch: int, context: int, mesh: Mesh
) -> Compiled:
    """Compile a program for devices that need not be there.

    Args:
        program: `Prefill` or `Decode`.
        config: the model's shape.
        plan: how it is held and computed.
        batch: slots, of all replicas together.
        context: positions of each slot's cache.
        mesh: of such devices.
    """
    shards = shards_of(mesh)

    def shapes(tree: Any) -> Any:
        shapes = jax.eval_shape(lambda: tree)
        if mesh.size == 1:
            one = SingleDeviceSharding(mesh.devices.flat[0])
            places = jax.tree.map(lambda _: one, shapes)
        else:
            places = place(specs(shapes, config, mesh), mesh)
        return jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes, places
        )

    params = shapes(param_shapes(config, plan.weights))
    state = jax.eval_shape(lambda: init_state(config, batch, context, plan.cache))
    model = Transformer(config, jnp.dtype(plan.weights), plan.kernels, shards)
    target = Target(config, model, batch, context, plan.cache, mesh, varied_steps=plan.varied_steps)
    if isinstance(program, Decode):
        args = program.arguments(params, state, range(batch))
        slots_each = batch // replicas_of(mesh)
        sizes = {"batch": slots_each, "context": program.attend_len - 1, "new_tokens": 1}
        cost = decode_cost(config, plan.weights, **sizes, shards=shards)
    else:
        assert isinstance(program, Prefill)
        args = program.arguments(params, state)
        before = program.attend_len - program.size
        sizes = {"tokens": program.size, "before": before}
        cost = chunk_cost(config, plan.weights, **sizes, shards=shards)
    began = time.perf_counter()
    with pinned_settings():
        compiled = lower(program, target, *shapes(args)).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    module = Module(compiled.as_text() or "")
    part, turns = module.entry, 1
    if isinstance(program, Decode):
        part, turns = module.loop(), program.num_steps
    exchanged = module.collectives(part)
    in_all = sum(each.count for each in module.collectives(module.entry).values())
    weights = [
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(params)
        if leaf.ndim > 1
    ]
    return Compiled(
        program=str(program),
        batch=batch,
        compile_s=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        traffic=module.traffic(part),
        cost=cost,
        conditionals=module.conditionals(part),
        collectives=exchanged,
        collectives_outside=in_all - turns * sum(each.count for each in exchanged.values()),
        large_results=module.large_results(part, min(weights)),
    )


def run() -> int:
    """Compile what the flags say; return the exit status."""
    jax.config.update("jax_platforms", "cpu")  # no other is there, or is needed
    command.check_choices("--shape", [FLAGS.shape], SHAPES)
    command.check_dtypes([FLAGS.dtype])
    command.check_choices("--weights", [FLAGS.weights], WEIGHTS)
    command.check_choices("--determinism", [FLAGS.determinism], DETERMINISM)
    command.check_choices("--programs", FLAGS.programs, ("decode", "prefill"))
    config = load_shape(FLAGS.shape)
    config = dataclasses.replace(config, num_layers=min(config.num_layers, FLAGS.layers))
    if FLAGS.weights == "int8":
        config = dataclasses.replace(config, quantization="int8")
    command.check_room(config, FLAGS.context)
    batches = command.read_numbers(FLAGS, "batch")
    shards = choose_shards(config, FLAGS.devices)
    chip, devices = find_target(FLAGS.target, shards.devices)
    mesh = make_mesh(shards, devices)
    plan = accelerator_plan(chip.platform, FLAGS.dtype, FLAGS.determinism)
    if FLAGS.context % 256 or FLAGS.prefill > FLAGS.context:
        raise InputError(
            f"--context={FLAGS.context} --prefill={FLAGS.prefill}, expected a multiple of 256, and "
            "no more than that; change them"
        )
    path = command.output_path(FLAGS, "aot", FLAGS.target.replace(":", "-"), FLAGS.shape)
    record = command.start_record("benchmarks.aot", FLAGS.shape, None)
    record |= {"chip": dataclasses.asdict(chip), "devices": shards.devices}
    record |= {"layers": config.num_layers, "programs": [], "failures": []}
    jobs: list[tuple[int, Program]] = []
    for batch in batches:
        if "decode" in FLAGS.programs:
            jobs.append((batch, Decode(batch, plan.decode_steps, FLAGS.context, Needs())))
        if "prefill" in FLAGS.programs:
            jobs.append((batch, Prefill(FLAGS.prefill, FLAGS.context)))
    rows = []
    for batch, program in tqdm(jobs, desc="compiling", file=sys.stderr):
        try:
            compiled = compile_program(program, config, plan, batch, FLAGS.context, mesh)
        except jax.errors.JaxRuntimeError as error:  # it does not fit: the others may
            said = " ".join(str(error).split())[:300]
            record["failures"].append(f"{program}, batch {batch}: {said}")
            continue
        rows.append(compiled.row(chip))
        record["programs"].append(dataclasses.asdict(compiled))
    command.write_record(record, path, plot=False)
    where = f"{shards.devices} x {FLAGS.target}" if shards.devices > 1 else FLAGS.target
    print(f"{where}, {FLAGS.shape}, {config.num_layers} layers, {FLAGS.dtype}: computed")
    print(f"{table(rows)}\n{problems(record)}".rstrip())
    return 1 if record["failures"] else 0


if __name__ == "__main__":
    command.execute(run, FLAGS, sys.argv)
