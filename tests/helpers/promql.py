"""PromQL in tests: which metrics and labels an expression has, and which ones a server exports."""

import types
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llama_jax.engine.counts import Counts
from llama_jax.server import errors
from llama_jax.server.body_budget import BodyBudget
from llama_jax.server.metrics import Metrics
from llama_jax.server.receipts import ReceiptStore
from llama_jax.server.request_log import RequestLog

PROMETHEUS = {"up": frozenset[str]()}
"""What Prometheus itself records of each server."""

SCRAPED = frozenset({"instance", "job", "namespace", "pod"})
"""Labels that prometheus.yml gives what is scraped."""


def exported_metrics() -> dict[str, frozenset[str]]:
    """Return the names of all samples of /metrics with their labels; no model is loaded."""
    counts = Counts(ended={"stop": 1})
    engine = types.SimpleNamespace(running=1, queued=0, background=(0, 0), counts=counts)
    compiled = types.SimpleNamespace(names=["decode"], seconds=1.0)
    executor = types.SimpleNamespace(batch=8, compiled=compiled)
    llm: Any = types.SimpleNamespace(engine=engine, executor=executor)
    metrics = Metrics(llm, BodyBudget(1), ReceiptStore(0))
    connections: Any = types.SimpleNamespace(limit=8, open=set(), closed={"gone": 1})
    metrics.watch(connections)
    timings = types.SimpleNamespace(queue_s=0.0)
    result: Any = types.SimpleNamespace(
        finish_reason="stop", prompt_tokens=[1], tokens=[1, 2], timings=timings
    )
    log = RequestLog("POST", "/v1/completions", status=200, disconnected=True)
    log.results, log.error = [result], errors.ApiError(errors.FULL)
    log.first_text_s, log.last_text_s = 0.1, 0.2
    metrics.observe(log)
    text = metrics.render().decode()
    return {
        sample.name: frozenset(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_expression(text: str, known: Mapping[str, frozenset[str]]) -> None:
    """Check that an expression parses, and that its metrics and labels are known ones."""
    used = frozenset[str]()
    for name, matchers in selectors(text):
        assert name in known, f"no metric {name}"
        labels = known[name] | SCRAPED
        assert matchers <= labels, f"{name} has no label {', '.join(matchers - labels)}"
        used |= labels
    assert used, "no metric at all"
    unknown = grouping_labels(text) - used
    assert not unknown, f"no label {', '.join(unknown)} to group by"


def selectors(text: str) -> Iterator[tuple[str | None, frozenset[str]]]:
    """Yield the metric of each selector in an expression, and the labels that it matches."""
    for node in _nodes(text):
        if type(node).__name__ == "VectorSelector":
            yield node.name, frozenset(each.name for each in node.matchers.matchers)


def grouping_labels(text: str) -> frozenset[str]:
    """Return the labels that an expression's aggregations group by."""
    aggregations = [node for node in _nodes(text) if type(node).__name__ == "AggregateExpr"]
    return frozenset(
        label for node in aggregations if node.modifier for label in node.modifier.labels
    )


def _nodes(text: str) -> list:
    import promql_parser  # of the deploy extra

    found: list = []
    promql_parser.walk(promql_parser.parse(text), pre_visit=found.append)
    return found
