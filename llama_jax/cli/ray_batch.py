"""The verb batch on Ray: --engine=ray."""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

from llama_jax.batch import Batch
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.model import checkpoint_path, parse_slots
from llama_jax.cli.refusals import refuse_flags
from llama_jax.cli.requests import parse_tokens
from llama_jax.cli.verbs import HOSTS, RAY, RECEIPT
from llama_jax.errors import InputError
from llama_jax.progress import progress_bar
from llama_jax.source import find_checkpoint


def check_ray_flags() -> None:
    """Refuse flags that have no effect with the engine that is chosen."""
    if FLAGS.engine == "ray":
        refuse_flags("--engine=ray", "whose workers are processes of Ray's", *HOSTS, *RECEIPT)
        return
    for name in RAY:
        if FLAGS[name].present and name != "engine":
            raise InputError(f"--{name} is given without --engine=ray; add it")


@contextlib.contextmanager
def open_input() -> Iterator[str]:
    """Give the file of --input; Ray's readers copy what is Parquet or a URL, with --engine=ray.

    Raises:
        InputError: it cannot be read.
    """
    if FLAGS.engine != "ray":
        yield FLAGS.input
        return
    try:
        from llama_jax.ray import cluster, source
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'llama_jax[ray]'") from None

    if not source.is_for_readers(FLAGS.input):
        yield FLAGS.input
        return
    with cluster.connected(FLAGS.ray_address, _level()), source.spooled(FLAGS.input) as path:
        yield str(path)


def answer_on_ray(work: Batch) -> None:
    """Answer what is left of a batch by workers of a Ray cluster.

    Raises:
        InputError: see `run_batch`; Ray cannot be reached.
    """
    from llama_jax.ray import cluster, driver

    pool = driver.Pool(
        workers=FLAGS.workers,
        gpus_per_worker=FLAGS.gpus_per_worker,
        rows_per_call=FLAGS.rows_per_call,
        allow_mixed=FLAGS.allow_mixed,
    )
    load = _arguments()
    with (
        cluster.connected(FLAGS.ray_address, _level()),
        progress_bar(total=work.total, initial=work.done, unit="request") as bar,
    ):
        for progress in driver.run_batch(work, load, pool):
            rate = f"{progress.tokens_per_s:,.0f} tokens/s, workers {progress.workers}"
            bar.set_description_str(f"requests ({rate})", refresh=False)
            bar.update(work.done - bar.n)


def _level() -> int:
    return logging.DEBUG if FLAGS.debug else logging.ERROR


def _arguments() -> dict[str, Any]:
    """Return the arguments of `Llama.load` for each worker."""
    path = find_checkpoint(
        checkpoint_path(), FLAGS.dtype, convert=FLAGS.convert, progress=True
    ).absolute()
    devices = FLAGS.devices or str(max(1, math.floor(FLAGS.gpus_per_worker)))
    return {
        "path": str(path),
        "dtype": FLAGS.dtype,
        "context": FLAGS.context,
        "slots": parse_slots(8),
        "determinism": FLAGS.determinism,
        "devices": int(devices) if devices.isascii() and devices.isdigit() else devices,
        "replicas": FLAGS.replicas,
        "eos_tokens": FLAGS.eos_tokens and parse_tokens("eos_tokens", FLAGS.eos_tokens),
        "verify": FLAGS.verify,
    }
