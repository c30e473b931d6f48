"""What batches on Ray are made of, without a cluster."""

import json
from unittest import mock

import pytest

from llama_jax import InputError
from llama_jax.batch import Batch
from tests.helpers.demo import load_demo
from tests.helpers.ray_batches import comparable, local, requests, write

pytestmark = pytest.mark.ray

ray = pytest.importorskip("llama_jax.ray", reason="needs the ray extra: pip install -e '.[ray]'")
pa = pytest.importorskip("pyarrow", reason="needs the ray extra: pip install -e '.[ray]'")
driver, ledgers = ray.driver, ray.ledger


def worker(llm):
    """A worker with a model that is loaded already."""
    with mock.patch("llama_jax.ray.worker.Llama.load", return_value=llm):
        return ray.Worker({})


def test_a_worker_answers_tables_with_the_rows_of_the_local_engine(tmp_path):
    llm = load_demo(slots=2)
    files = write(tmp_path, requests(20))
    with Batch(*files) as batch:
        tables = list(driver._tables(batch.pending(), 7))
        assert [table.num_rows for table in tables] == [7, 7, 5]
        assert tables[0].schema == ray.worker.REQUESTS
        answered = [worker(llm)(table) for table in tables]
    table = pa.concat_tables(answered)
    assert table.schema == ray.worker.ROWS
    files[1].write_bytes(b"".join(row + b"\n" for row in table["row"].to_pylist()))
    assert comparable(files[1]) == local(files[0], llm)
    for answer in table.to_pylist():
        row = json.loads(answer["row"])
        if "response" not in row:
            tokens = row["result"]["tokens"] if "result" in row else []
            assert answer["tokens"] == len(tokens)
    assert set(table["fingerprint"].to_pylist()) == {llm.engine.fingerprint}


@pytest.mark.parametrize(
    ("nodes", "workers", "share"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([2], 5, 1),
        ([16, 16], 3, 8),
        ([16, 4], 2, 8),
        ([1], 1, 1),
        ([64] * 4, 16, 16),
        ([], 1, 1),
    ],
)
def test_workers_share_the_cores_and_leave_ray_a_part(nodes, workers, share):
    assert ray.cores.share_of(nodes, workers) == share
    each = ray.cores.requested(nodes, workers)
    assert each < share
    assert each * workers <= sum(nodes) - 0.5 * bool(nodes)


def test_a_line_that_ended_workers_is_begun_alone_only():
    ledger = ledgers.Ledger(workers=1)
    assert ledger.begin([1, 2], alone=False) == [0, 0]
    assert ledger.begin([1, 2, 3], alone=False) == [1, 1, 0]
    assert ledger.begin([3], alone=False) == [0]  # it was not begun beside the others
    ledger.end([3])
    for ends in range(1, ledgers.MOST_ENDS + 1):
        assert ledger.begin([1], alone=True) == [ends]
    ledger.end([1, 2])
    assert ledger.begin([1, 2], alone=False) == [0, 0]


def test_workers_that_start_without_an_answer_are_counted():
    ledger = ledgers.Ledger(workers=2)
    assert [ledger.start() for _ in range(7)] == [True] * 6 + [False]
    ledger.end([1])
    assert ledger.start()


def rows(*fingerprints):
    """Tables as workers answer them, one row each, the last line first."""
    for number, fingerprint in reversed(list(enumerate(fingerprints, 1))):
        row = json.dumps({"line": number, "error": "x"}).encode()
        values = {
            "line": number,
            "row": row,
            "tokens": 0,
            "fingerprint": fingerprint,
            "worker": "w",
        }
        yield pa.Table.from_pylist([values], ray.worker.ROWS)


@pytest.fixture
def batch(tmp_path):
    with Batch(*write(tmp_path, [b"{}", b"{}", b"{}"])) as batch:
        yield batch


def answering(*fingerprints):
    """Workers that answer so, without Ray."""
    return mock.patch.multiple(
        driver,
        ray=mock.DEFAULT,
        _start_ledger=lambda workers: None,
        _nodes=lambda: [{"CPU": 2.0}],
        _answers=lambda *_: rows(*fingerprints),
    )


def test_rows_are_written_in_order_whichever_comes_first(batch):
    with answering("a", "a", "a"):
        done = [batch.done for _ in ray.run_batch(batch, {})]
    assert done == [0, 0, 3]
    assert [json.loads(row)["line"] for row in batch.output.read_text().splitlines()] == [1, 2, 3]


def test_workers_with_different_fingerprints_are_refused_unless_allowed(batch):
    with (
        answering("a", "b", "b"),
        pytest.raises(InputError, match=r"worker w has the fingerprint a, .* another has b: "),
    ):
        list(ray.run_batch(batch, {}))
    assert batch.done == 0
    with answering("a", "b", "b"):
        list(ray.run_batch(batch, {}, ray.Pool(allow_mixed=True)))
    assert batch.done == 3


def test_rows_that_never_come_are_an_error(batch):
    with answering("a", "a"), pytest.raises(InputError, match="line 3 and 0 after it have no answ"):
        list(ray.run_batch(batch, {}))
    assert batch.done == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("workers", 0), ("rows_per_call", 0), ("gpus_per_worker", -1), ("gpus_per_worker", 1.5)],
)
def test_a_pool_that_cannot_be_is_refused(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        ray.Pool(**{field: value})


def test_workers_without_gpus_for_them_are_refused():
    nodes = [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0}]
    with pytest.raises(InputError, match=r"2 workers with 2 GPUs each are wanted, .* for 1; name"):
        driver.check_pool(ray.Pool(workers=2, gpus_per_worker=2), nodes)
    driver.check_pool(ray.Pool(workers=6, gpus_per_worker=0.5), nodes)
