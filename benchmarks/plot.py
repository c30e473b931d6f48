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

from benchmarks.model_cost import matmul_limit
from benchmarks.report import device_name

Record = dict[str, Any]

MARKERS = "oDs^vPX*d<>"


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
        ax.grid(color="#ececec")
        ax.set_axisbelow(True)
    figure.suptitle(f"{record['model']}: {device_name(record)}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _roofline(axes: Axes, record: Record) -> None:
    """Draw every case and engine under the limits; a line joins the contexts of one batch."""
    limits, rows = record["limits"], record["cases"]
    rates = {matmul_limit(limits["matmul"], row["dtype"]) for row in rows}
    x = [row["flop_per_byte"] for row in rows] + [rate / limits["bandwidth"] for rate in rates]
    for rate in rates:
        ridge = rate / limits["bandwidth"]
        roof = [min(x) / 3 * limits["bandwidth"], rate, rate]
        axes.plot([min(x) / 3, ridge, max(x) * 3], roof, color="black", lw=1)
    for number, engine in enumerate(dict.fromkeys(row["engine"] for row in rows)):
        look: dict[str, Any] = {"color": f"C{number}", "marker": MARKERS[number]}
        own = [row for row in rows if row["engine"] == engine]
        for _, group in itertools.groupby(own, key=lambda row: (row["op"], row["batch"])):
            points = [(row["flop_per_byte"], row["flop_per_s"]) for row in group]
            axes.plot(*zip(*points, strict=True), lw=1, **look)
        axes.plot([], [], label=engine, **look)
    fastest: dict[str, Record] = {}
    for row in sorted(rows, key=lambda row: row["flop_per_s"]):
        fastest[f"{row['op']} {row['tokens' if row['op'] == 'prefill' else 'batch']:,}"] = row
    for name, row in fastest.items():
        axes.annotate(f"  {name}", (row["flop_per_byte"], row["flop_per_s"]), va="center")
    axes.set_title("prefill N: a prompt of N tokens; decode N: a batch of N")
    axes.set(xscale="log", yscale="log", ylabel="FLOP/s")
    axes.set_xlabel("FLOP per byte of weights and cache")


def _curves(record: Record) -> dict[str, list[Record]]:
    """Return the closed loops of each engine and number of slots, by rising clients."""
    curves: dict[str, list[Record]] = {}
    for row in sorted(record["points"], key=lambda row: row["amount"]):
        if row["kind"] == "closed":
            curves.setdefault(f"{row['engine']}, slots: {row['slots']}", []).append(row)
    return curves


def _throughput(axes: Axes, record: Record) -> None:
    """Draw tokens/s; dashed: the same requests as one batch, without a server."""
    for number, (name, rows) in enumerate(_curves(record).items()):
        rates = [row["median"]["tokens_per_s"] for row in rows]
        axes.plot([row["amount"] for row in rows], rates, marker=MARKERS[number], label=name)
        for batch in record["batches"]:
            if name == f"{batch['engine']}, slots: {batch['slots']}":
                axes.axhline(batch["median"]["tokens_per_s"], color=f"C{number}", ls="--", lw=1)
    axes.set(xscale="log", xlabel="clients", ylim=(0, None))
    axes.set_title("output, tokens/s (dashed: as one batch, without a server)", fontsize=10)


def _first_token(axes: Axes, record: Record) -> None:
    """Draw the median, and a band up to the 99th percentile."""
    for number, rows in enumerate(_curves(record).values()):
        x = [row["amount"] for row in rows]
        ttft = [row["median"]["first_token_s"] for row in rows]
        p50, p99 = ([spread[p] or float("nan") for spread in ttft] for p in ("p50", "p99"))
        axes.plot(x, p50, marker=MARKERS[number])
        axes.fill_between(x, p50, p99, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="clients")
    axes.set_title("TTFT, s (band: to p99)", fontsize=10)


def _waits(axes: Axes, record: Record) -> None:
    """Draw each wait of the first round's streams; grey: a long prompt is prefilled."""
    row = (record.get("prefill_interference") or record["gaps"])[0]
    figures, median = row["rounds"][0], row["median"]
    waits = figures.get("waits", figures.get("gaps"))
    for begin, end in figures["admissions"]:
        axes.axvspan(begin, end, color="#e0e0e0")
    axes.plot([b for b, _ in waits], [1e3 * s for _, s in waits], ".")
    axes.axhline(1e3 * figures["idle_s"]["p50"], color="gray", ls=":")
    title = (
        f"waits of {median['streams']:g} streams for their next burst, ms\ndotted: idle median; "
    )
    title += f"grey: a prompt of {median['long_prompt']:,g} tokens is prefilled"
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="s", ylim=(0, None))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = pathlib.Path(argument)
        draw(json.loads(path.read_text("utf-8"))).savefig(path.with_suffix(".png"))
