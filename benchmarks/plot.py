# pyright: reportMissingImports=false
# (matplotlib comes with the bench extra, which type checks do not need)
"""The roofline: every case and engine under the two limits of the machine."""

import itertools
import math
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import offset_copy

from benchmarks.model_cost import matmul_limit
from benchmarks.report import device_name

Results = dict[str, Any]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Of Okabe and Ito: they can be told apart with any colour vision."""
MARKERS = "oDs^vPX"
INK, QUIET, LINE = "#222222", "#6b6b6b", "#b5b5b5"


def draw_roofline(results: Results, path: pathlib.Path) -> None:
    """Write the plot as a PNG.

    Args:
        results: of `make_results`.
        path: the file.
    """
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    groups = _groups(results["cases"])
    _draw_axes(axes, results)
    _draw_marks(axes, groups)
    _label_groups(axes, groups, results["limits"])
    _write_title(axes, results)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10, labelcolor=INK)
    figure.draw_without_rendering()  # lays it out: only now has the slope of the roof an angle
    _label_slope(axes, results["limits"]["bandwidth"])
    figure.savefig(path)


def _write_title(axes: Axes, results: Results) -> None:
    model, shape = results["model"], results["shape"]
    title = f"{model}, {shape['parameters'] / 1e9:.3g} billion parameters"
    axes.set_title(title, loc="left", pad=24, fontsize=14, fontweight="bold", color=INK)
    axes.annotate(
        f"{device_name(results)}. Medians of {results['settings']['rounds']} rounds; a line joins "
        "the contexts of one batch",
        (0, 1),
        xytext=(0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9.5,
        color=QUIET,
    )


def _groups(rows: list[Results]) -> dict[str, list[Results]]:
    """Gather the rows that one label names: a prompt, or a batch at all contexts."""
    groups: dict[str, list[Results]] = {}
    for row in rows:
        prefill = row["op"] == "prefill"
        name = f"prefill\n{row['tokens']:,}" if prefill else f"decode\nbatch {row['batch']}"
        groups.setdefault(name, []).append(row)
    return groups


def _draw_axes(axes: Axes, results: Results) -> None:
    """Set the scales; draw the roof of each dtype that ran, and its labels."""
    limits, rows = results["limits"], results["cases"]
    bandwidth = limits["bandwidth"]
    rates: dict[float, list[str]] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        rates.setdefault(matmul_limit(limits["matmul"], dtype), []).append(dtype)
    x = [row["flop_per_byte"] for row in rows]
    ridge = max(rates) / bandwidth
    left, right = min(*x, ridge) / 5, max(*x, ridge) * 20  # room for the labels of the roof
    bottom = min([left * bandwidth, *(row["flop_per_s"] for row in rows)]) / 2
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, max(rates) * 5))
    for rate in rates:
        roof = [left * bandwidth, rate, rate]
        axes.plot([left, rate / bandwidth, right], roof, color=INK, lw=1.4, zorder=1)
    axes.annotate(
        "\n".join(f"{', '.join(rates[r])}: {_flops(r)}FLOP/s" for r in sorted(rates, reverse=True)),
        (right, max(rates)),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    axes.set_xlabel("arithmetic intensity: FLOP per byte of weights and cache", color=INK)
    axes.set_ylabel("speed, FLOP/s", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _flops(value)))
    axes.grid(which="major", color="#ececec", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def _draw_marks(axes: Axes, groups: dict[str, list[Results]]) -> None:
    """Draw each engine's marks, next to each other where they would hide one another."""
    engines = list(dict.fromkeys(row["engine"] for rows in groups.values() for row in rows))
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    for place, (engine, (colour, marker)) in enumerate(zip(engines, looks, strict=False)):
        aside = offset_copy(
            axes.transData,
            axes.get_figure(root=True),
            x=3.5 * (place - (len(engines) - 1) / 2),
            units="points",
        )
        label = engine.replace(":", " ")
        for rows in groups.values():
            own = [row for row in rows if row["engine"] == engine]
            axes.plot(
                [row["flop_per_byte"] for row in own],
                [row["flop_per_s"] for row in own],
                color=colour,
                marker=marker,
                markersize=8,
                markeredgecolor="white",
                lw=1,
                transform=aside,
                label=label,
            )
            label = None  # one entry in the legend


def _label_groups(axes: Axes, groups: dict[str, list[Results]], limits: Results) -> None:
    """Name each group above the roof, with a line down to its marks; neighbours in two rows."""
    low, high = axes.get_xlim()
    # At the shortest context: there batches lie furthest apart.
    places = sorted(
        (max(row["flop_per_byte"] for row in rows), name) for name, rows in groups.items()
    )
    raised, before = False, -math.inf
    for x, name in places:
        across = math.log(x / low) / math.log(high / low)
        raised = across - before < 0.075 and not raised
        before = across
        roof = max(
            min(limits["bandwidth"] * x, matmul_limit(limits["matmul"], row["dtype"]))
            for row in groups[name]
        )
        speeds = [row["flop_per_s"] for row in groups[name] if row["flop_per_byte"] == x]
        top, bottom = max(roof, *speeds), min(speeds)
        axes.plot([x, x], [bottom, top], color=LINE, lw=0.7, zorder=0)
        axes.annotate(
            name,
            (x, top),
            xytext=(0, 52 if raised else 18),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": LINE, "lw": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def _label_slope(axes: Axes, bandwidth: float) -> None:
    """Write the bandwidth along the slope, at its foot."""
    left, _ = axes.get_xlim()
    foot, above = axes.transData.transform([(x, x * bandwidth) for x in (left, 2 * left)])
    axes.annotate(
        f"{bandwidth / 1e9:,.0f} GB/s",
        (left, left * bandwidth),
        xytext=(5, 8),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(above[1] - foot[1], above[0] - foot[0])),
        rotation_mode="anchor",
        fontsize=9,
        color=INK,
    )


def _flops(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
