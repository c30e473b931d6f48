"""A choice's table on stdout."""

import textwrap
from typing import Any

from benchmarks.report import table

Row = dict[str, Any]


def make_table(rows: list[Row]) -> str:
    """Return a choice's rows as aligned text, and below why some were not measured."""
    shown = [row for row in rows if row["seconds"] is not None or row["amounts"]]
    parts = [_timed(shown)] if any(row["seconds"] for row in shown) else []
    parts += [_counted(row) for row in shown if row["amounts"]]
    return "\n".join([*parts, *_reasons(rows)])


def _timed(rows: list[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row["case"]))
    lines = [
        [
            *(str(row["case"].get(key, "")) for key in keys),
            row["form"],
            f"{row['seconds'] * 1e3:,.3f}",
            _rate(row),
            "" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.0%}",
            "best" if row["best"] else "",
        ]
        for row in rows
    ]
    head = [*keys, "form", "ms", "rate", "of limit", ""]
    group = len(keys) if any(row["best"] for row in rows) else 0
    return table(head, lines, left=(len(keys),), group=group)


def _rate(row: Row) -> str:
    """Return tokens/s where there are tokens, else what bounds it: bytes/s or FLOP/s."""
    if row["tokens_per_s"] is not None:
        return f"{row['tokens_per_s']:,.1f} tok/s"
    if row["bytes_per_s"] is None:
        return ""
    if row["memory_bound"]:
        return f"{row['bytes_per_s'] / 1e9:,.1f} GB/s"
    return f"{row['flop_per_s'] / 1e12:,.2f} TFLOP/s"


def _counted(row: Row) -> str:
    amounts = "  ".join(f"{name} {value:,}" for name, value in row["amounts"].items())
    title = " ".join([*map(str, row["case"].values()), row["form"]])
    return textwrap.fill(f"{title}: {amounts}", 100, subsequent_indent="  ")


def _reasons(rows: list[Row]) -> list[str]:
    """Name what was not measured: ways with one reason together."""
    ways: dict[str, list[str]] = {}
    for row in rows:
        told = " ".join([*map(str, row["case"].values()), row["form"]])
        for kind, reason in (("failed", row["failed"]), ("not measured", row["skipped"])):
            if reason is not None:
                ways.setdefault(f"{kind}: {reason}", []).append(told)
    return [
        textwrap.fill(f"{reason} ({_some(told)})", 100, subsequent_indent="  ")
        for reason, told in ways.items()
    ]


def _some(names: list[str], most: int = 8) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more
