"""The table on stdout: every case and engine against the machine's limit and each other."""

import textwrap
from typing import Any

Results = dict[str, Any]


def make_report(results: Results) -> str:
    """Return the whole report as text, lines of at most 100 columns where names are short."""
    parts = [_head(results)]
    prefill = [row for row in results["cases"] if row["op"] == "prefill"]
    decode = [row for row in results["cases"] if row["op"] == "decode"]
    ours = list(dict.fromkeys(r["engine"] for r in results["cases"] if r["engine"][:5] == "ours:"))
    has_peers = any(row["ours_over_this"] for row in results["cases"])
    ratios = ours if has_peers else []
    if prefill:
        parts.append("Time to first token, batch 1\n" + _prefill_table(prefill, ratios))
    if decode:
        parts.append(
            f"Decode, {decode[0]['new_tokens']} tokens a row, greedy\n"
            + _decode_table(decode, ratios)
        )
    if ratios:
        parts.append(
            "Columns of ours: how many times as fast as that row's engine; the median of the "
            "ratios\nof single rounds."
        )
    parts += [_engine_table(results), _streaming(results), _problems(results)]
    return "\n\n".join(part for part in parts if part)


def _head(results: Results) -> str:
    limits, shape = results["limits"], results["shape"]
    rates = ", ".join(f"{dtype} {_si(rate)}FLOP/s" for dtype, rate in limits["matmul"].items())
    turns = "in turns" if results["interleaved"] else "one engine after the other (memory)"
    return "\n".join(
        [
            f"{results['model']}: {shape['parameters'] / 1e9:.3g}e9 parameters, "
            f"{shape['num_layers']} layers, dim {shape['dim']}",
            device_name(results),
            f"limits: memory {limits['bandwidth'] / 1e9:.1f} GB/s; {rates}",
            f"medians of {results['settings']['rounds']} rounds, {turns}",
        ]
    )


def device_name(results: Results) -> str:
    """Return what was measured on: the processor and its cores, or the accelerator."""
    machine, limits = results["machine"], results["limits"]
    on_cpu = limits["backend"] == "cpu"
    return f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else limits["device"]


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _spread(row: Results) -> str:
    """Return how far the rounds lie apart, as a share of the median."""
    rounds = row["rounds_s"]
    return f"{(max(rounds) - min(rounds)) / row['seconds']:.0%}"


def _ratios(row: Results, ours: list[str]) -> list[str]:
    return [f"{row['ours_over_this'][o]:.2f}x" if o in row["ours_over_this"] else "" for o in ours]


def _prefill_table(rows: list[Results], ours: list[str]) -> str:
    head = ["prompt", "engine", "ms", "tok/s", "limit ms", "of limit", "spread", *ours]
    lines = [
        [
            f"{row['tokens']:,}",
            row["engine"],
            f"{row['seconds'] * 1e3:,.1f}",
            _rate(row["tokens_per_s"]),
            f"{row['limit_s'] * 1e3:,.1f}",
            f"{row['fraction_of_limit']:.0%}",
            _spread(row),
            *_ratios(row, ours),
        ]
        for row in rows
    ]
    return table(head, lines, left=(1,), group=1)


def _decode_table(rows: list[Results], ours: list[str]) -> str:
    head = ["batch", "context", "engine", "tok/s", "limit", "of limit", "spread", *ours]
    lines = [
        [
            str(row["batch"]),
            f"{row['tokens']:,}",
            row["engine"],
            _rate(row["tokens_per_s"]),
            _rate(row["limit_tokens_per_s"]),
            f"{row['fraction_of_limit']:.0%}",
            _spread(row),
            *_ratios(row, ours),
        ]
        for row in rows
    ]
    return table(head, lines, left=(2,), group=2)


def _engine_table(results: Results) -> str:
    head = ["engine", "load s", "compile s", "again s", "programs", "weights + cache", "peak GB"]
    lines = []
    for name, about in results["engines"].items():
        peak = about.get("device_bytes", about.get("process_bytes"))
        lines.append(
            [
                name,
                f"{about['load_s']:.1f}",
                _optional(about.get("compile_cold_s"), "{:.1f}"),
                _optional(about.get("compile_warm_s"), "{:.1f}"),
                _optional(about.get("programs") and len(about["programs"]), "{}"),
                f"{about['weights_bytes'] / 1e9:.2f} + {about['cache_bytes'] / 1e9:.2f}",
                _optional(peak and peak / 1e9, "{:.2f}"),
            ]
        )
    versions = [f"{name}: {about['version']}" for name, about in results["engines"].items()]
    return "\n".join(
        [
            "Engines",
            table(head, lines, left=(0,), group=0),
            "compile: for a first request, in a fresh process; again: in a second one, which finds",
            "the first one's programs in JAX's cache",
            *versions,
        ]
    )


def _optional(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def _streaming(results: Results) -> str:
    return "\n".join(
        f"{name}: tokens/s streamed are {ratios['stream_over_whole']:.3f} of those returned whole, "
        f"{ratios['stream_over_programs']:.3f} of the bare programs'"
        for name, ratios in results["streaming"].items()
    )


def _problems(results: Results) -> str:
    """Name what was not measured: cases with one reason together."""
    cases: dict[tuple[str, str], list[str]] = {}
    for skip in results["skipped"]:
        cases.setdefault((skip["engine"], skip["reason"]), []).append(skip["case"])
    lines = [
        f"not measured: {engine}, {'; '.join(names)}: {reason}"
        for (engine, reason), names in cases.items()
    ]
    lines += [f"failed: {text}" for text in results["failures"]]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in lines)


def table(
    head: list[str], lines: list[list[str]], *, left: tuple[int, ...] = (), group: int = 0
) -> str:
    """Align columns of text.

    Args:
        head: their names.
        lines: of as many cells.
        left: columns aligned to the left; the others are to the right.
        group: leading columns left empty where they repeat the line above; with any, a blank line
            stands between groups.
    """
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = []
    above: list[str] = []
    for line in [head, *lines]:
        repeats = bool(group) and line[:group] == above
        if group and text and not repeats:
            text.append("")
        cells = ["" if repeats and i < group else cell for i, cell in enumerate(line)]
        text.append(
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
        )
        above = line[:group]
    return "\n".join(text)
