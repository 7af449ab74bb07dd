"""Figures with one line per point: throughput, accuracy, peak memory."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tunemap.report.scene import BASE_COLOUR, FAILURE_COLOUR, INK, PAPER, WIDTH, Row, Scene, failures, seeds_text

ROW_HEIGHT = 0.34
MOST_ROWS = 60  # of a figure; a taller one fits on no page
LABEL_CHARACTERS = 34
PARTS = {  # of peak memory; a sequence of one hue, so that no part is taken for a method
    "parameters_bytes": ("parameters", "#46566c"),
    "gradients_bytes": ("gradients", "#6b7c93"),
    "optimizer_bytes": ("optimizer", "#93a3b8"),
    "activations_bytes": ("activations", "#b9c5d3"),
    "other_bytes": ("other", "#dfe5ec"),
}


def _row_axes(points: list[Row], title: str, unit: str) -> tuple[Figure, Axes]:
    """An axis with one labelled line per point, first point on top, notes on failed runs at the right."""
    labels = [textwrap.fill(point["point"], LABEL_CHARACTERS) for point in points]
    lines = sum(max(1, 0.62 * (label.count("\n") + 1)) for label in labels)
    figure = Figure(figsize=(WIDTH, 1.0 + ROW_HEIGHT * lines), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(points)), labels)
    axes.set_ylim(len(points) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    axes.set_xlabel(unit)
    for row, point in enumerate(points):
        note = failures(point)
        if note:
            place = (0.01, row) if point["seeds"] == 0 else (1.01, row)
            axes.text(
                *place,
                f"× {note}",
                transform=axes.get_yaxis_transform(),
                color=FAILURE_COLOUR,
                va="center",
                fontsize=8,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
            )
        if point["seeds"] == 0:
            axes.axhspan(row - 0.4, row + 0.4, color=FAILURE_COLOUR, alpha=0.08, linewidth=0)
    return figure, axes


def _dots(scene: Scene, axes: Axes, points: list[Row], name: str, factor: float) -> None:
    """Mean with its interval, and each run as a small dot below it."""
    single = scene.runs[scene.runs["outcome"] == "ok"]
    for row, point in enumerate(points):
        if point[name] is None:
            continue
        colour, marker = scene.colours[point["method"]], scene.markers[point["method"]]
        values = pd.to_numeric(single.loc[single["point"] == point["point"], name]).dropna() * factor
        if len(values) > 1:
            axes.plot(values, [row + 0.24] * len(values), "o", color=colour, markersize=2.6, alpha=0.75, mew=0)
        if point[f"{name}_low"] is not None:
            ends = [point[f"{name}_low"] * factor, point[f"{name}_high"] * factor]
            axes.plot(ends, [row, row], "-", color=colour, linewidth=2.2)
        axes.plot([point[name] * factor], [row], marker, color=colour, markersize=6.5, markeredgecolor=PAPER, mew=0.8)


def draw_throughput(scene: Scene) -> tuple[Figure, str, str] | None:
    """Real tokens per second of each point."""
    points, more = _rows(scene.trained)
    if all(point["tokens_per_second"] is None for point in points):
        return None
    figure, axes = _row_axes(points, "Throughput", "real (non-padding) tokens per second")
    _dots(scene, axes, points, "tokens_per_second", 1)
    axes.set_xlim(left=0)
    axes.set_xlim(right=far_end(points, "tokens_per_second") * 1.04)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    caption = (
        f"Real (non-padding) tokens per second of the steps after warm-up, all devices: mean over seeds with 95 % t "
        f"interval, {seeds_text(points)}; small dots are single runs. "
        f"A point without a line has one run, so nothing is known of its spread.{more}"
    )
    return figure, caption, _alternative("Throughput in tokens per second", points, "tokens_per_second", 1, 0)


def far_end(points: list[Row], name: str) -> float:
    """The largest mean or interval end, but no further than twice the largest mean: the rest is cut."""
    means = [point[name] for point in points if point[name] is not None]
    ends = [point[f"{name}_high"] for point in points if point[f"{name}_high"] is not None]
    return float(min(max([*means, *ends]), 2 * max(means)))


def draw_accuracy(scene: Scene) -> tuple[Figure, str, str] | None:
    """Accuracy of each point and of the untouched model."""
    points, more = _rows(scene.points)
    if all(point["accuracy"] is None for point in points):
        return None
    examples = max(point["examples"] for point in points if point["examples"])
    metric = next(point["metric"] for point in points if point["metric"])
    figure, axes = _row_axes(points, "Accuracy on the test split", f"{metric.replace('_', ' ')}, %")
    _dots(scene, axes, points, "accuracy", 100)
    for point in points:
        if point["method_kind"] == "base" and point["accuracy"] is not None:
            axes.axvline(100 * point["accuracy"], color=BASE_COLOUR, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    lows = [point["accuracy_low"] for point in points if point["accuracy_low"] is not None]
    highs = [point["accuracy_high"] for point in points if point["accuracy_high"] is not None]
    axes.set_xlim(max(-1, 100 * min(lows) - 4), min(101, 100 * max(highs) + 4))
    caption = (
        f"Share of correct answers among {examples:,.0f} test examples: mean over seeds with 95 % interval for other "
        f"examples and other seeds (Wilson's, for examples alone, where there is one seed), {seeds_text(points)}; "
        f"small dots are single runs. The dashed line is the model without fine-tuning.{more}"
    )
    return figure, caption, _alternative("Accuracy in percent", points, "accuracy", 100, 1)


def draw_memory(scene: Scene) -> tuple[Figure, str, str] | None:
    """Peak allocated memory of each point, with its parts where they were measured."""
    points, more = _rows(scene.trained)
    peaks = [point["peak_allocated_bytes"] for point in points if point["peak_allocated_bytes"] is not None]
    if not peaks:
        return None
    unit, size = ("GiB", 2**30) if max(peaks) >= 2 * 2**30 else ("MiB", 2**20)
    figure, axes = _row_axes(points, "Peak memory of training", f"peak allocated, {unit}")
    parts = [part for part in PARTS if any(point[part] for point in points)]
    for row, point in enumerate(points):
        if point["peak_allocated_bytes"] is None:
            continue
        left = 0.0
        for part in parts:
            width = (point[part] or 0) / size
            axes.barh(row, width, left=left, height=0.56, color=PARTS[part][1], linewidth=0)
            left += width
        peak, colour = point["peak_allocated_bytes"] / size, scene.colours[point["method"]]
        if not parts:
            axes.barh(row, peak, height=0.56, color=colour, linewidth=0)
        low, high = point["peak_allocated_bytes_low"], point["peak_allocated_bytes_high"]
        if low is not None:
            axes.plot([low / size, high / size], [row, row], "-", color=INK, linewidth=1.4)
        marker = scene.markers[point["method"]]
        axes.plot([peak], [row], marker, color=colour, markersize=7, markeredgecolor=PAPER, mew=0.8)
        axes.annotate(f"{peak:,.1f}", (peak, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.14 * max(peaks) / size)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    if parts:
        handles = [Line2D([], [], marker="s", linestyle="", color=PARTS[part][1], markersize=8) for part in parts]
        figure.legend(handles, [PARTS[part][0] for part in parts], loc="outside lower center", ncols=len(parts))
    used = "; the bar shows what it was used for at that moment" if parts else ""
    caption = (
        "Largest memory allocated on a device during training, loading and evaluation left out: the marker is the "
        f"mean over seeds, {seeds_text(points)}{used}.{more}"
    )
    return figure, caption, _alternative(f"Peak memory in {unit}", points, "peak_allocated_bytes", 1 / size, 1)


def _rows(points: list[Row]) -> tuple[list[Row], str]:
    """The points that a figure has room for, and a sentence about the others."""
    more = len(points) - MOST_ROWS
    return points[:MOST_ROWS], f" {more} more points are in the table." if more > 0 else ""


def _alternative(what: str, points: list[Row], name: str, factor: float, digits: int) -> str:
    """The figure in words, for readers who do not see it."""
    values = []
    for point in points:
        if point[name] is None:
            values.append(f"{point['point']}: {failures(point) or 'no value'}")
            continue
        text = f"{point['point']}: {point[name] * factor:,.{digits}f}"
        if point[f"{name}_low"] is not None:
            low, high = point[f"{name}_low"] * factor, point[f"{name}_high"] * factor
            text += f" ({low:,.{digits}f} to {high:,.{digits}f})"
        values.append(text)
    return f"{what}. {'; '.join(values)}."
