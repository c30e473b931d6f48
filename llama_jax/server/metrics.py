"""Metrics for Prometheus, named as vLLM names its own where they mean the same."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_jax.llama import Llama
from llama_jax.server.request_log import RequestLog

_PREFIX = "llama_jax:"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """What one server counts, in a registry of its own.

    Args:
        llm: whose engine is looked at whenever metrics are read.
    """

    def __init__(self, llm: Llama):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(llm))
        self._requests = self._counter(
            "http_requests", "Requests answered.", "route", "method", "status"
        )
        self._errors = self._counter("errors", "Errors told to clients, by their code.", "code")
        self._disconnects = self._counter(
            "client_disconnects", "Clients that hung up before their answer's end.", "route"
        )
        self._successes = self._counter(
            "request_success", "Answers that came to their end.", "route", "finished_reason"
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first tokens.", _SECONDS
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds",
            "From the first tokens to the last, by token.",
            _SHORT_SECONDS,
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS
        )
        self._queued = self._histogram(
            "request_queue_time_seconds", "Waiting for a slot.", _SECONDS
        )
        self._prompt = self._histogram(
            "request_prompt_tokens", "Tokens of an answer's prompt.", _TOKENS
        )
        self._generated = self._histogram(
            "request_generation_tokens", "Tokens of an answer.", _TOKENS
        )

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe(self, call: RequestLog) -> None:
        """Count a call that is over."""
        status = "none" if call.status is None else str(call.status)
        method = call.method if call.method in _METHODS else "other"  # a client may send any word
        self._requests.labels(call.route, method, status).inc()
        if call.error is not None:
            self._errors.labels(str(call.error.kind.code)).inc()
        if call.disconnected:
            self._disconnects.labels(call.route).inc()
        for result in call.results:
            self._successes.labels(call.route, result.finish_reason).inc()
            self._queued.observe(result.timings.queue_s)
            self._prompt.observe(len(result.prompt_tokens))
            self._generated.observe(len(result.tokens))
        if call.first_text_s is not None:
            self._first.observe(call.first_text_s)
        if call.results and call.error is None:
            self._whole.observe(call.duration_s)
        if (seconds := call.s_per_token) is not None:
            self._per_token.observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, text, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    """What the engine knows of itself."""

    def __init__(self, llm: Llama):
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        engine, executor = self._llm.engine, self._llm.executor
        gauges = {
            "num_requests_running": ("Slots in use.", engine.running),
            "num_requests_waiting": ("Requests in the queue.", engine.queued),
            "num_slots": ("Answers drawn at once, at most.", executor.batch),
            "compiled_programs": ("Programs compiled so far.", len(executor.compiled.names)),
        }
        counters = {
            "prompt_tokens": ("Of all prompts that got a slot.", engine.counts.prompt_tokens),
            "prefix_reused_tokens": (
                "Of those, found in the cache and not read again.",
                engine.counts.cached_tokens,
            ),
            "generation_tokens": ("Drawn.", engine.counts.tokens),
            "compile_seconds": ("Spent on compiling.", executor.compiled.seconds),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(_PREFIX + name, text, value)
        ended = CounterMetricFamily(
            _PREFIX + "generations", "Generations by their end.", labels=["end"]
        )
        for end, count in dict(engine.counts.ended).items():
            ended.add_metric([end], count)
        yield ended
