# pyright: reportMissingImports=false
# (matplotlib comes with the bench extra, which type checks do not need)
"""The plots: a roofline; throughput and TTFT by load; the waits of streams beside a long prompt.

python -m benchmarks.plot RECORD.json ... draws the plots of records anew, as RECORD.png.
"""

import itertools
import json
import pathlib
import sys
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.model_cost import matmul_limit
from benchmarks.report import device_name

Record = dict[str, Any]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Of Okabe and Ito: distinguishable with any colour vision."""
MARKERS = "oDs^vPX"


def draw(record: Record) -> Figure:
    """Return the plot of a record of any of the commands."""
    panels = [_roofline] if "cases" in record else []
    panels += [_throughput, _first_token] if record.get("points") else []
    # Records of an earlier version hold the waits of streams as `gaps`, beside the loads.
    panels += [_waits] if record.get("prefill_interference") or record.get("gaps") else []
    width = 10 if len(panels) == 1 else 5 * len(panels)
    figure = Figure(figsize=(width, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, record)
        ax.grid(which="major", color="#ececec", lw=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['model']}: {device_name(record)}", x=0.01, ha="left")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _looks(names: list[Any]) -> dict[Any, dict[str, Any]]:
    """Return a colour and a marker for each name."""
    looks = zip(dict.fromkeys(names), itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    return {n: {"color": c, "marker": m, "markeredgecolor": "white"} for n, c, m in looks}


def _roofline(axes: Axes, record: Record) -> None:
    """Draw every case and engine under the limits; a line joins the contexts of one batch."""
    limits, rows = record["limits"], record["cases"]
    x = [row["flop_per_byte"] for row in rows]
    rates: dict[float, list[str]] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        rates.setdefault(matmul_limit(limits["matmul"], dtype), []).append(dtype)
    left, right = min(x) / 3, max(*x, max(rates) / limits["bandwidth"]) * 3
    for rate in rates:
        roof = [left * limits["bandwidth"], rate, rate]
        ridge = rate / limits["bandwidth"]
        axes.plot([left, ridge, right], roof, color="#222222", lw=1.2, zorder=1)
    for engine, look in _looks([row["engine"] for row in rows]).items():
        own = [row for row in rows if row["engine"] == engine]
        for key, group in itertools.groupby(own, key=lambda row: (row["op"], row["batch"])):
            points = [(row["flop_per_byte"], row["flop_per_s"]) for row in group]
            label = engine.replace(":", " ") if key == (own[0]["op"], own[0]["batch"]) else None
            axes.plot(*zip(*points, strict=True), lw=1, label=label, **look)
    names: dict[str, Record] = {}
    for row in rows:  # one label for each prompt and each batch, beside the fastest engine
        name = f"{row['op']} {row['tokens' if row['op'] == 'prefill' else 'batch']:,}"
        if name not in names or row["flop_per_s"] > names[name]["flop_per_s"]:
            names[name] = row
    for name, row in names.items():
        place = (row["flop_per_byte"], row["flop_per_s"])
        axes.annotate(name, place, xytext=(8, 0), textcoords="offset points", va="center")
    roofs = [f"{', '.join(dtypes)} {rate / 1e9:,.0f} GFLOP/s" for rate, dtypes in rates.items()]
    title = "; ".join([f"limits: memory {limits['bandwidth'] / 1e9:,.1f} GB/s", *roofs])
    axes.set_title(f"{title}\nprefill N: a prompt of N tokens; decode N: a batch of N", loc="left")
    axes.set(xscale="log", yscale="log", ylabel="FLOP/s")
    axes.set_xlabel("FLOP per byte of weights and cache")


def _curves(record: Record) -> dict[tuple[str, int], list[Record]]:
    """Return the closed loops of each engine and number of slots, by rising clients."""
    curves: dict[tuple[str, int], list[Record]] = {}
    for row in sorted(record["points"], key=lambda row: row["amount"]):
        if row["kind"] == "closed":
            curves.setdefault((row["engine"], row["slots"]), []).append(row)
    return curves


def _by_clients(axes: Axes, record: Record, title: str) -> None:
    ticks = sorted({row["amount"] for row in record["points"] if row["kind"] == "closed"})
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("clients")


def _throughput(axes: Axes, record: Record) -> None:
    """Draw tokens/s; dashed: the same requests as one batch, without a server."""
    curves = _curves(record)
    for (engine, slots), look in _looks(list(curves)).items():
        rows = curves[engine, slots]
        rates = [row["median"]["tokens_per_s"] for row in rows]
        label = f"{engine.replace(':', ' ')}, slots: {slots}"
        axes.plot([row["amount"] for row in rows], rates, label=label, **look)
        for batch in record["batches"]:
            if (batch["engine"], batch["slots"]) == (engine, slots):
                rate = batch["median"]["tokens_per_s"]
                axes.axhline(rate, color=look["color"], ls="--", lw=1)
    axes.set_ylim(bottom=0)
    _by_clients(axes, record, "output, tokens/s (dashed: as one batch, without a server)")


def _first_token(axes: Axes, record: Record) -> None:
    """Draw the median, and a band up to the 99th percentile."""
    curves = _curves(record)
    for name, look in _looks(list(curves)).items():
        x = [row["amount"] for row in curves[name]]
        ttft = [row["median"]["first_token_s"] for row in curves[name]]
        p50, p99 = ([spread[p] or float("nan") for spread in ttft] for p in ("p50", "p99"))
        axes.plot(x, p50, **look)
        axes.fill_between(x, p50, p99, color=look["color"], alpha=0.15, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _by_clients(axes, record, "TTFT, s (band: to p99)")


def _waits(axes: Axes, record: Record) -> None:
    """Draw each wait of the first round's streams; grey: a long prompt is prefilled."""
    row = (record.get("prefill_interference") or record["gaps"])[0]
    figures, median = row["rounds"][0], row["median"]
    waits = figures.get("waits", figures.get("gaps"))
    for begin, end in figures["admissions"]:
        axes.axvspan(begin, end, color="#b5b5b5", alpha=0.35, lw=0)
    axes.plot([b for b, _ in waits], [1e3 * s for _, s in waits], ".", ms=4, color=COLOURS[0])
    axes.axhline(1e3 * figures["idle_s"]["p50"], color="#6b6b6b", lw=0.8, ls=":")
    title = f"waits of {median['streams']} streams for their next burst, ms\ndotted: idle median; "
    title += f"grey: a prompt of {median['long_prompt']:,} tokens is prefilled"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("s")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = pathlib.Path(argument)
        draw(json.loads(path.read_text("utf-8"))).savefig(path.with_suffix(".png"))
