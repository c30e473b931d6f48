"""--estimate: the memory that a model would take, without loading it."""

import pathlib

from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import checkpoint_path, parse_devices, parse_slots
from llama_jax.cli.refusals import refuse_flags
from llama_jax.cli.verbs import ESTIMATE, GENERAL, MODEL, Verb
from llama_jax.config import MAX_SLOTS, ModelConfig, check_sizes
from llama_jax.decode.chips import CHIPS
from llama_jax.decode.memory import available_memory, in_units, memory_fraction, needed_memory
from llama_jax.decode.plan import Plan, accelerator_plan, choose_plan
from llama_jax.errors import InputError
from llama_jax.jax_settings import default_device
from llama_jax.nn.sharding import (
    ONE_DEVICE,
    Shards,
    check_replicas,
    choose_shards,
    find_mesh,
    shards_of,
)
from llama_jax.weights.checkpoint import open_checkpoint
from llama_jax.weights.dtypes import choose_dtype


def estimate(verb: Verb) -> None:
    """Print the bytes of weights, caches and working memory, and whether a device has them."""
    others = [name for name in verb.takes if name not in (*MODEL, *ESTIMATE, *GENERAL)]
    without = ("eos_tokens", "verify", "convert")
    refuse_flags("--estimate", "which loads no model", *without, *others)
    name, config, stored = _read_config()
    usual = 8 if verb.name in ("batch", "serve") else 1
    slots, replicas = parse_slots(usual), FLAGS.replicas
    check_replicas(replicas)
    check_sizes(config, FLAGS.context, slots, replicas)
    context = config.max_seq_len if FLAGS.context is None else FLAGS.context
    shards = _find_shards(config)
    count = replicas * shards.devices
    plan, device, room = _find_device(config, stored, count)
    needed = needed_memory(config, plan, slots // replicas, context, shards)
    each = f"on each of {count} devices" if count > 1 else ""
    rows = [
        ("weights", needed.weights, f"{name}, {config.precision(plan.weights)}"),
        ("caches", needed.caches, f"{slots // replicas:,} slots of {context:,} tokens"),
        ("working", needed.working, "at most"),
        ("total", needed.total, each),
    ]
    if room is not None:
        most = most_slots(config, plan, context, room, shards)
        verdict = "fits" if needed.total <= room else "does not fit"
        about = f"{verdict}; {most or 'no'} slots of {context:,} tokens do"
        if FLAGS.chip is not None and memory_fraction(CHIPS[device].platform) < 1:
            about += f" ({memory_fraction('gpu'):.0%} of it; XLA_PYTHON_CLIENT_MEM_FRACTION)"
        rows.append((device, room, about))
    for what, size, about in rows:
        print(f"{what:<8} {in_units(size):>10}  {about}".rstrip())


def most_slots(
    config: ModelConfig, plan: Plan, context: int, room: int, shards: Shards = ONE_DEVICE
) -> int:
    """Return how many slots of a context fit into so many bytes a device; 0: not even one."""

    def fits(slots: int) -> bool:
        return needed_memory(config, plan, slots, context, shards).total <= room

    return max((slots for slots in range(1, MAX_SLOTS + 1) if fits(slots)), default=0)


def _read_config() -> tuple[str, ModelConfig, str]:
    """Return the name, shape and stored dtype of the model that the flags name."""
    if FLAGS.config is None:
        path = checkpoint_path()
        manifest, config = open_checkpoint(path)
        return path.name, config, manifest["dtype"]
    if FLAGS.checkpoint is not None:
        raise InputError("--config is given with --checkpoint, which has its own; drop one")
    path = pathlib.Path(FLAGS.config)
    return path.stem, ModelConfig.load(path), "float16"


def _find_shards(config: ModelConfig) -> Shards:
    """Return into how many parts the model would be split."""
    devices = parse_devices()
    if FLAGS.chip is None:
        return shards_of(find_mesh(config, devices, FLAGS.replicas))
    if type(devices) is not int:
        raise InputError(f"--devices is {devices!r}, expected a number with --chip")
    return choose_shards(config, devices)


def _find_device(config: ModelConfig, stored: str, count: int) -> tuple[Plan, str, int | None]:
    """Return the plan for the devices that the flags name, their name and the bytes of each."""
    if FLAGS.chip is not None:
        chip = CHIPS[FLAGS.chip]
        dtype = choose_dtype(FLAGS.dtype, stored, chip.platform)
        plan = accelerator_plan(chip.platform, dtype, FLAGS.determinism)
        return plan, chip.name, int(chip.memory * memory_fraction(chip.platform))
    device = default_device()
    plan = choose_plan(config, choose_dtype(FLAGS.dtype, stored), FLAGS.determinism)
    return plan, f"this {device.platform.upper()}", available_memory(device, count)
