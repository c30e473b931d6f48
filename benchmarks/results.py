"""From measured seconds to the figures of a report: rates, limits and ratios, as one JSON."""

import dataclasses
import statistics
from typing import Any

from benchmarks.cases import Case, Engine
from benchmarks.limits import Limits
from benchmarks.measure import Measured
from benchmarks.model_cost import kv_bytes, matmul_limit, params_read, total_params
from llama_jax.config import ModelConfig


def make_results(
    config: ModelConfig, limits: Limits, measured: Measured, about: dict[str, Any]
) -> dict[str, Any]:
    """Return what is written to the JSON file.

    Args:
        config: the shape.
        limits: of the machine.
        measured: by the engines.
        about: what else belongs to the record: machine, command line, settings.
    """
    rows = [
        _row(case, engine, config, limits, measured) for case, engine in _in_order(measured.rounds)
    ]
    return {
        **about,
        "limits": dataclasses.asdict(limits),
        "shape": {
            **dataclasses.asdict(config),
            "parameters": total_params(config),
            "parameters_read_per_token": params_read(config),
        },
        "engines": {
            str(engine): {**said, **_memory(engine, config, measured)}
            for engine, said in measured.engines.items()
        },
        "cases": rows,
        "streaming": {str(e): _streaming(rounds) for e, rounds in measured.streaming.items()},
        "skipped": [
            {"case": str(s.case), "engine": str(s.engine), "reason": s.reason}
            for s in measured.skipped
        ],
        "failures": measured.failures,
    }


def _in_order(rounds: dict[tuple[Case, Engine], list[float]]) -> list[tuple[Case, Engine]]:
    """Sort by case, prefill first, each case's engines as they were given: ours, then peers."""
    engines = list(dict.fromkeys(engine for _, engine in rounds))
    engines.sort(key=lambda engine: engine.kind != "ours")

    def key(pair: tuple[Case, Engine]) -> tuple:
        case, engine = pair
        return case.op != "prefill", case.batch, case.tokens, engines.index(engine)

    return sorted(rounds, key=key)


def _row(
    case: Case, engine: Engine, config: ModelConfig, limits: Limits, measured: Measured
) -> dict[str, Any]:
    """Return one case in one engine; all figures follow from the median of the rounds."""
    rounds = measured.rounds[case, engine]
    seconds = statistics.median(rounds)
    cost = case.cost(config, engine.dtype)
    limit = cost.limit_seconds(limits.bandwidth, matmul_limit(limits.matmul, engine.dtype))
    ratios = {}
    for (other_case, ours), times in measured.rounds.items():
        if other_case == case and ours.kind == "ours" and engine.kind != "ours":
            # Not strict: the last round of a run that was stopped may lack one.
            ratios[str(ours)] = statistics.median(
                theirs / mine for theirs, mine in zip(rounds, times, strict=False)
            )
    return {
        **dataclasses.asdict(case),
        "engine": str(engine),
        "dtype": engine.dtype,
        "rounds_s": rounds,
        "seconds": seconds,
        "counted_tokens": case.counted,
        "tokens_per_s": case.counted / seconds,
        "limit_s": limit,
        "limit_tokens_per_s": case.counted / limit,
        "fraction_of_limit": limit / seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flop_per_byte": cost.intensity,
        "flop_per_s": cost.flops / seconds,
        "ours_over_this": ratios,
    }


def _memory(engine: Engine, config: ModelConfig, measured: Measured) -> dict[str, int]:
    """Return the bytes of weights, and of the largest cache that was measured."""
    caches = [
        case.batch * case.slots * kv_bytes(config, engine.dtype)
        for case, other in measured.rounds
        if other == engine
    ]
    return {"weights_bytes": engine.bytes_of(config), "cache_bytes": max(caches, default=0)}


def _streaming(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return the rates of a streamed request over those of a whole and of a bare one."""

    def ratio(way: str) -> float:
        return statistics.median(seconds[way] / seconds["stream"] for seconds in rounds)

    return {
        "rounds_s": rounds,
        "stream_over_whole": ratio("generate"),
        "stream_over_programs": ratio("programs"),
    }
