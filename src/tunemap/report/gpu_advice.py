"""Which point of the study to choose on a GPU with so much memory, from what was planned and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunemap.planner.calibration import read_predictions
from tunemap.planner.prediction import ON_GPUS
from tunemap.planner.table import span
from tunemap.report.extras import Table
from tunemap.report.scene import point_runs

Row = dict[str, Any]
GIB = 1 << 30
COLUMNS = (
    "Your GPU",
    "Memory, GiB",
    "Fit",
    "Fastest that fits, tokens/s",
    "Most accurate that fits",
    "Least memory, GiB",
)
SENTENCE = (
    "For each GPU that is described here: how many points of the experiment fit on it, and which of them to choose. "
    "Memory is planned from the training step, speed is a range from the GPU's data sheet, accuracy is what this study "
    "measured, with its interval: where intervals overlap, choose the faster one. "
    "The command tunemap advise answers for another model, length or number of GPUs."
)


def advise_on_gpus(plan: Row, experiment: Row, points: list[Row], results_dir: Path) -> Table | None:
    """A row per described GPU, for the points of one experiment; None where nothing was predicted."""
    predicted = read_predictions(results_dir)
    on_gpus: dict[str, dict[str, Row]] = {}  # GPU -> point -> what was planned
    for point, runs in point_runs(plan, experiment).items():
        run = next((run for run in runs if predicted.get(run, {}).get(ON_GPUS)), None)
        for one in predicted[run][ON_GPUS] if run else []:
            on_gpus.setdefault(one["device"], {})[point] = one
    if not on_gpus:
        return None
    accuracies = {point["point"]: point for point in points if point["accuracy"] is not None}
    rows = tuple(_row(gpu, options, accuracies) for gpu, options in on_gpus.items())
    return Table(SENTENCE, COLUMNS, rows)


def _row(gpu: str, options: dict[str, Row], accuracies: dict[str, Row]) -> tuple[str, ...]:
    memory_bytes = next(iter(options.values()))["memory_bytes"]
    fitting = {point: one for point, one in options.items() if one["verdict"] in ("fits", "tight")}
    least = min(options, key=lambda point: options[point]["device_peak_bytes"])
    timed = {point: one for point, one in fitting.items() if one["step_seconds_high"] and one["tokens_per_step"]}
    fastest = min(timed, key=lambda point: _seconds_per_token(timed[point]), default=None)
    measured = [point for point in fitting if point in accuracies]
    best = max(measured, key=lambda point: float(accuracies[point]["accuracy"]), default=None)
    return (
        gpu,
        f"{memory_bytes / GIB:.0f}",
        f"{len(fitting)} of {len(options)}",
        "—" if fastest is None else f"{_name(fastest, fitting)}: {_speed(timed[fastest])}",
        "—" if best is None else f"{_name(best, fitting)}: {_accuracy(accuracies[best])}",
        f"{least}: {options[least]['device_peak_bytes'] / GIB:.1f}",
    )


def _name(point: str, fitting: dict[str, Row]) -> str:
    return f"{point} (tight)" if fitting[point]["verdict"] == "tight" else point


def _seconds_per_token(one: Row) -> float:
    """At the geometric mean of both ends."""
    return float(one["step_seconds_low"] * one["step_seconds_high"]) ** 0.5 / float(one["tokens_per_step"])


def _speed(one: Row) -> str:
    tokens = one["tokens_per_step"]
    ends = tokens / one["step_seconds_high"], tokens / one["step_seconds_low"]
    return span(*ends, lambda value: f"{value:,.0f}")


def _accuracy(point: Row) -> str:
    if point["accuracy_low"] is None:
        return f"{100 * point['accuracy']:.1f} %"
    return f"{100 * point['accuracy']:.1f} % ({100 * point['accuracy_low']:.1f} to {100 * point['accuracy_high']:.1f})"
