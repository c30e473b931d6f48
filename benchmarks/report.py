"""The tables on stdout."""

import textwrap
from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]


def table(columns: dict[str, Callable[[Any], Any]], rows: Iterable[Any]) -> str:
    """Align text, a column for each function of a row: names to the left, numbers to the right."""
    cells = [[str(cell(row)) for cell in columns.values()] for row in rows]
    lines = []
    for head, *column in zip(columns, *cells, strict=True):
        width = max(map(len, [head, *column]))
        named = any(cell[:1].isalpha() for cell in column)
        lines.append([f"{c:<{width}}" if named else f"{c:>{width}}" for c in (head, *column)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*lines, strict=True))


def number(value: float | None, scale: float = 1.0) -> str:
    """Return three digits or more of a number; nothing for None."""
    if value is None:
        return ""
    return f"{value * scale:,.0f}" if abs(value * scale) >= 100 else f"{value * scale:.3g}"


def times(ratio: float | None) -> str:
    """Return how many times as fast ours is; nothing for None."""
    return "" if ratio is None else f"{ratio:.2f}x"


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


def make_report(record: Record) -> str:
    """Return the report of `python -m benchmarks`."""
    limits, settings = record["limits"], record["settings"]
    rates = ", ".join(f"{d} {rate / 1e9:,.0f} GFLOP/s" for d, rate in limits["matmul"].items())
    parts = [
        f"{record['model']}: {record['shape']['parameters'] / 1e9:.3g}e9 parameters; "
        f"{device_name(record)}\n"
        f"limits: memory {limits['bandwidth'] / 1e9:.1f} GB/s; {rates}\n"
        f"medians of {settings['rounds']} rounds, in turns; {settings['new_tokens']} new tokens",
        _cases(record["cases"]),
        _engines(record["engines"]),
        "\n".join(
            f"{name}: tokens/s streamed are {row['stream_over_whole']:.3f} of those returned "
            f"whole, {row['stream_over_programs']:.3f} of the bare programs'"
            for name, row in record["streaming"].items()
        ),
        problems(record),
    ]
    return "\n\n".join(part for part in parts if part)


def _cases(rows: list[Record]) -> str:
    """Return a row for each case and engine; the last columns are how many times as fast ours is.

    `spread`: how far the rounds lie apart, as a share of the median.
    """
    columns = {
        "case": lambda row: row["op"],
        "batch": lambda row: row["batch"],
        "tokens": lambda row: f"{row['tokens']:,}",
        "engine": lambda row: row["engine"],
        "ms": lambda row: number(row["seconds"], 1e3),
        "tok/s": lambda row: number(row["tokens_per_s"]),
        "limit": lambda row: number(row["limit_tokens_per_s"]),
        "of limit": lambda row: f"{row['fraction_of_limit']:.0%}",
        "spread": lambda row: (
            f"{(max(row['rounds_s']) - min(row['rounds_s'])) / row['seconds']:.0%}"
        ),
    }
    for name in dict.fromkeys(name for row in rows for name in row["ours_over_this"]):
        columns[name] = lambda row, name=name: times(row["ours_over_this"].get(name))
    return table(columns, rows)


def _engines(engines: dict[str, Record]) -> str:
    columns = {
        "engine": lambda row: row[0],
        "load s": lambda row: number(row[1]["load_s"]),
        "compile s": lambda row: number(row[1].get("compile_cold_s")),
        "again s": lambda row: number(row[1].get("compile_warm_s")),
        "programs": lambda row: row[1].get("programs", ""),
        "weights GB": lambda row: number(row[1]["weights_bytes"], 1e-9),
        "cache GB": lambda row: number(row[1]["cache_bytes"], 1e-9),
        "peak GB": lambda row: number(
            row[1].get("device_bytes", row[1].get("process_bytes")), 1e-9
        ),
        "version": lambda row: row[1]["version"],
    }
    return table(columns, engines.items())


def make_serving_report(record: Record) -> str:
    """Return the report of `python -m benchmarks.serve`."""
    settings = record["settings"]
    head = [
        f"{record['model']}: {record['shape']['parameters'] / 1e9:.3g}e9 parameters; "
        f"{device_name(record)}",
        f"prompts of {settings['prompt_len']} tokens, {settings['new_tokens']} new ones, greedy; "
        f"medians of {settings['rounds']} rounds",
    ]
    for engine, about in record["engines"].items():
        alone = "" if about["batches"] else "; one request at a time"
        head.append(f"{engine}: prompts as {about['prompts']}{alone}")
    columns = {
        "engine": lambda row: row["engine"],
        "load": lambda row: row["load"],
        "n": lambda row: f"{row['median']['requests']:g}",
        "failed": lambda row: f"{row['median']['errors']:g}",
        "tok/s": lambda row: number(row["median"]["tokens_per_s"]),
    }
    names = {"TTFT ms": "first_token_s", "token ms": "per_token_s", "burst ms": "per_burst_s"}
    for text, name in names.items():
        for p in ("p50", "p99"):
            columns[f"{text} {p}"] = lambda row, n=name, p=p: number(row["median"][n][p], 1e3)
    columns["ours"] = lambda row: times(row["ours_over_this"])
    parts = ["\n".join(head), table(columns, record["points"])]
    parts += [
        f"{row['engine']}: {number(row['median']['tokens_per_s'])} tok/s as one batch, without a "
        f"server; the server reaches {number(row['server_over_batch'])} of it"
        for row in record["batches"]
    ]
    return "\n\n".join(part for part in [*parts, problems(record)] if part)
