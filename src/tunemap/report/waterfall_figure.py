"""Why points differ: step time and peak memory from the baseline to each other point, part by part."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tunemap.report.formats import signed
from tunemap.report.point_figures import PARTS
from tunemap.report.scene import AXIS, INK, WIDTH, Row, Scene

MOST_POINTS = 4
STEP_PARTS = {
    "data_time_mean_s": "data",
    "forward_time_mean_s": "forward",
    "backward_time_mean_s": "backward",
    "optimizer_time_mean_s": "optimizer",
}
MEMORY_PARTS = {name: word for name, (word, _) in PARTS.items()}
CHANGE = "#6b7280"  # no method has a grey; full where it adds to the point before, hollow where it takes away
MORE: dict[str, Any] = {"facecolor": CHANGE, "linewidth": 0}
LESS: dict[str, Any] = {"facecolor": "none", "edgecolor": CHANGE, "linewidth": 1}


def draw_waterfall(scene: Scene) -> tuple[Figure, str, str] | None:
    """Two panels, milliseconds of a step and bytes of the peak, each a chain of points in the plan's order.

    The baseline comes first. None where fewer than two points of a model and dataset have both breakdowns.
    """
    chain = _chain(scene)
    if len(chain) < 2:
        return None
    unit, size = ("GiB", 2**30) if max(p["peak_allocated_bytes"] for p in chain) >= 2 * 2**30 else ("MiB", 2**20)
    panels: list[tuple[str, str, dict[str, str], float]] = [
        ("Time of a step", "ms", STEP_PARTS, 1e3),
        ("Peak memory of training", unit, MEMORY_PARTS, 1 / size),
    ]
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    words = []
    for axes, (title, of, parts, factor) in zip(figure.subplots(2, 1), panels, strict=True):
        words.append(f"{title} in {of}: {_draw(axes, scene, chain, parts, factor)}")
        axes.set_title(title)
        axes.set_ylabel(of)
    handles = [Patch(**style) for style in (MORE, LESS)]
    figure.legend(handles, ["more than the point before", "less"], loc="outside lower center", ncols=2)
    caption = (
        f"From {chain[0]['point']} part by part to {', '.join(point['point'] for point in chain[1:])}: means over "
        f"n = {', '.join(str(point['seeds']) for point in chain)} seeds, measured without a profiler. A change of at "
        "least 2 % of the highest bar has its number. Phases are means over all measured steps, so that few slow "
        "steps weigh in."
    )
    left_out = len([point for point in scene.trained if point["seeds"]]) - len(chain)
    if left_out:
        caption += f" {left_out} more points are in the table."
    return figure, caption, ". ".join(words) + "."


def _chain(scene: Scene) -> list[Row]:
    """The baseline of the first place that has one, then the other points of that place with both breakdowns."""
    for place, points in scene.places().items():
        whole = [point for point in points if _has(point, STEP_PARTS) and _has(point, MEMORY_PARTS)]
        baseline = scene.baselines.get(place)
        whole.sort(key=lambda point: point["point"] != baseline)  # stable: the others keep their order
        if len(whole) > 1:
            return whole[:MOST_POINTS]
    return []


def _has(point: Row, parts: dict[str, str]) -> bool:
    return all(point[name] is not None for name in parts)


def _draw(axes: Axes, scene: Scene, chain: list[Row], parts: dict[str, str], factor: float) -> str:
    """Total bars of the points and floating bars of the changes between them; returns the totals in words."""

    def total(point: Row) -> float:
        return sum(point[name] for name in parts) * factor

    highest = max(total(point) for point in chain)
    at, labels, words = 0, [], []
    for index, point in enumerate(chain):
        if index:
            level = total(chain[index - 1])
            for name, word in parts.items():
                change = (point[name] - chain[index - 1][name]) * factor
                style = MORE if change > 0 else LESS
                axes.bar(at, abs(change), bottom=min(level, level + change), width=0.72, **style)
                axes.plot([at - 0.86, at + 0.36], [level, level], "-", color=AXIS, linewidth=0.7)
                if abs(change) >= 0.02 * highest:
                    _number(axes, at, max(level, level + change), signed(change, _digits(highest)), highest)
                level += change
                labels.append(word)
                at += 1
        axes.bar(at, total(point), width=0.8, color=scene.colours[point["method"]], linewidth=0)
        _number(axes, at, total(point), f"{total(point):,.{_digits(highest)}f}", highest)
        labels.append(point["point"].replace(" · ", "\n"))
        words.append(f"{point['point']} {total(point):,.{_digits(highest)}f}")
        at += 1
    axes.set_xticks(range(at), labels, fontsize=7.5, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, at - 0.4)
    axes.set_ylim(0, 1.14 * max([highest, *_levels(chain, parts, factor, total)]))
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    return ", ".join(words)


def _levels(chain: list[Row], parts: dict[str, str], factor: float, total: Callable[[Row], float]) -> list[float]:
    """Heights that the floating bars reach on their way."""
    heights = []
    for before, after in itertools.pairwise(chain):
        level = total(before)
        for name in parts:
            level += (after[name] - before[name]) * factor
            heights.append(level)
    return heights


def _digits(highest: float) -> int:
    return 0 if highest >= 100 else 1 if highest >= 10 else 2


def _number(axes: Axes, x: float, y: float, text: str, highest: float) -> None:
    axes.text(x, y + 0.015 * highest, text, ha="center", va="bottom", fontsize=7.5, color=INK)
