"""Speed-up and efficiency over the number of devices, one curve per method, strategy and way of scaling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from tunemap.distributed.scaling import ScalingRow, scaling_curves
from tunemap.report.formats import records
from tunemap.report.scene import AXIS, FAILURE_COLOUR, PAPER, WIDTH, Row, Scene

DASHES: dict[str, Any] = {"ddp": "-", "fsdp": (0, (5, 2)), "hybrid": (0, (1.5, 1.5)), "single": "-"}
HEADROOM = 1.15  # of the highest value or ideal; intervals from two runs may reach ten times beyond
SIDE_STEP = 0.035  # of a doubling, between curves, so that intervals at one number of devices do not cover each other
MODES = {"weak": "each device keeps its batch (weak scaling)", "strong": "the global batch stays (strong scaling)"}
_POINT = ("model", "dataset", "method", "strategy", "gpus", "per_device_batch_size", "gradient_accumulation")

Curve = Sequence[ScalingRow]
Failed = Counter[tuple[Any, ...]]


def draw_scaling(scene: Scene) -> tuple[Figure, str, str] | None:
    """Two panels over the number of devices. None where no run on several devices has a baseline on one."""
    runs = records(scene.runs)
    curves = scaling_curves(runs)
    if not any(row.speed_up is not None and row.gpus > 1 for curve in curves for row in curve):
        return None
    failed = _failed(runs)
    labels = _labels(curves)
    devices = sorted({row.gpus for curve in curves for row in curve})
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * -(-len(curves) // 3)), layout="constrained")
    panels = [("Speed-up", "times one device", "speed_up", 1.0), ("Efficiency", "% of ideal", "efficiency", 100.0)]
    for axes, (title, unit, name, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        ideal = [factor if name == "efficiency" else count for count in devices]
        axes.plot(devices, ideal, "-", color=AXIS, linewidth=1, zorder=0)
        top = HEADROOM * max(*ideal, *(v * factor for curve in curves for row in curve if (v := getattr(row, name))))
        for index, curve in enumerate(curves):
            beside = 2 ** (SIDE_STEP * (index - (len(curves) - 1) / 2))
            _draw_curve(axes, scene, curve, name, factor, beside, top)
            _mark_failures(axes, [row for row in curve if failed[_point(row)]], name, factor, beside)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(devices))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, top)
        axes.set_xlabel("devices")
        axes.set_ylabel(unit)
        axes.set_title(title)
    handles = [Line2D([], [], markersize=5, **_style(scene, curve[0])) for curve in curves]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure, _caption(curves, failed), _in_words(curves, labels, failed)


def _failed(runs: Sequence[Row]) -> Failed:
    """How many runs of each point did not end well."""
    return Counter(tuple(run[name] for name in _POINT) for run in runs if run["outcome"] != "ok")


def _point(row: ScalingRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in _POINT)


def _style(scene: Scene, row: ScalingRow) -> dict[str, Any]:
    marker, colour = scene.markers[row.method], scene.colours[row.method]
    return {"marker": marker, "color": colour, "linestyle": DASHES[row.strategy], "linewidth": 1.4}


def _draw_curve(axes: Axes, scene: Scene, curve: Curve, name: str, factor: float, beside: float, top: float) -> None:
    """The points of a curve with their intervals; an arrow at `top` says that an interval goes on beyond it."""
    known = [row for row in curve if getattr(row, name) is not None]
    places = [row.gpus * beside for row in known]
    values = [getattr(row, name) * factor for row in known]
    style = _style(scene, curve[0])
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
    """Method and strategy, and of the rest what differs between curves; a number where that is not enough."""
    rest = [(curve[0].mode, curve[0].model, curve[0].dataset, _batch(curve[0])) for curve in curves]
    varying = [place for place in range(4) if len({parts[place] for parts in rest}) > 1]
    labels = [
        " · ".join([curve[0].method, curve[0].strategy, *(parts[place] for place in varying)])
        for curve, parts in zip(curves, rest, strict=True)
    ]
    return [
        f"{label} ({labels[:index].count(label) + 1})" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _batch(row: ScalingRow) -> str:
    """What stays along a curve: the batch of a device, or that of all."""
    batch = row.per_device_batch_size * row.gradient_accumulation
    return f"batch {batch} each" if row.mode == "weak" else f"batch {batch * row.gpus}"


def _caption(curves: Sequence[Curve], failed: Failed) -> str:
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
    crosses = sum(failed.values())
    return caption + (f" A cross marks points with runs that failed ({crosses} in all)." if crosses else "")


def _in_words(curves: Sequence[Curve], labels: Sequence[str], failed: Failed) -> str:
    words = [
        f"{label}: {', '.join(_point_in_words(row, failed[_point(row)]) for row in curve)}"
        for label, curve in zip(labels, curves, strict=True)
    ]
    return f"Speed-up and efficiency by number of devices. {'. '.join(words)}."


def _point_in_words(row: ScalingRow, failed: int) -> str:
    known = row.speed_up is not None and row.efficiency is not None
    value = f"{row.speed_up:.2f} and {100 * row.efficiency:.0f} %" if known else "unknown"  # type: ignore[operator]
    return f"{row.gpus} {value}" + (f" with {failed} failed" if failed else "")
