"""The tables on stdout."""

import textwrap
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Align rows as text, their keys above: text to the left, numbers to the right."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        texts = [name, *(cell if isinstance(cell, str) else number(cell) for cell in cells)]
        width = max(map(len, texts))
        named = any(isinstance(cell, str) for cell in cells)
        columns.append([f"{text:<{width}}" if named else f"{text:>{width}}" for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def number(value: float | None) -> str:
    """Return a whole number, or three digits or more of any other; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def scaled(value: float | None, by: float) -> float | None:
    """Return a figure in another unit; None stays None."""
    return None if value is None else value * by


def device_name(record: Record) -> str:
    """Return what was measured on: the processor and its cores, or the accelerator."""
    machine, limits = record["machine"], record.get("limits", {"backend": "cpu"})
    on_cpu = limits["backend"] == "cpu"
    return f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else limits["device"]


def problems(record: Record) -> str:
    """Return what was not measured, and why; cases with the same reason together."""
    cases: dict[tuple[str, str], list[str]] = {}
    for skip in record.get("skipped", []):
        cases.setdefault((skip["engine"], skip["reason"]), []).append(skip["case"])
    lines = [f"not measured: {e}, {'; '.join(names)}: {why}" for (e, why), names in cases.items()]
    lines += [f"failed: {text}" for text in record["failures"]]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


def heading(record: Record) -> str:
    """Return the model and what it was measured on."""
    parameters = record["shape"]["parameters"] / 1e9
    return f"{record['model']}: {parameters:.3g}e9 parameters; {device_name(record)}"


def make_report(record: Record) -> str:
    """Return the report of `python -m benchmarks`."""
    limits, settings = record["limits"], record["settings"]
    rates = ", ".join(f"{d} {rate / 1e9:,.0f} GFLOP/s" for d, rate in limits["matmul"].items())
    parts = [
        f"{heading(record)}\nlimits: memory {limits['bandwidth'] / 1e9:.1f} GB/s; {rates}\n"
        f"medians of {settings['rounds']} rounds, in turns; {settings['new_tokens']} new tokens",
        table([_case(row) for row in record["cases"]]),
        table([_engine(name, record) for name in record["engines"]]),
        problems(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _case(row: Record) -> dict[str, Any]:
    """Return the columns of a case; the last are how many times as fast ours is.

    `spread`: how far the rounds lie apart, as a share of the median.
    """
    return {
        "case": row["op"],
        "batch": row["batch"],
        "tokens": row["tokens"],
        "engine": row["engine"],
        "ms": row["seconds"] * 1e3,
        "tok/s": row["tokens_per_s"],
        "limit": row["limit_tokens_per_s"],
        "of limit": row["fraction_of_limit"],
        "spread": (max(row["rounds_s"]) - min(row["rounds_s"])) / row["seconds"],
        **row["ours_over_this"],
    }


def _engine(name: str, record: Record) -> dict[str, Any]:
    """Return the columns of an engine; `stream/whole` is of tokens/s."""
    about, streamed = record["engines"][name], record["streaming"].get(name, {})
    return {
        "engine": name,
        "load s": about["load_s"],
        "compile s": about.get("compile_cold_s"),
        "again s": about.get("compile_warm_s"),
        "programs": about.get("programs"),
        "weights GB": scaled(about.get("weights_bytes"), 1e-9),
        "cache GB": scaled(about.get("cache_bytes"), 1e-9),
        "peak GB": scaled(about.get("device_bytes", about.get("process_bytes")), 1e-9),
        "stream/whole": streamed.get("stream_over_whole"),
        "version": about["version"],
    }


def make_serving_report(record: Record) -> str:
    """Return the report of `python -m benchmarks.serve`."""
    settings = record["settings"]
    parts = [
        f"{heading(record)}\nprompts of {settings['prompt_len']} tokens, "
        f"{settings['new_tokens']} new ones, greedy; medians of {settings['rounds']} rounds",
        table([_load(row) for row in record["points"] + record["batches"]]),
        problems(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _load(row: Record) -> dict[str, Any]:
    """Return the columns of a server under a load; `ours`: how many times as fast ours is."""
    median = row["median"]
    columns = {
        "engine": row["engine"],
        "load": row["load"],
        "n": median["requests"],
        "failed": median.get("errors"),
        "tok/s": median["tokens_per_s"],
        "ours": row["ours_over_this"],
    }
    names = {"TTFT ms": "first_token_s", "token ms": "per_token_s", "burst ms": "per_burst_s"}
    for text, name in names.items():
        for p in ("p50", "p99"):
            columns[f"{text} {p}"] = scaled(median.get(name, {}).get(p), 1e3)
    return columns
