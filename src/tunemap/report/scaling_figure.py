"""Speed-up and efficiency over the number of devices, one curve per method, strategy and way of scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from tunemap.distributed.scaling import ScalingRow, scaling_curves
from tunemap.report.formats import records
from tunemap.report.scene import AXIS, FAILURE_COLOUR, PAPER, WIDTH, Scene

DASHES: dict[str, Any] = {"ddp": "-", "fsdp": (0, (5, 2)), "hybrid": (0, (1.5, 1.5)), "single": "-"}
FILLS = ("full", "left", "bottom", "right", "top")  # of the markers of curves that share method and strategy
LEGEND_CHARACTERS = 96  # that a line of the legend holds, with 8 for each curve's handle and its distance
HEADROOM = 1.15  # of the highest value or ideal; intervals from two runs may reach ten times beyond
SIDE_STEP = 0.035  # of a doubling, between curves, so that intervals at one number of devices do not cover each other
MODES = {"weak": "each device keeps its batch (weak scaling)", "strong": "the global batch stays (strong scaling)"}

Curve = Sequence[ScalingRow]


def draw_scaling(scene: Scene) -> tuple[Figure, str, str] | None:
    """Two panels over the number of devices. None where no run on several devices has a baseline on one."""
    curves = scaling_curves(records(scene.runs))
    if not any(row.speed_up is not None and row.gpus > 1 for curve in curves for row in curve):
        return None
    labels, styles = _labels(curves), _styles(scene, curves)
    devices = sorted({row.gpus for curve in curves for row in curve})
    columns = max(1, min(3, LEGEND_CHARACTERS // max(len(label) + 8 for label in labels)))
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * -(-len(curves) // columns)), layout="constrained")
    panels = [("Speed-up", "times one device", "speed_up", 1.0), ("Efficiency", "% of ideal", "efficiency", 100.0)]
    for axes, (title, unit, name, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        ideal = [factor if name == "efficiency" else count for count in devices]
        axes.plot(devices, ideal, "-", color=AXIS, linewidth=1, zorder=0)
        top = HEADROOM * max(*ideal, *(v * factor for curve in curves for row in curve if (v := getattr(row, name))))
        for index, curve in enumerate(curves):
            beside = 2 ** (SIDE_STEP * (index - (len(curves) - 1) / 2))
            _draw_curve(axes, styles[index], curve, name, factor, beside, top)
            _mark_failures(axes, [row for row in curve if row.failed], name, factor, beside)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(devices))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, top)
        axes.set_xlabel("devices")
        axes.set_ylabel(unit)
        axes.set_title(title)
    handles = [Line2D([], [], markersize=5, **style) for style in styles]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure, _caption(curves), _in_words(curves, labels)


def _styles(scene: Scene, curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Colour and marker by method, dashes by strategy, and half markers where that is not enough."""
    pairs = [(curve[0].method, curve[0].strategy) for curve in curves]
    return [
        {
            "marker": scene.markers[method],
            "color": scene.colours[method],
            "linestyle": DASHES[strategy],
            "linewidth": 1.4,
            "fillstyle": FILLS[pairs[:index].count((method, strategy)) % len(FILLS)],
        }
        for index, (method, strategy) in enumerate(pairs)
    ]


def _draw_curve(
    axes: Axes, style: dict[str, Any], curve: Curve, name: str, factor: float, beside: float, top: float
) -> None:
    """The points of a curve with their intervals; an arrow at `top` says that an interval goes on beyond it."""
    known = [row for row in curve if getattr(row, name) is not None]
    places = [row.gpus * beside for row in known]
    values = [getattr(row, name) * factor for row in known]
    axes.plot(places, values, markersize=6, markeredgecolor=PAPER, mew=0.8, **style)
    for place, row in zip(places, known, strict=True):
        low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        if low is not None:
            ends = [low * factor, min(high * factor, top)]
            axes.plot([place, place], ends, "-", color=style["color"], linewidth=1.4)
            if high * factor > top:
                axes.plot([place], [top], "^", color=style["color"], markersize=6, clip_on=False)


def _mark_failures(axes: Axes, rows: Curve, name: str, factor: float, beside: float) -> None:
    """A cross on each point with a run that failed; at the foot where no run of it ended well."""
    for row in rows:
        value = getattr(row, name)
        height = 0.0 if value is None else value * factor
        axes.plot([row.gpus * beside], [height], "x", color=FAILURE_COLOUR, markersize=8, mew=1.8, clip_on=False)


def _labels(curves: Sequence[Curve]) -> list[str]:
    """What tells the curves apart, with the way of scaling where there are both."""
    both = len({curve[0].mode for curve in curves}) > 1
    return [f"{curve[0].curve} · {curve[0].mode}" if both else curve[0].curve for curve in curves]


def _caption(curves: Sequence[Curve]) -> str:
    rows = [row for curve in curves for row in curve]
    modes = [meaning for mode, meaning in MODES.items() if any(row.mode == mode for row in rows)]
    counts = sorted({row.runs for row in rows if row.runs})
    repeats = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = (
        f"Real tokens per second against one device of the same strategy; {', or '.join(modes)}. Ratio of geometric "
        f"means with its 95 % interval, n = {repeats} runs per point; without a line there are too few runs for an "
        "interval. Grey is ideal. Curves stand a little beside each other."
    )
    frame = HEADROOM * max([*(row.gpus for row in rows), *(row.speed_up for row in rows if row.speed_up)])
    if any(row.speed_up_high is not None and row.speed_up_high > frame for row in rows):
        caption += " An arrow at the top: the interval goes on beyond the frame; more seeds would narrow it."
    crosses = sum({row.run_ids: row.failed for row in rows}.values())  # a point may be on a curve of either way
    return caption + (f" A cross marks points with runs that failed ({crosses} in all)." if crosses else "")


def _in_words(curves: Sequence[Curve], labels: Sequence[str]) -> str:
    words = [
        f"{label}: {', '.join(_point_in_words(row) for row in curve)}"
        for label, curve in zip(labels, curves, strict=True)
    ]
    return f"Speed-up and efficiency by number of devices. {'. '.join(words)}."


def _point_in_words(row: ScalingRow) -> str:
    known = row.speed_up is not None and row.efficiency is not None
    value = f"{row.speed_up:.2f} and {100 * row.efficiency:.0f} %" if known else "unknown"  # type: ignore[operator]
    return f"{row.gpus} {value}" + (f" with {row.failed} failed" if row.failed else "")
