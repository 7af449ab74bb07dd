"""Figures of facts: where the time goes, by phase, over time, on each rank, and between two runs.

Each function takes facts (or a trace) and returns a matplotlib figure that belongs to nobody else, so that a report can
lay several out; `draw_facts` and `draw_waterfall` write them as SVG. Only the functions that are called import
matplotlib and seaborn.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunemap.trace.arrays import CPU_DEVICE, Array, Trace
from tunemap.trace.categories import load_rules
from tunemap.trace.compare import COMPONENTS, Comparison
from tunemap.trace.facts import Facts
from tunemap.trace.host import Host
from tunemap.trace.intervals import Spans, union
from tunemap.trace.tables import Categories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {
    "compute_ns": "compute",
    "exposed_communication_ns": "exposed communication",
    "exposed_copy_ns": "exposed copies",
    "idle_ns": "idle",
}
_COLOURS = {"compute": 0, "exposed communication": 1, "exposed copies": 2, "idle": 7}
_LANES = ("compute", "communication", "copies")
_MOST_BARS = 4000
_WITHOUT_STEPS_NS = 50_000_000
"""How much of a trace without step ranges the timeline shows."""


def draw_facts(facts: Facts, trace: Trace, folder: Path) -> list[Path]:
    """Write every figure that the facts have data for, as SVG; returns the paths."""
    figures: dict[str, Any] = {}
    if facts.summary["devices"]:
        figures["shares"] = shares_figure({"": facts})
        figures["phases"] = phases_figure(facts)
        figures["timeline"] = timeline_figure(trace)
    if facts.tables["copy_timeline"]["bytes"]:
        figures["copies"] = copies_figure(facts)
    return [_save(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def draw_roofline(points: Mapping[str, list[Any]], folder: Path) -> Path | None:
    """Write the launches of `tunemap.trace.ncu` as FLOP/s over FLOPs per byte, as SVG; None where none has both."""
    import seaborn as sns

    known = [
        (category, intensity, speed)
        for category, intensity, speed in zip(
            points["category"], points["flops_per_byte"], points["flops_per_s"], strict=True
        )
        if intensity is not None and speed is not None
    ]
    if not known:
        return None
    figure = _figure(7, 4)
    axes = figure.subplots()
    categories = list(dict.fromkeys(category for category, _, _ in known))
    for category, colour in zip(categories, sns.color_palette("husl", len(categories)), strict=True):
        intensities, speeds = zip(*((x, y) for name, x, y in known if name == category), strict=True)
        axes.scatter(intensities, speeds, s=18, color=colour, label=category, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of device memory", ylabel="FLOP/s")
    _legend_above(axes)
    return _save(figure, folder / "roofline.svg")


def draw_waterfall(comparison: Comparison, folder: Path) -> Path:
    """Write the waterfall between two runs as SVG."""
    return _save(waterfall_figure(comparison), folder / "waterfall.svg")


def _save(figure: "Figure", path: Path) -> Path:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):  # the same data give the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _palette() -> dict[str, Any]:
    import seaborn as sns

    colours = sns.color_palette("colorblind")
    return {name: colours[i] for name, i in _COLOURS.items()}


def shares_figure(runs: Mapping[str, Facts]) -> "Figure":
    """Stacked bars of the partition, one per run and device: for example DDP and FSDP, full and LoRA."""
    bars = [
        (f"{label} {_device_label(d)}".strip(), d) for label, facts in runs.items() for d in facts.summary["devices"]
    ]
    figure = _figure(7, 1.2 + 0.35 * len(bars))
    axes = figure.subplots()
    left = np.zeros(len(bars))
    palette = _palette()
    for key, name in PARTS.items():
        share = np.array([d[key] / d["window_ns"] if d["window_ns"] else 0 for _, d in bars]) * 100
        axes.barh(range(len(bars)), share, left=left, color=palette[name], label=name, height=0.7)
        for row, (start, width) in enumerate(zip(left, share, strict=True)):
            if width >= 6:
                axes.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=8)
        left += share
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the window (%)")
    _legend_above(axes)
    return figure


def _device_label(device: Mapping[str, Any]) -> str:
    owner = f"rank {device['rank']}" if device["rank"] is not None else f"process {device['process']}"
    return f"{owner}, {device['device'] if device['device'] == 'cpu' else 'GPU ' + str(device['device'])}"


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def phases_figure(facts: Facts) -> "Figure":
    """Phase by category: milliseconds of the window per device, the mean over devices."""
    import seaborn as sns

    table = facts.tables["phases"]
    cells: dict[tuple[str, str], int] = defaultdict(int)
    for phase, category, wall in zip(table["phase"], table["category"], table["wall_ns"], strict=True):
        cells[category, phase] += wall
    by_category: dict[str, int] = defaultdict(int)
    for (category, _), wall in cells.items():
        by_category[category] += wall
    categories = sorted(by_category, key=lambda c: -by_category[c])
    phases = list(dict.fromkeys(phase for _, phase in sorted(cells, key=lambda cell: _phase_order(cell[1]))))
    devices = len(facts.summary["devices"])
    values = np.array([[cells.get((c, p), np.nan) / 1e6 / devices for p in phases] for c in categories])
    figure = _figure(1.6 + 1.1 * len(phases), 1.2 + 0.3 * len(categories))
    axes = figure.subplots()
    sns.heatmap(
        values,
        ax=axes,
        annot=True,
        fmt=".3g",
        cmap="Blues",
        linewidths=0.5,
        xticklabels=phases,
        yticklabels=categories,
        annot_kws={"fontsize": 8},
        cbar_kws={"label": "ms of the window"},
    )
    axes.tick_params(rotation=0)
    return figure


def _phase_order(phase: str) -> int:
    order = ("data", "forward", "backward", "optimizer", "zero_grad", "unattributed")
    return order.index(phase) if phase in order else len(order)


def copies_figure(facts: Facts) -> "Figure":
    """Copies over time, one panel per kind and scope (within a device is not between devices)."""
    table = facts.tables["copy_timeline"]
    bucket_ns = facts.summary["bucket_ns"]
    panels: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    columns = ("kind", "scope", "process", "device", "bucket_start_ns", "bytes")
    for kind, scope, process, device, start, size in zip(*(table[c] for c in columns), strict=True):
        panels[f"{kind} ({scope})"][f"process {process}, GPU {device}"][start] += size
    figure = _figure(7, 0.8 + 1.5 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    last = max(table["bucket_start_ns"]) // bucket_ns + 1
    times = np.arange(last + 1) * bucket_ns
    for axes, (title, lines) in zip(rows, panels.items(), strict=True):
        for label, buckets in lines.items():
            rate = [buckets.get(int(t), 0) / bucket_ns for t in times[:-1]]  # bytes per nanosecond are GB per second
            axes.stairs(rate, times / 1e9, label=label)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylabel("GB/s")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].legend(frameon=False, fontsize=7, ncols=4, loc="upper right")
    rows[-1].set_xlabel("seconds since the first device work")
    return figure


def timeline_figure(trace: Trace) -> "Figure":
    """One step on each rank: when it computes, communicates and copies. Shows the middle step."""
    rules = load_rules()
    categories = Categories(trace, rules)
    places = sorted(
        set(zip(trace.kernels.process.tolist(), trace.kernels.device.tolist(), strict=True))
        | set(zip(trace.copies.process.tolist(), trace.copies.device.tolist(), strict=True))
    )
    palette = _palette()
    colours = dict(zip(_LANES, list(palette.values())[:3], strict=True))
    figure = _figure(9, 0.8 + 0.75 * len(places))
    rows = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for axes, (process, device) in zip(rows, places, strict=True):
        kernels = trace.kernels.take((trace.kernels.process == process) & (trace.kernels.device == device))
        copies = trace.copies.take((trace.copies.process == process) & (trace.copies.device == device))
        category = categories.of(kernels.name, device == CPU_DEVICE)
        communicates = category == categories.communication
        computes = ~communicates & ~categories.may_wait(category, device == CPU_DEVICE)
        begin, end = _one_step(Host(trace, process, rules), kernels.start_ns, copies.start_ns)
        lanes = (
            (kernels.start_ns[computes], kernels.end_ns[computes]),
            (kernels.start_ns[communicates], kernels.end_ns[communicates]),
            (copies.start_ns, copies.end_ns),
        )
        for row, (name, (start, stop)) in enumerate(zip(_LANES, lanes, strict=True)):
            bars = _drawable(start, stop, begin, end)
            axes.broken_barh(bars, (row, 0.9), color=colours[name], label=name, linewidth=0)
        place = {"rank": trace.processes[process].rank, "process": process}
        label = _device_label(place | {"device": "cpu" if device == CPU_DEVICE else device})
        axes.set(xlim=(0, (end - begin) / 1e6), ylim=(3, -0.1), yticks=[])
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    rows[-1].set_xlabel("ms since the start of the step on this rank")
    rows[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    return figure


def _one_step(host: Host, kernel_start: Array, copy_start: Array) -> tuple[int, int]:
    """The middle step; without steps the first `_WITHOUT_STEPS_NS` of device work."""
    if len(host.steps):
        middle = np.argsort(host.steps.start_ns, kind="stable")[len(host.steps) // 2]
        return int(host.steps.start_ns[middle]), int(host.steps.end_ns[middle])
    begin = int(min(part.min() for part in (kernel_start, copy_start) if len(part)))
    return begin, begin + _WITHOUT_STEPS_NS


def _drawable(start: Array, end: Array, begin: int, stop: int) -> list[tuple[float, float]]:
    """(left, width) in ms of the union within [begin, stop); gaps too narrow to see are closed."""
    inside = (start < stop) & (end > begin)
    spans = union(np.maximum(start[inside], begin), np.minimum(end[inside], stop))
    if len(spans) > _MOST_BARS:
        gap = (stop - begin) // _MOST_BARS
        wide = union(spans.start, spans.end + gap)
        spans = Spans(wide.start, wide.end - gap)
    return [((s - begin) / 1e6, (e - s) / 1e6) for s, e in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]


def waterfall_figure(comparison: Comparison, rows: int = 12) -> "Figure":
    """From the window of run A to that of run B, the largest changes first, the rest together."""
    table, summary = comparison.table, comparison.summary
    colours = dict(zip(COMPONENTS, _palette().values(), strict=True))
    steps = [
        (f"{category}, {phase}", delta / 1e6, colours[component])
        for component, category, phase, delta in list(
            zip(table["component"], table["category"], table["phase"], table["delta_ns"], strict=True)
        )[:rows]
        if delta
    ]
    shown = sum(delta for _, delta, _ in steps)
    rest = summary["delta_window_ns"] / 1e6 - shown
    if len(table["delta_ns"]) > rows:
        steps.append(("everything else", rest, "0.6"))
    figure = _figure(7, 1.2 + 0.32 * (len(steps) + 2))
    axes = figure.subplots()
    level = summary["a_window_ns"] / 1e6
    axes.barh(0, level, color="0.8")
    for row, (_, delta, colour) in enumerate(steps, start=1):
        axes.barh(row, delta, left=level, color=colour)
        axes.text(level + max(delta, 0), row, f" {delta:+.3g}", va="center", fontsize=8)
        level += delta
    axes.barh(len(steps) + 1, summary["b_window_ns"] / 1e6, color="0.8")
    axes.set_yticks(range(len(steps) + 2), ["run A", *(label for label, _, _ in steps), "run B"])
    axes.invert_yaxis()
    lowest = min(summary["a_window_ns"], summary["b_window_ns"]) / 1e6
    spread = sum(abs(delta) for _, delta, _ in steps)
    axes.set_xlim(left=max(0.0, lowest - 1.2 * spread))
    axes.set_xlabel("ms per device and step" if summary["per_step"] else "ms per device")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
