"""The trade-off map on paper: memory against throughput, accuracy beside each point, labels that do not overlap."""

from __future__ import annotations

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from tunemap.report.point_figures import far_end
from tunemap.report.scene import AXIS, PAPER, WIDTH, Row, Scene, failures, seeds_text

MOST_LABELS = 14  # on a map; beyond, only the front is named
FRONT_FILL = {"on the front": "full", "undecided": "left", "beaten": "none"}


def draw_tradeoff(scene: Scene) -> tuple[Figure, str, str] | None:
    """Memory against throughput with accuracy beside each point, one panel per model and dataset."""
    places = {
        place: [p for p in points if p["peak_allocated_bytes"] is not None and p["tokens_per_second"] is not None]
        for place, points in scene.places().items()
    }
    places = {place: points for place, points in places.items() if points}
    if not places:
        return None
    figure = Figure(figsize=(WIDTH, 4.1 * len(places) + 0.5), layout="constrained")
    panels = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    texts = []
    for (place, points), axes in zip(places.items(), panels, strict=True):
        texts.append(_draw_map(scene, axes, points))
        if len(places) > 1:
            axes.set_title(" · ".join(place))
    _map_legend(figure, scene, [point for points in places.values() for point in points])
    for axes, wanted in zip(panels, texts, strict=True):
        _place_labels(figure, axes, wanted)
    lost = [f"{point['point']} ({failures(point) or 'no value'})" for point in scene.trained]
    lost = [text for text, point in zip(lost, scene.trained, strict=True) if point["peak_allocated_bytes"] is None]
    caption = (
        "Up and to the left is better; beside each point its accuracy with 95 % interval. Bars are 95 % intervals over "
        f"seeds, {seeds_text(scene.trained)}. Filled: on the Pareto front of memory, throughput and accuracy with at "
        "least 95 % probability; empty: beaten with at least 95 %; half: undecided or unknown."
    )
    if max(map(len, places.values())) > MOST_LABELS:
        caption += " Of so many points only those on the front are named; the table has the others."
    if lost:
        caption += f" Not on the map: {', '.join(lost)}."
    words = [
        f"{point['point']}: {point['peak_allocated_bytes'] / 2**20:,.0f} MiB, {point['tokens_per_second']:,.0f} "
        f"tokens/s, accuracy {_accuracy(point) or 'unknown'}, {point['front'] or 'front unknown'}"
        for points in places.values()
        for point in points
    ]
    return figure, caption, f"Peak memory against throughput. {'; '.join(words)}."


def _draw_map(scene: Scene, axes: Axes, points: list[Row]) -> list[tuple[tuple[float, float], str]]:
    """Points and bars; returns the labels that want a place."""
    unit, size = ("GiB", 2**30) if max(p["peak_allocated_bytes"] for p in points) >= 2 * 2**30 else ("MiB", 2**20)
    wanted = []
    for point in points:
        x, y = point["peak_allocated_bytes"] / size, point["tokens_per_second"]
        colour = scene.colours[point["method"]]
        for name, place in (("tokens_per_second", ([x, x], None)), ("peak_allocated_bytes", (None, [y, y]))):
            low, high = point[f"{name}_low"], point[f"{name}_high"]
            if low is not None:
                ends = [low, high] if place[0] else [low / size, high / size]
                axes.plot(place[0] or ends, place[1] or ends, "-", color=colour, linewidth=1.2, alpha=0.6)
        look: dict[str, Any] = {
            "fillstyle": FRONT_FILL.get(point["front"], "left"),
            "markerfacecoloralt": PAPER,
            "mew": 1.6,
        }
        axes.plot([x], [y], scene.markers[point["method"]], color=colour, markersize=8, **look)
        accuracy = _accuracy(point)
        if len(points) <= MOST_LABELS or point["front"] == "on the front":
            text = textwrap.fill(point["point"], 24)
            wanted.append(((x, y), f"{text}\n{accuracy}" if accuracy else text))
    peaks = [point["peak_allocated_bytes"] / size for point in points]
    speeds = [point["tokens_per_second"] for point in points]
    axes.set_xlim(_near_end(peaks), 1.12 * max(peaks))
    axes.set_ylim(_near_end(speeds), 1.12 * far_end(points, "tokens_per_second"))
    axes.set_xlabel(f"peak allocated memory, {unit}")
    axes.set_ylabel("real tokens per second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return wanted


def _near_end(values: list[float]) -> float:
    """Zero, unless all values are far from it and would lie on a heap."""
    return 0.0 if min(values) < 0.5 * max(values) else 0.8 * min(values)


def _accuracy(point: Row) -> str:
    if point["accuracy"] is None:
        return ""
    return f"{100 * point['accuracy']:.1f} % ({100 * point['accuracy_low']:.0f}–{100 * point['accuracy_high']:.0f})"


def _map_legend(figure: Figure, scene: Scene, points: list[Row]) -> None:
    methods = dict.fromkeys(point["method"] for point in points)
    handles = [
        Line2D([], [], marker=scene.markers[method], linestyle="", color=scene.colours[method]) for method in methods
    ]
    names = list(methods)
    for name, fill in FRONT_FILL.items():
        handles.append(Line2D([], [], marker="o", linestyle="", color=AXIS, fillstyle=fill, markerfacecoloralt=PAPER))
        names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7))


def _place_labels(figure: Figure, axes: Axes, wanted: list[tuple[tuple[float, float], str]]) -> None:
    """Put each label where it covers no point, no other label and no edge; leave it out where there is no room."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform(place) for place, _ in wanted]
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    taken += [line.get_window_extent(renderer).padded(1) for line in axes.lines if line.get_linestyle() == "-"]
    for place, text in wanted:
        for dx, dy, across, up in LABEL_PLACES:
            label = axes.annotate(
                text, place, xytext=(dx, dy), textcoords="offset points", ha=across, va=up, fontsize=8, linespacing=1.15
            )
            label.set_in_layout(False)  # the layout was made before, and must not move under the labels
            box = label.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if max(abs(dx), abs(dy)) > 20:
                    axes.annotate(
                        "",
                        place,
                        xytext=(dx, dy),
                        textcoords="offset points",
                        arrowprops={"arrowstyle": "-", "color": AXIS, "lw": 0.6, "shrinkB": 5},
                    )
                break
            label.remove()


LABEL_PLACES: tuple[tuple[float, float, str, str], ...] = tuple(
    (dx * distance, dy * distance, across, up)
    for distance in (8, 16, 28, 44, 64)
    for dx, dy, across, up in (
        (1, 0, "left", "center"),
        (-1, 0, "right", "center"),
        (0.7, 0.7, "left", "bottom"),
        (0.7, -0.7, "left", "top"),
        (-0.7, 0.7, "right", "bottom"),
        (-0.7, -0.7, "right", "top"),
        (0, 1, "center", "bottom"),
        (0, -1, "center", "top"),
    )
)
