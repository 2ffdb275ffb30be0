"""Plots of one result file, as SVG text that fits a page in any size, light or dark.

Ink and grid take the page's colours (``currentColor``); all else is from a palette that colour-blind readers can tell
apart on white and on black. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tdeconv.bench.reports.ratios import (
    STAGES,
    counted,
    extra,
    label,
    milliseconds,
    network,
    number,
    order,
    pivot,
)
from tdeconv.bench.results import Row, counts

INK, GRID = "#010203", "#040506"  # stand-ins, replaced by the page's colours
WIDTH = 6.6  # inches
COLOURS = {
    "conv_bn_relu": "#8a8a8a",
    "conv_bn_relu_compiled": "#b9b9b9",
    "reference": "#cc79a7",
    "paper": "#e69f00",
    "torch": "#1f78c8",
    "torch stale": "#0b3c6b",
    "torch_compiled": "#7cc0ee",
    "torch_compiled stale": "#4b6f8c",
    "triton": "#009e73",
    "triton stale": "#004d38",
    "triton_compiled": "#6fd3b4",
    "triton_compiled stale": "#3f7f6c",
}
STAGE_COLOURS = {
    "patches": "#7cc0ee",
    "moments": "#1f78c8",
    "inverse_sqrt": "#d55e00",
    "fold": "#cc79a7",
    "convolve": "#8a8a8a",
    "rest": "#e69f00",
}
UNKNOWN = "#8a8a8a"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
}


def _svg(name: str, height: float, draw: Callable[[Any], None]) -> str:
    """Draw on a new figure, ``height`` in inches; ``name`` is what a screen reader says."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure((WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{escape(name)}"', svg, count=1)
    return _own_ids(svg).replace(INK, "currentColor").replace(GRID, "var(--grid, #ddd)").strip()


def _own_ids(svg: str) -> str:
    """Many plots share a page: ids that nothing refers to go, the others become this plot's own."""
    used, own = set(re.findall(r"#(\w+)", svg)), f"{zlib.crc32(svg.encode()):08x}"
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    return re.sub(r'(id="|url\(#|href="#)(\w+)', rf"\1\2-{own}", svg)


def _legend(figure: Any, names: Sequence[str], colours: Mapping[str, str]) -> None:
    handles = [Line2D([], [], marker="s", linestyle="", color=colours.get(n, UNKNOWN), label=label(n)) for n in names]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handletextpad=0.3)


def _bars(axes: Any, groups: Mapping[str, Mapping[str, float]], text: Callable[[float], str]) -> None:
    """Horizontal bars, one block for each group with the largest names beside it, values at the bars' ends."""
    largest = max(value for of in groups.values() for value in of.values())
    place, places = 0.0, {}
    bars: dict[str, list[tuple[float, float]]] = {}
    for name, of in groups.items():
        places[name] = place + (len(of) - 1) / 2
        for implementation, value in of.items():
            bars.setdefault(implementation, []).append((place, value))
            axes.text(value + 0.008 * largest, place, text(value), va="center", fontsize=7)
            place += 1
        place += 0.7
    for implementation, mine in bars.items():  # one call for all: a call for each bar takes seconds
        axes.barh(*zip(*mine, strict=True), height=0.86, color=COLOURS.get(implementation, UNKNOWN))
    axes.set_yticks(list(places.values()), list(places))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 1, -0.8)
    axes.set_xlim(0, 1.12 * largest)
    axes.grid(axis="y", visible=False)


def _ordered(values: Mapping[str, Mapping[str, float]], count: Mapping[str, int]) -> dict[str, dict[str, float]]:
    return {counted(case, dict(count)): {n: of[n] for n in order(of)} for case, of in values.items()}


def layer_bars(mine: Sequence[Row]) -> str:
    """Milliseconds of a training step (or, without any, of a forward), by layer or model and implementation."""
    kind = "step" if any(r["extra_info"]["kind"] == "step" for r in mine) else "forward"
    timed = [r for r in mine if r["extra_info"]["kind"] == kind]
    groups = _ordered(pivot(timed, milliseconds), counts(timed))
    names = order(n for of in groups.values() for n in of)
    bars = sum(len(of) + 0.7 for of in groups.values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _bars(axes, groups, number)
        axes.set_xlabel(f"{'training step' if kind == 'step' else 'forward in training'}, ms; shorter is better")
        _legend(figure, names, COLOURS)

    where = timed[0]["extra_info"]
    return _svg(f"Time by {where['suite']} of {where['network']}, {where['batch']}", 1.1 + 0.135 * bars, draw)


def stage_bars(mine: Sequence[Row]) -> str:
    """Milliseconds of a training step split by stage, forward and backward together, layer by layer."""
    count = counts(mine)
    sums: dict[str, dict[str, dict[str, float]]] = {}
    for row in mine:
        info = row["extra_info"]
        of = sums.setdefault(counted(info["case"], count), {}).setdefault(info["implementation"], {})
        of[info["stage"]] = of.get(info["stage"], 0.0) + max(0.0, milliseconds(row))
    stages = order((s for by_name in sums.values() for of in by_name.values() for s in of), STAGES)
    bars = sum(len(by_name) + 0.6 for by_name in sums.values())
    largest = max(sum(of.values()) for by_name in sums.values() for of in by_name.values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        place, labels = 0.0, {}
        bars: dict[str, list[tuple[float, float, float]]] = {stage: [] for stage in stages}
        for case, by_name in sums.items():
            for index, name in enumerate(order(by_name)):
                left = 0.0
                for stage in (s for s in stages if s in by_name[name]):
                    bars[stage].append((place, by_name[name][stage], left))
                    left += by_name[name][stage]
                axes.text(left + 0.008 * largest, place, number(left), va="center", fontsize=7)
                labels[place] = f"{case}, {label(name)}" if index == 0 else label(name)
                place += 1
            place += 0.6
        for stage, mine in bars.items():
            ys, widths, lefts = zip(*mine, strict=True)
            axes.barh(ys, widths, left=lefts, height=0.84, color=STAGE_COLOURS.get(stage, UNKNOWN))
        axes.set_yticks(list(labels), list(labels.values()))
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(place - 0.9, -0.8)
        axes.set_xlim(0, 1.12 * largest)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("training step, ms; shorter is better")
        _legend(figure, stages, STAGE_COLOURS)

    where = mine[0]["extra_info"]
    return _svg(f"Training step by stage, {where['network']}, {where['batch']}", 1.1 + 0.17 * bars, draw)


def memory_bars(memory: Sequence[Mapping[str, Any]]) -> str:
    """Megabytes an image that whole networks keep for backward, by batch."""
    groups: dict[str, dict[str, float]] = {}
    for row in memory:
        name = f"{network(row['model'])}, {row['dtype']}, batch {row['batch']}"
        groups.setdefault(name, {})[row["implementation"]] = row["saved_bytes"] / row["batch"] / 1e6
    groups = {name: {n: of[n] for n in order(of)} for name, of in groups.items()}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _bars(axes, groups, number)
        axes.set_xlabel("kept for backward, MB an image; shorter is better")
        _legend(figure, order(n for of in groups.values() for n in of), COLOURS)

    bars = sum(len(of) + 0.7 for of in groups.values())
    return _svg("Memory kept for backward", 1.1 + 0.15 * bars, draw)


# ---------------------------------------------------------------------------------------------------------- scaling


def scaling(fits: Sequence[Any], by: str) -> str | None:
    """Time against size on logarithmic axes: measured dots, fitted lines, predicted dashes; None without fits.

    ``fits`` are of :mod:`tdeconv.bench.scaling`; ``by`` is what tells the lines of a panel apart, ``"implementation"``
    or ``"stage"``.
    """
    axis_names = list(dict.fromkeys(f.axis for f in fits))
    colours = COLOURS if by == "implementation" else STAGE_COLOURS
    names = order((getattr(f, by) for f in fits), list(colours))
    lines = math.ceil(len(axis_names) / 2)

    def draw(figure: Any) -> None:
        panels = list(figure.subplots(lines, 2, squeeze=False).flat)
        for axes, axis in zip(panels, axis_names, strict=False):
            mine = [f for f in fits if f.axis == axis]
            for fit in mine:
                _power_law(axes, fit, colours.get(getattr(fit, by), UNKNOWN))
            _log_panel(axes, sorted({value for f in mine for value, _ in f.values}))
            axes.set(xlabel=axis, ylabel="ms")
        for axes in panels[len(axis_names) :]:
            axes.set_visible(False)
        _legend(figure, names, colours)

    return _svg(f"Time against size, by {by}", 0.6 + 2.1 * lines, draw) if fits else None


def _power_law(axes: Any, fit: Any, colour: str) -> None:
    """A fit's dots; its line, which as least squares goes through their centre; and the predicted slope there."""
    points = [(value, 1e3 * seconds) for value, seconds in fit.values if value > 0 and seconds > 0]
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, "o", color=colour, markersize=3.5)
    x0, y0 = (math.exp(sum(map(math.log, values)) / len(values)) for values in (xs, ys))
    ends = (min(xs), max(xs))
    for slope, line, width in ((fit.exponent, "-", 1.3), (fit.predicted, "--", 0.9)):
        if slope is not None:
            axes.plot(ends, [y0 * (x / x0) ** slope for x in ends], line, color=colour, linewidth=width)


def _log_panel(axes: Any, values: Sequence[float]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(values, [f"{v:g}" for v in values])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    _plain_log(axes.yaxis)


def _plain_log(axis: Any, text: Callable[[float], str] = "{:g}".format) -> None:
    """Few labels, as plain numbers, also where the axis spans less than a decade."""
    low, high = axis.get_view_interval()
    subs = (1.0,) if high > 1000 * low else (1.0, 3.0) if high > 30 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


# --------------------------------------------------------------------------------------------------------- roofline


def roofline(mine: Sequence[Row], ceilings: Mapping[str, Any]) -> str | None:
    """Operations a second against operations a byte: a dot for each layer and stage, a tick at its floor.

    None where no stage's operations, bytes and floor are known.
    """
    dots = [d for d in map(_dot, mine) if d]
    if not dots or not ceilings.get("memory"):
        return None
    dtype = mine[0]["extra_info"]["dtype"]
    peak = (ceilings.get("matmul") or {}).get(dtype)
    stages = order((d["stage"] for d in dots), STAGES)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log")
        for d in dots:
            colour = STAGE_COLOURS.get(d["stage"], UNKNOWN)
            axes.plot((d["x"], d["x"]), (d["y"], d["floor"]), color=colour, linewidth=0.5, alpha=0.55)
            axes.plot(d["x"], d["floor"], "_", color=colour, markersize=5, markeredgewidth=1)
            face = colour if d["forward"] else "none"
            axes.plot(d["x"], d["y"], "o", color=colour, markerfacecolor=face, markersize=4.5)
        _roofs(axes, [d["x"] for d in dots], ceilings["memory"], peak)
        axes.set(xlabel="operations a byte moved", ylabel="operations a second; higher is better")
        axes.set_title(_ceilings(ceilings["memory"], peak, dtype))
        _plain_log(axes.yaxis, _engineering)
        _plain_log(axes.xaxis)
        handles = [Line2D([], [], marker="o", linestyle="", color=STAGE_COLOURS[s], label=s) for s in stages]
        handles += [
            Line2D([], [], marker="o", linestyle="", color=INK, markerfacecolor="none", label="hollow: backward"),
            Line2D([], [], marker="_", linestyle="", color=INK, label="its floor"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handletextpad=0.3)

    where = mine[0]["extra_info"]
    return _svg(f"Roofline, {where['network']}, {where['implementation']}, {where['batch']}", 4.6, draw)


def _dot(row: Row) -> dict[str, Any] | None:
    info, seconds = row["extra_info"], row["stats"]["median"]
    operations, moved, floor = (extra(field)(row) for field in ("operations", "bytes", "floor_s"))
    if not operations or not moved or not floor or seconds <= 0:
        return None
    about = {"stage": info["stage"], "forward": info["direction"] == "forward"}
    return {**about, "x": operations / moved, "y": operations / seconds, "floor": operations / floor}


def _roofs(axes: Any, xs: Sequence[float], memory: float, peak: float | None) -> None:
    """The ceilings: memory's rises, arithmetic's is flat; they meet at the ridge."""
    low, high = min(xs) / 1.6, max(xs) * 1.6
    if peak is None:
        axes.plot((low, high), (memory * low, memory * high), color=INK, linewidth=1)
    else:
        ridge = peak / memory
        high = max(high, 1.6 * ridge)
        low = min(low, ridge / 6)
        axes.plot((low, ridge, high), (memory * low, peak, peak), color=INK, linewidth=1)
    axes.set_xlim(low, high)


def _ceilings(memory: float, peak: float | None, dtype: str) -> str:
    arithmetic = "" if peak is None else f" and {dtype} arithmetic, {_engineering(peak)}op/s"
    return f"lines: memory, {_engineering(memory)}B/s{arithmetic}"


def _engineering(value: float) -> str:
    """``1.5e11`` as ``150 G``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


# ----------------------------------------------------------------------------------------------------------- spread


def spread(mine: Sequence[Row]) -> str | None:
    """Every round's time over the median of its row, in the order of the rounds, by implementation.

    None where the file does not have the single rounds.
    """
    timed = [r for r in mine if r["extra_info"].get("kind") == "step" and r["stats"].get("data")]
    names = order(r["extra_info"]["implementation"] for r in timed)
    if not timed:
        return None

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, name in zip(panels, names, strict=True):
            mine = [r["stats"] for r in timed if r["extra_info"]["implementation"] == name]
            for index, stats in enumerate(mine):
                ys = [100 * (seconds / stats["median"] - 1) for seconds in stats["data"]]
                aside = 0.6 * ((index + 0.5) / len(mine) - 0.5)  # a round's dots beside each other
                axes.plot(
                    [n + aside for n in range(1, len(ys) + 1)],
                    ys,
                    "o",
                    color=COLOURS.get(name, UNKNOWN),
                    markersize=2.6,
                    alpha=0.7,
                )
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.set_title(label(name), fontsize=8, pad=2)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f}%" if value else "0%"))
        panels[-1].set_xlabel("round")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))

    where = timed[0]["extra_info"]
    name = f"Spread of the rounds, {where['suite']}, {where['network']}, {where['batch']}"
    return _svg(name, 0.6 + 0.72 * len(names), draw)
