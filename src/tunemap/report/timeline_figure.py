"""One step over time: phases, what ran by category, the longest operators, communication and gaps, from captures."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tunemap.report.captures import Captured
from tunemap.report.scene import AXIS, FAILURE_COLOUR, GRID, INK, WIDTH, Scene
from tunemap.report.step_figure import category_colours
from tunemap.trace.timeline import BINS

LANES = {"phase": "phase", "work": "operators", "communication": "communication", "copy": "copies", "gap": "idle"}
MOST_PANELS = 8
COMMUNICATION_COLOUR = "#7a1fa2"


def draw_timeline(scene: Scene) -> tuple[Figure, str, str] | None:
    """The middle captured step of each captured run, one panel per device, on one time axis."""
    panels = [
        (_title(capture, device, len(devices)), capture, rows)
        for capture in scene.captures
        for devices in [list(capture.timeline.groupby(["process", "device"], sort=False))]
        for device, (_, rows) in enumerate(devices)
    ]
    left_out = len(panels) - MOST_PANELS
    panels = panels[:MOST_PANELS]
    if not panels:
        return None
    colours = category_colours(scene.captures)
    lanes = [_lanes(rows) for _, _, rows in panels]
    sizes = [len(found) for found in lanes]
    figure = Figure(figsize=(WIDTH, 0.9 + sum(0.42 + 0.2 * size for size in sizes)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=[size + 1.2 for size in sizes])[:, 0]
    for axes, (title, _, rows), found in zip(grid, panels, lanes, strict=True):
        _draw(axes, title, rows, found, colours)
    grid[-1].set_xlim(0, max(_step_ms(rows) for _, _, rows in panels))
    grid[-1].set_xlabel("milliseconds since the step began, under the profiler")
    shown = {name for _, _, rows in panels for name in rows[rows["lane"] == "work"]["name"]}
    named = [name for name in colours if name in shown]
    handles = [Line2D([], [], marker="s", linestyle="", color=colours[name], markersize=8) for name in named]
    texts = list(named)
    if shown - set(named):
        handles.append(Line2D([], [], marker="s", linestyle="", color=GRID, markersize=8))
        texts.append("other categories")
    figure.legend(handles, texts, loc="outside lower center", ncols=5)
    caption = (
        f"The middle one of the captured steps, first seed of each point. A step is cut into {BINS} parts; each part "
        "of the lane of operators has the category that took most of it, empty where nothing ran. Below it the "
        "operators that took longest, and every gap of a part or more. "
        + " ".join(_words(title, rows) for title, _, rows in panels)
        + (f" {left_out} more devices are not drawn." if left_out > 0 else "")
    )
    alt = "One step over time. " + " ".join(_words(title, rows) for title, _, rows in panels)
    return figure, caption, alt


def _title(capture: Captured, device: int, devices: int) -> str:
    return f"{capture.point}, device {device}" if devices > 1 else capture.point


def _lanes(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(lane, label, rows) from top to bottom; operators have a lane each, longest first."""
    present = {lane: rows[rows["lane"] == lane] for lane in LANES}
    found = [(lane, LANES[lane], present[lane]) for lane in ("phase", "work")]
    operators = rows[rows["lane"] == "operator"]
    found += [("operator", _brief(str(name)), own) for name, own in operators.groupby("name", sort=False)]
    found += [(lane, LANES[lane], present[lane]) for lane in ("communication", "copy", "gap") if len(present[lane])]
    return found


def _draw(
    axes: Axes, title: str, rows: pd.DataFrame, lanes: list[tuple[str, str, pd.DataFrame]], colours: dict[str, str]
) -> None:
    whole = _step_ms(rows)
    for place, (lane, _, own) in enumerate(lanes):
        by_name: dict[str, list[tuple[float, float]]] = {}
        for name, start_ns, end_ns in zip(own["name"], own["start_ns"], own["end_ns"], strict=True):
            by_name.setdefault(name, []).append((start_ns / 1e6, (end_ns - start_ns) / 1e6))
        for name, spans in by_name.items():
            if lane == "phase" and name == "unattributed":
                continue
            axes.broken_barh(spans, (place + 0.12, 0.76), linewidth=0, **_look(lane, name, colours))
            if lane == "phase":
                for start, width in spans:
                    if width > 0.015 * whole * len(name):
                        middle = (start + width / 2, place + 0.5)
                        axes.text(*middle, name, ha="center", va="center", fontsize=8, color=INK)
    axes.set_yticks([place + 0.5 for place in range(len(lanes))], [label for _, label, _ in lanes])
    axes.set_ylim(len(lanes), 0)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(axis="y", visible=False)
    axes.set_title(title, loc="left", fontsize=9)


def _look(lane: str, name: str, colours: dict[str, str]) -> dict[str, Any]:
    if lane == "work":
        return {"color": colours.get(name, GRID)}
    alike = {"phase": GRID, "operator": AXIS, "communication": COMMUNICATION_COLOUR, "copy": AXIS}
    return {"color": alike.get(lane, FAILURE_COLOUR)}


def _words(title: str, rows: pd.DataFrame) -> str:
    """A panel in numbers: its length, its idle share, its longest operators, collectives and gaps."""
    step = rows[rows["lane"] == "step"].iloc[0]
    idle = 1 - step["time_ns"] / step["end_ns"] if step["end_ns"] else 0.0
    parts = [f"{title}: {step['end_ns'] / 1e6:.1f} ms, {idle:.0%} idle"]
    for lane, label in (("operator", "longest "), ("communication", "")):
        times = rows[rows["lane"] == lane].groupby("name", sort=False)["time_ns"].sum().nlargest(3)
        if len(times):
            parts.append(label + ", ".join(f"{_brief(str(name))} {time / 1e6:.2g} ms" for name, time in times.items()))
    gaps = rows[rows["lane"] == "gap"].nlargest(1, "time_ns")
    if len(gaps):
        gap = gaps.iloc[0]
        where = "between phases" if gap["name"] == "unattributed" else f"in {gap['name']}"
        parts.append(f"longest gap {gap['time_ns'] / 1e6:.2g} ms {where}, at {gap['start_ns'] / 1e6:.1f} ms")
    return "; ".join(parts) + "."


def _brief(name: str) -> str:
    """An operator's name, its middle left out where it is too long for a label."""
    return name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"


def _step_ms(rows: pd.DataFrame) -> float:
    return float(rows[rows["lane"] == "step"]["end_ns"].iloc[0]) / 1e6
