"""Metrics for Prometheus; they have vLLM's names where their meaning is the same."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_jax.llama import Llama
from llama_jax.server.batches.batches import Batches
from llama_jax.server.batches.collector import BatchCollector
from llama_jax.server.body_budget import BodyBudget
from llama_jax.server.receipts import ReceiptStore
from llama_jax.server.request_log import RequestLog

_PREFIX = "llama_jax_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
_PROMPTS = {"short": 256, "medium": 2048, "long": math.inf}
"""Classes of prompts, by the most tokens. The engine reads 128 or 256 tokens of prompts a turn: a
short one takes a turn or two, a long one more than eight."""


class Connections(Protocol):
    """What the metrics read of the server's connections."""

    limit: int
    open: Any
    """The set of open connections."""
    closed: Mapping[str, int]
    """How many the server closed, by reason."""


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        llm: the model whose engine is read at every scrape.
        budget: counts the requests' bodies; read at every scrape.
        receipts: those that are kept; read at every scrape.
    """

    def __init__(self, llm: Llama, budget: BodyBudget, receipts: ReceiptStore):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(llm))
        self._requests = self._counter(
            "http_requests", "HTTP requests.", "route", "method", "status"
        )
        self._errors = self._counter("errors", "Errors returned to clients.", "code")
        self._rejections = self._counter(
            "rejections", "Requests refused that may be accepted later.", "reason"
        )
        self._disconnects = self._counter(
            "client_disconnects", "Clients that disconnected before the response ended.", "route"
        )
        self._successes = self._counter(
            "request_success", "Generations completed.", "route", "finished_reason"
        )
        self._first = self._by_prompt("time_to_first_token_seconds", "Time to first token (TTFT).")
        self._per_token = self._histogram(
            "time_per_output_token_seconds",
            "Mean inter-token latency of a request.",
            _SHORT_SECONDS,
        )
        self._whole = self._by_prompt(
            "e2e_request_latency_seconds", "Time from a request to its response's end."
        )
        self._queued = self._by_prompt(
            "request_queue_time_seconds", "Time a generation waited for a slot."
        )
        self._prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens per generation.", _TOKENS
        )
        self._generated = self._histogram(
            "request_generation_tokens", "Tokens generated per generation.", _TOKENS
        )
        for name, text, read in (
            (
                "request_body_bytes",
                "Bytes of the bodies of requests under way.",
                lambda: budget.held,
            ),
            ("num_receipts", "Receipts kept.", lambda: len(receipts)),
            ("receipt_bytes", "Bytes of memory of the receipts kept.", lambda: receipts.held),
        ):
            Gauge(f"{_PREFIX}{name}", text, registry=self._registry).set_function(read)

    def watch_batches(self, batches: Batches) -> None:
        """Report batches too, at every scrape."""
        self._registry.register(BatchCollector(batches, _PREFIX))

    def watch(self, connections: Connections) -> None:
        """Report connections too, at every scrape."""
        self._registry.register(_ConnectionCollector(connections))

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe(self, log: RequestLog) -> None:
        """Count a request that has ended."""
        status = "none" if log.status is None else str(log.status)
        method = log.method if log.method in _METHODS else "other"  # clients may send any word
        self._requests.labels(log.route, method, status).inc()
        if log.error is not None:
            self._errors.labels(str(log.error.kind.code)).inc()
            if (reason := log.error.kind.rejection) is not None:
                self._rejections.labels(reason).inc()
        if log.disconnected:
            self._disconnects.labels(log.route).inc()
        for result in log.results:
            self._successes.labels(log.route, result.finish_reason).inc()
            length = len(result.prompt_tokens)
            self._queued.labels(_prompt_class(length)).observe(result.timings.queue_s)
            self._prompt.observe(length)
            self._generated.observe(len(result.tokens))
        prompt = _prompt_class(log.longest_prompt)
        if log.first_text_s is not None:
            self._first.labels(prompt).observe(log.first_text_s)
        if log.results and log.error is None:
            self._whole.labels(prompt).observe(log.duration_s)
        if (seconds := log.s_per_token) is not None:
            self._per_token.observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, buckets=buckets, registry=self._registry)

    def _by_prompt(self, name: str, text: str) -> Histogram:
        """Return a histogram of seconds by class of prompt."""
        histogram = Histogram(
            _PREFIX + name, text, ["prompt"], buckets=_SECONDS, registry=self._registry
        )
        for prompt in _PROMPTS:
            histogram.labels(prompt)  # reported from the start, with zeros
        return histogram


def _prompt_class(tokens: int) -> str:
    return next(name for name, most in _PROMPTS.items() if tokens <= most)


class _EngineCollector(Collector):
    """The engine's own counts, read at every scrape."""

    def __init__(self, llm: Llama):
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        """Read the counts."""
        engine, executor = self._llm.engine, self._llm.executor
        gauges = {
            "num_requests_running": ("Generations in flight.", engine.running),
            "num_requests_waiting": ("Generations waiting for a slot.", engine.queued),
            "num_slots": ("Slots: the most generations in flight.", executor.batch),
            "num_batch_generations_running": (
                "Generations of batches in slots that no live request needs.",
                engine.background[0],
            ),
            "kv_cache_usage_perc": (
                "Share of the caches that generations in flight have, from 0 to 1.",
                engine.running / executor.batch,  # each has its slot's whole cache
            ),
            "compiled_programs": ("Programs compiled.", len(executor.compiled.names)),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens of started generations.", engine.counts.prompt_tokens),
            "prefix_reused_tokens": (
                "Prompt tokens served from the prefix cache.",
                engine.counts.cached_tokens,
            ),
            "generation_tokens": ("Tokens generated.", engine.counts.tokens),
            "speculative_drafted_tokens": ("Draft tokens verified.", engine.counts.drafted),
            "speculative_accepted_tokens": (
                "Draft tokens equal to the token drawn.",
                engine.counts.accepted,
            ),
            "speculative_passes": (
                "Passes over the last token of a generation and its drafts.",
                engine.counts.passes,
            ),
            "speculative_pass_tokens": (
                "Tokens drawn in these passes.",
                engine.counts.pass_tokens,
            ),
            "compile_seconds": ("Seconds spent on compilation.", executor.compiled.seconds),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(_PREFIX + name, text, value)
        ended = CounterMetricFamily(_PREFIX + "generations", "Generations ended.", labels=["end"])
        for end, count in dict(engine.counts.ended).items():
            ended.add_metric([end], count)
        yield ended


class _ConnectionCollector(Collector):
    """Counts of connections, read at every scrape."""

    def __init__(self, connections: Connections):
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """Read the counts."""
        connections = self._connections
        for name, text, value in (
            ("num_connections", "Open connections.", len(connections.open)),
            ("max_connections", "The most open connections.", connections.limit),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        closed = CounterMetricFamily(
            _PREFIX + "connections_closed", "Connections closed by the server.", labels=["reason"]
        )
        for reason, count in dict(connections.closed).items():
            closed.add_metric([reason], count)
        yield closed
