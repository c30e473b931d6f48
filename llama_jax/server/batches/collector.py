"""BatchCollector: what the metrics report of batches."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_jax.server.batches.batch_store import STATUSES
from llama_jax.server.batches.batches import Batches


class BatchCollector(Collector):
    """Counts of batches, read at every scrape.

    Args:
        batches: those of the server.
        prefix: of the metrics' names.
    """

    def __init__(self, batches: Batches, prefix: str):
        self._batches, self._prefix = batches, prefix

    def collect(self) -> Iterator[Metric]:
        """Read the counts."""
        counts = self._batches.batches.count()
        by_status = GaugeMetricFamily(
            f"{self._prefix}num_batches", "Batches that are kept, by status.", labels=["status"]
        )
        for status in STATUSES:
            by_status.add_metric([status], counts.get(status, 0))
        yield by_status
        yield GaugeMetricFamily(
            f"{self._prefix}batch_lines_waiting",
            "Lines of batches without an answer.",
            self._batches.lines.num_left,
        )
        yield GaugeMetricFamily(
            f"{self._prefix}batch_stored_bytes",
            "Bytes of the files and answers that are kept.",
            self._batches.files.stored_bytes,
        )
        ended = CounterMetricFamily(
            f"{self._prefix}batch_lines", "Lines of batches that have an answer.", labels=["end"]
        )
        for end, count in self._batches.worker.ended.items():
            ended.add_metric([end], count)
        yield ended
