"""The tables on stdout: what clients of each server saw, and what it cost them."""

import textwrap
from typing import Any

from benchmarks.report import table

Record = dict[str, Any]

NOTES = """burst: the wait for text, which comes in bursts; token: the same, shared by its tokens.
p99 of fewer than 100 values is the largest. ours: how many times a peer's tok/s ours are."""


def make_report(record: Record) -> str:
    """Return the whole report as text, lines of at most 100 columns where names are short."""
    points = record["points"]
    parts = [_head(record), _answers(points), _waits(points), NOTES] if points else [_head(record)]
    parts += [_batches(record["batches"]), _gaps(record["gaps"]), _problems(record["failures"])]
    return "\n\n".join(part for part in parts if part)


def _head(record: Record) -> str:
    settings, machine = record["settings"], record["machine"]
    lines = [
        f"{record['model']}: {record['shape']['parameters'] / 1e9:.3g}e9 parameters; "
        f"{machine['cpu']}, {machine['cores']} cores",
        f"prompts of {settings['prompt_len']} tokens, {settings['new_tokens']} new ones, greedy; "
        f"medians of {settings['rounds']} rounds",
    ]
    lines += [
        f"{engine}: prompts as {about['prompts']}"
        + ("" if about["batches"] else "; one request at a time")
        for engine, about in record["engines"].items()
    ]
    return "\n".join(lines)


def _answers(rows: list[Record]) -> str:
    head = ["engine", "slots", "load", "n", "failed", "tok/s", "first ms p50", "p99"]
    head += ["whole s p50", "p99", "ours"]
    lines = [
        [
            *_name(row),
            f"{row['median']['requests']:g}",
            f"{row['median']['errors']:g}",
            number(row["median"]["tokens_per_s"]),
            *_pair(row["median"]["first_token_s"], 1e3),
            *_pair(row["median"]["end_to_end_s"], 1),
            "" if row["ours_over_this"] is None else f"{row['ours_over_this']:.2f}x",
        ]
        for row in rows
    ]
    return "Answers\n" + table(head, lines, left=(0, 2), group=2)


def _waits(rows: list[Record]) -> str:
    head = ["engine", "slots", "load", "token ms p50", "p99", "burst ms p50", "p99", "its tokens"]
    lines = [
        [
            *_name(row),
            *_pair(row["median"]["per_token_s"], 1e3),
            *_pair(row["median"]["per_burst_s"], 1e3),
            number(row["median"]["tokens_per_burst"]),
        ]
        for row in rows
    ]
    return "Waits between the tokens of an answer\n" + table(head, lines, left=(0, 2), group=2)


def _name(row: Record) -> list[str]:
    return [row["engine"], str(row["slots"]), row["load"]]


def _batches(rows: list[Record]) -> str:
    if not rows:
        return ""
    head = ["engine", "slots", "requests", "tok/s", "server's share"]
    lines = [
        [
            row["engine"],
            str(row["slots"]),
            f"{row['median']['requests']:g}",
            number(row["median"]["tokens_per_s"]),
            "" if row["server_over_batch"] is None else f"{row['server_over_batch']:.1%}",
        ]
        for row in rows
    ]
    return "The requests of the most clients as one batch, without a server\n" + table(
        head, lines, left=(0,)
    )


def _gaps(rows: list[Record]) -> str:
    if not rows:
        return ""
    head = ["engine", "streams", "idle ms p50", "p99", "max", "beside p50", "p99", "max"]
    head += ["p99/idle", "max/idle", "read in s"]
    lines = []
    for row in rows:
        figures = row["median"]
        waits = [
            number(figures[when][name] and figures[when][name] * 1e3)
            for when in ("idle_s", "during_s")
            for name in ("p50", "p99", "max")
        ]
        ratios = [number(figures[name]) for name in ("p99_ratio", "max_ratio", "first_token_s")]
        lines.append([row["engine"], f"{figures['streams']:g}", *waits, *ratios])
    length = rows[0]["median"]["long_prompt"]
    title = (
        f"Waits for a burst, beside a new prompt of {length:,g} tokens, over the median idle one"
    )
    return f"{title}\n{table(head, lines, left=(0,))}"


def _pair(spread: Record, factor: float) -> list[str]:
    return [number(spread[n] if spread[n] is None else spread[n] * factor) for n in ("p50", "p99")]


def number(value: float | None) -> str:
    """Return three digits or more of a number; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _problems(failures: list[str]) -> str:
    lines = [textwrap.fill(f"failed: {f}", 100, subsequent_indent="  ") for f in failures]
    return "\n".join(lines)
