"""From measured rounds to the record: medians and ratios, as one JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.load.measure import Load, Measured, Rounds
from benchmarks.load.programs import PROGRAMS, Launch
from benchmarks.model_cost import total_params
from llama_jax.config import ModelConfig

Record = dict[str, Any]


def make_record(
    config: ModelConfig, load: Load, measured: Measured, about: dict[str, Any]
) -> Record:
    """Return what is written to the JSON file.

    Args:
        config: the shape.
        load: what the servers were to do.
        measured: what they did.
        about: what else belongs to the record: machine, command line.
    """
    launches = dict.fromkeys(launch for launch, _ in measured.points)
    return {
        **about,
        "shape": {**dataclasses.asdict(config), "parameters": total_params(config)},
        "settings": {
            **{name: getattr(load, name) for name in ("prompt_len", "new_tokens", "rounds")},
            **{name: getattr(load, name) for name in ("timeout_s", "seed", "gap")},
            "context": next((launch.context for launch in launches), None),
        },
        "engines": {
            str(launch): {
                "prompts": PROGRAMS[launch.program].reads,
                "batches": launch.batches,
            }
            for launch in launches
        },
        "points": [
            _row(launch, rounds)
            | {"load": str(point), "kind": point.kind, "amount": point.amount}
            | {"ours_over_this": _over(measured.points, launch, point)}
            for (launch, point), rounds in measured.points.items()
        ],
        "batches": [
            _row(launch, rounds)
            | {"server_over_batch": _server_over_batch(measured, load, launch, rounds)}
            for launch, rounds in measured.batches.items()
        ],
        "gaps": [_row(launch, rounds) for launch, rounds in measured.gaps.items()],
        "failures": measured.failures,
    }


def median(values: Sequence[Any]) -> Any:
    """Return the median of numbers, or of each figure of dicts, however nested.

    None where there is none; what is no number is left out.
    """
    there = [value for value in values if value is not None]
    if not there:
        return None
    if isinstance(there[0], dict):
        names = [name for name, value in there[0].items() if not isinstance(value, list)]
        return {name: median([value.get(name) for value in there]) for name in names}
    return statistics.median(there)


def _row(launch: Launch, rounds: Rounds) -> Record:
    """Return the median of rounds, and the rounds; of the lists, the first round's alone."""
    kept = [
        {n: v for n, v in figures.items() if not i or not isinstance(v, list)}
        for i, figures in enumerate(rounds.values())
    ]
    return {
        "engine": str(launch),
        "slots": launch.slots if launch.batches else 1,
        "median": median(list(rounds.values())),
        "rounds": kept,
    }


def _ratio(one: Rounds, other: Rounds) -> float | None:
    """Return the median of the rounds' ratios of tokens a second."""
    ratios = [
        one[turn]["tokens_per_s"] / other[turn]["tokens_per_s"]
        for turn in one.keys() & other.keys()
        if other[turn]["tokens_per_s"]
    ]
    return statistics.median(ratios) if ratios else None


def _over(points: dict, launch: Launch, point: Any) -> float | None:
    """Return how many times a peer's tokens a second ours are; None for ours."""
    if launch.program == "ours":
        return None
    for (other, at), rounds in points.items():
        if other.program == "ours" and at == point and other.slots == launch.slots:
            return _ratio(rounds, points[launch, point])
    return None


def _server_over_batch(
    measured: Measured, load: Load, launch: Launch, rounds: Rounds
) -> float | None:
    return _ratio(measured.points.get((launch, load.saturated), {}), rounds)
