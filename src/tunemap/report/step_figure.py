"""Where the time of a step goes: phases as bars, kernel categories as their parts, from captures."""

from __future__ import annotations

from collections import Counter

import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tunemap.report.captures import PHASES, Captured
from tunemap.report.scene import AXIS, GRID, PAPER, WIDTH, Scene

MOST_CATEGORIES = 8


def draw_step(scene: Scene) -> tuple[Figure, str, str] | None:
    """Where the time of a step goes: phases as bars, kernel categories as their parts, one panel per captured run."""
    captures = scene.captures
    if not captures:
        return None
    colours = category_colours(captures)
    seen = {phase for capture in captures for phase, _ in capture.wall_ms}
    phases = [phase for phase in PHASES if phase in seen]
    height = 0.9 + len(captures) * (0.5 + 0.24 * (len(phases) + 1))
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(captures), sharex=True, squeeze=False)[:, 0]
    for axes, capture in zip(panels, captures, strict=True):
        _draw_phases(axes, capture, phases, colours)
    panels[-1].set_xlabel("milliseconds of a step, under the profiler")
    handles = [Line2D([], [], marker="s", linestyle="", color=colour, markersize=8) for colour in colours.values()]
    handles += [Line2D([], [], marker="s", linestyle="", color=GRID, markersize=8)]
    figure.legend(handles, [*colours, "other categories"], loc="outside lower center", ncols=5)
    slowed = [f"{c.point} {c.profiled_to_unprofiled_ratio:.2f}" for c in captures if c.profiled_to_unprofiled_ratio]
    longest = "; ".join(
        f"{c.point}: " + ", ".join(f"{name} {share:.0%}" for name, share in c.operators) for c in captures
    )
    caption = (
        "A few steps under torch.profiler, first seed of each point: time of operators by the phase they belong to; "
        f"idle is time without any. Step time under the profiler over the step time without it: {', '.join(slowed)}. "
        f"Longest operators, share of busy time: {longest}."
    )
    alt = "Milliseconds of a step by phase. " + ". ".join(
        f"{c.point}: " + ", ".join(f"{phase} {_phase_ms(c, phase):.1f}" for phase in phases) for c in captures
    )
    return figure, caption, alt


def category_colours(captures: list[Captured]) -> dict[str, str]:
    """A colour for each of the categories that take most time in all captures of an experiment, longest first."""
    total: Counter[str] = Counter()
    for capture in captures:
        total.update(capture.categories)
    named = [name for name, _ in total.most_common(MOST_CATEGORIES)]
    return dict(zip(named, sns.color_palette("colorblind", len(named)).as_hex(), strict=True))


def _phase_ms(capture: Captured, phase: str) -> float:
    return sum(ms for (where, _), ms in capture.wall_ms.items() if where == phase)


def _draw_phases(axes: Axes, capture: Captured, phases: list[str], colours: dict[str, str]) -> None:
    for row, phase in enumerate(phases):
        left = 0.0
        for category in (*colours, None):
            width = sum(
                ms
                for (where, name), ms in capture.wall_ms.items()
                if where == phase and (name == category if category else name not in colours)
            )
            axes.barh(row, width, left=left, height=0.7, color=colours.get(category or "", GRID), linewidth=0)
            left += width
    axes.barh(len(phases), capture.idle_ms, height=0.7, color=PAPER, edgecolor=AXIS, linewidth=0.8)
    axes.set_yticks(range(len(phases) + 1), [*phases, "idle"])
    axes.set_ylim(len(phases) + 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(capture.point, loc="left", fontsize=9)
