# pyright: reportMissingImports=false
# (matplotlib comes with the bench extra, which type checks do not need)
"""Throughput and first token's wait by load or by slots; streams' waits beside a long prompt."""

import itertools
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.plot import COLOURS, INK, LINE, MARKERS, QUIET

Record = dict[str, Any]
Look = dict[str, Any]


def draw_serving(record: Record) -> Figure:
    """Draw the panels of a record of `make_record`.

    Along the slots where one load was measured at several numbers of them, else along the clients.
    """
    gaps = [row for row in record["gaps"] if row["rounds"][0].get("gaps")]
    figure = Figure(figsize=(12 if gaps else 9, 5), dpi=150, layout="constrained")
    axes = figure.subplots(1, 3 if gaps else 2)
    looks = _looks(record)
    closed = [row for row in record["points"] if row["kind"] == "closed"]
    slots, loads = ({row[name] for row in closed} for name in ("slots", "amount"))
    along = "slots" if len(loads) == 1 < len(slots) else "amount"
    shown = [r for r in closed if along == "slots" or r["slots"] in (1, max(slots))]
    _draw_throughput(axes[0], shown, record["batches"], looks, along)
    _draw_first_token(axes[1], shown, looks, along)
    for row in gaps[:1]:
        _draw_gaps(axes[2], row, looks[row["engine"], row["slots"]])
    settings, machine = record["settings"], record["machine"]
    figure.suptitle(
        f"{record['model']}: {machine['cpu']}, {machine['cores']} cores; prompts of "
        f"{settings['prompt_len']} tokens, {settings['new_tokens']} new ones",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        labelcolor=INK,
    )
    return figure


def _looks(record: Record) -> dict[tuple[str, int | None], Look]:
    """Return each engine's look at each number of slots, and that of its curve over them."""
    names = dict.fromkeys((row["engine"], row["slots"]) for row in record["points"])
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    known: dict[tuple[str, int | None], Look] = {}
    for name, (colour, marker) in zip(names, looks, strict=False):
        known[name] = {"color": colour, "marker": marker, "markeredgecolor": "white"}
        known.setdefault((name[0], None), known[name])
    return known


def _curves(rows: list[Record], along: str) -> dict[tuple[str, int | None], list[Record]]:
    """Return each curve's rows in order: an engine's, and unless it is drawn by slots, for each."""
    curves: dict[tuple[str, int | None], list[Record]] = {}
    for row in sorted(rows, key=lambda row: row[along]):
        slots = None if along == "slots" else row["slots"]
        curves.setdefault((row["engine"], slots), []).append(row)
    return curves


def _draw_throughput(
    axes: Axes, rows: list[Record], batches: list[Record], looks: dict, along: str
) -> None:
    """Draw it, and dashed what the same requests are as one batch, without a server."""
    for name, curve in _curves(rows, along).items():
        engine, slots = name
        of_slots = f", {slots} slot{'s' * (slots > 1)}" if slots else ""
        axes.plot(
            [row[along] for row in curve],
            [row["median"]["tokens_per_s"] for row in curve],
            label=engine.replace(":", " ") + of_slots,
            **looks[name],
        )
        own = [row for row in batches if row["engine"] == engine and slots in (None, row["slots"])]
        rates = {row["slots"]: row["median"]["tokens_per_s"] for row in own}
        dashed: Look = {"color": looks[name]["color"], "lw": 1, "ls": (0, (4, 3)), "zorder": 0}
        called: Look = {"textcoords": "offset points", "fontsize": 8, "color": dashed["color"]}
        if along == "slots" and rates:
            axes.plot(sorted(rates), [rates[n] for n in sorted(rates)], **dashed)
            middle = sorted(rates)[len(rates) // 2]
            place = (middle, rates[middle])
            axes.annotate("as one batch", place, xytext=(-4, 4), ha="right", **called)
        elif rates:
            axes.axhline(rates[slots], **dashed)
            place = (0, rates[slots])
            across = ("axes fraction", "data")
            axes.annotate("as one batch", place, xycoords=across, xytext=(6, 3), **called)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a batch's name is above its line
    _style(axes, "output, tokens/s")
    _by_powers(axes, rows, along)


def _draw_first_token(axes: Axes, rows: list[Record], looks: dict, along: str) -> None:
    """Draw the median, and a band up to the 99th percentile."""
    for name, curve in _curves([r for r in rows if r["median"]["tokens"]], along).items():
        x = [row[along] for row in curve]
        first = [row["median"]["first_token_s"] for row in curve]
        p50, p99 = ([spread[p] for spread in first] for p in ("p50", "p99"))
        axes.plot(x, p50, **looks[name])
        axes.fill_between(x, p50, p99, color=looks[name]["color"], alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _style(axes, "wait for the first token, s (band: to p99)")
    _by_powers(axes, rows, along)


def _draw_gaps(axes: Axes, row: Record, look: Look) -> None:
    figures = row["rounds"][0]
    for begin, end in figures["admissions"]:
        axes.axvspan(begin, end, color=LINE, alpha=0.35, lw=0)
    axes.plot(
        [begin for begin, _ in figures["gaps"]],
        [1e3 * seconds for _, seconds in figures["gaps"]],
        ls="",
        marker=".",
        ms=4,
        color=look["color"],
    )
    idle = 1e3 * figures["idle_s"]["p50"]
    for factor in (1, 3):
        axes.axhline(factor * idle, color=QUIET, lw=0.8, ls=":")
    axes.annotate("3 x", (0, 3 * idle), xytext=(2, 2), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
    title = f"waits of {figures['streams']} streams for a burst, ms\n"
    _style(axes, f"{title}grey: a prompt of {figures['long_prompt']:,} is read")
    axes.set_xlabel("s", color=INK)


def _by_powers(axes: Axes, rows: list[Record], along: str) -> None:
    label = "clients" if along == "amount" else f"slots, of {rows[0]['amount']} clients"
    axes.set_xlabel(label, color=INK)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[along] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(which="major", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
