"""Driver: sends the lines of a batch to workers on Ray, and writes their rows in order."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray import cloudpickle

from llama_jax.batch.file import Batch
from llama_jax.batch.line import Format, request_format
from llama_jax.errors import InputError
from llama_jax.ray import cores, ledger
from llama_jax.ray.gpus import check_gpus
from llama_jax.ray.worker import REQUESTS, Worker
from llama_jax.strict_json import parse_json

ROWS_PER_CALL = 32
"""More cost a dead worker more; fewer cost Ray more for each row."""

_RECENT_S = 30.0
"""A worker counts that answered so lately, and so does the rate of tokens."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """The workers of a run.

    Raises:
        InputError: a number is out of range.
    """

    workers: int = 1
    gpus_per_worker: float = 0.0
    """Of Ray's; a fraction shares a GPU."""
    rows_per_call: int = ROWS_PER_CALL
    allow_mixed: bool = False
    """Take answers of workers whose fingerprints differ."""
    format_of: Callable[[Any], Format] = request_format
    """Returns the format of a line's fields."""

    def __post_init__(self) -> None:
        """Refuse what Ray would wait for without end."""
        for name in ("workers", "rows_per_call"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r:.40}, expected a whole number from 1")
        check_gpus("gpus_per_worker", self.gpus_per_worker)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    rows: int
    """Answered in this run, whether or not those before them are."""
    tokens_per_s: float
    workers: int
    """Which answered lately."""


def run_batch(
    batch: Batch, load: Mapping[str, Any], pool: Pool | None = None
) -> Iterator[Progress]:
    """Answer what is left of a batch on Ray; yield after each table of rows that came.

    Rows are written in order, so a killed driver continues where the file ends. A worker that dies
    is started again, and its lines are tried again; a line that ends MOST_ENDS workers one after
    the other gets an error. Seeds are fixed before: rows do not depend on who answers them.

    Ray must run: call `ray.init` before.

    Args:
        batch: open.
        load: arguments of `Llama.load`; files must be readable on every node.
        pool: the workers; None: one.

    Raises:
        InputError: see `Batch.run`; Ray has not the cores or GPUs for the workers; they have
            different fingerprints; they cannot load the model.
    """
    pool = pool or Pool()
    tables = list(_tables(batch.pending(), pool.rows_per_call))
    if not tables:
        return
    check_pool(pool, _nodes())
    records = _start_ledger(pool.workers)
    kept, meter, fingerprint = dict[int, bytes](), _Meter(), None
    order = (line for table in tables for line in table["line"].to_pylist())
    expected = collections.deque(order)
    for table in _answers(tables, load, batch.seed, pool, records):
        for answer in table.to_pylist():
            fingerprint = fingerprint or answer["fingerprint"]
            if answer["fingerprint"] != fingerprint and not pool.allow_mixed:
                raise _mixed(fingerprint, answer)
            kept[answer["line"]] = answer["row"]
            meter.add(answer["tokens"], answer["worker"])
        while expected and (row := kept.pop(expected[0], None)) is not None:
            batch.write(parse_json(row, f"the row of line {expected.popleft()}"))
        yield meter.progress()
    if expected:
        raise InputError(
            f"line {expected[0]} and {len(expected) - 1:,} after it have no answer: Ray lost them; "
            "run the same again: it continues there"
        )


def check_pool(pool: Pool, nodes: list[Mapping[str, float]]) -> None:
    """Refuse a pool that would wait for resources without end.

    Args:
        pool: the workers.
        nodes: what each node has, by Ray's names: "CPU", "GPU".

    Raises:
        InputError: there are not enough GPUs.
    """
    if pool.gpus_per_worker:
        per_node = (math.floor(node.get("GPU", 0) / pool.gpus_per_worker) for node in nodes)
        if (room := sum(per_node)) < pool.workers:
            raise InputError(
                f"{pool.workers} workers with {pool.gpus_per_worker:g} GPUs each are wanted, but "
                f"Ray has GPUs for {room}; name fewer --workers, or start more nodes"
            )


def _tables(requests: Iterable[tuple[int, bytes, int]], size: int) -> Iterator[pa.Table]:
    """Yield the requests in tables of so many."""
    part: list[dict[str, Any]] = []
    for values in requests:
        part.append(dict(zip(REQUESTS.names, values, strict=True)))
        if len(part) == size:
            yield pa.Table.from_pylist(part, REQUESTS)
            part = []
    if part:
        yield pa.Table.from_pylist(part, REQUESTS)


def _answers(
    tables: list[pa.Table], load: Mapping[str, Any], seed: int, pool: Pool, records: Any
) -> Iterator[pa.Table]:
    """Yield the tables of rows as they come."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = ledger.MOST_STARTS - 1  # one bad node ends no run
    with ray.data.DataContext.current(context):  # a dataset keeps that of its begin
        answers = map_on_workers(ray.data.from_arrow(tables), load, seed, pool, records)
    try:
        yield from answers.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise InputError(_reason(error)) from error


def map_on_workers(
    requests: ray.data.Dataset, load: Mapping[str, Any], seed: int, pool: Pool, records: Any = None
) -> ray.data.Dataset:
    """Return the dataset of rows for a dataset of requests.

    Args:
        requests: its rows have the columns of `worker.REQUESTS`.
        load: arguments of `Llama.load`.
        seed: from which lines without a seed get theirs.
        pool: the workers.
        records: the handle of a `Ledger`; see `Worker`.
    """
    # Enough calls at once that the slots stay full while the last rows of one are drawn.
    calls = 1 + math.ceil(load.get("slots", 1) / pool.rows_per_call)
    nodes = [node.get("CPU", 0.0) for node in _nodes()]
    return requests.map_batches(
        Worker,
        batch_size=pool.rows_per_call,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=pool.workers,
            max_concurrent_calls_per_actor=calls,
            max_tasks_in_flight_per_actor=calls + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=cores.requested(nodes, pool.workers),
        num_gpus=pool.gpus_per_worker,
        runtime_env={"env_vars": cores.environment(cores.share_of(nodes, pool.workers))},
        fn_constructor_args=(dict(load),),
        fn_constructor_kwargs={
            "seed": seed,
            "calls": calls,
            "ledger": records,
            "format_of": pool.format_of,
        },
    )


def _start_ledger(workers: int) -> Any:
    """Return the handle of a new ledger."""
    # By value: else its process would import this package, and JAX with it (0.4 GB).
    cloudpickle.register_pickle_by_value(ledger)
    try:
        return ray.remote(num_cpus=0)(ledger.Ledger).remote(workers)
    finally:
        cloudpickle.unregister_pickle_by_value(ledger)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _mixed(fingerprint: str, answer: Mapping[str, Any]) -> InputError:
    return InputError(
        f"the worker {answer['worker']} has the fingerprint {answer['fingerprint']}, but another "
        f"has {fingerprint}: their answers may differ; use nodes of one kind, or allow it with "
        "--allow_mixed"
    )


def _reason(error: Exception) -> str:
    """Return the last line of what a worker raised: its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"the workers cannot go on: {lines[-1].strip() if lines else type(error).__name__}"


class _Meter:
    """Counts what came lately."""

    def __init__(self) -> None:
        self._rows, self._began = 0, time.monotonic()
        self._recent = collections.deque[tuple[float, int, str]]()

    def add(self, tokens: int, worker: str) -> None:
        self._rows += 1
        self._recent.append((time.monotonic(), tokens, worker))

    def progress(self) -> Progress:
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - _RECENT_S:
            self._recent.popleft()
        seconds = max(min(_RECENT_S, now - self._began), 1e-3)
        tokens = sum(count for _, count, _ in self._recent)
        return Progress(self._rows, tokens / seconds, len({name for *_, name in self._recent}))
