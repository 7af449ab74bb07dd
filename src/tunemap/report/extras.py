"""Sections of the page that a study has only where their data exist: scaling, captures, planner, published numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.report.formats import records
from tunemap.report.scene import Scene, outcome_word

Row = dict[str, Any]
PUBLISHED = "published.csv"  # among a study's tables
CLOSE = 0.10  # a prediction of memory that is this near explains the measurement
MOST_ROWS = 60


@dataclass(frozen=True)
class LinkedRow:
    """Cells that lead to the card of a run."""

    run: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A sentence and a table."""

    sentence: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Calibration:
    """A sentence over all studies, and a row per trained run of this one."""

    sentence: str
    rows: tuple[LinkedRow, ...]

    columns = ("Run", "Predicted, MiB", "Measured, MiB", "Ratio")


def scaling_rows(rows: list[Row]) -> list[LinkedRow]:
    """The scaling table as text; each row leads to the first of its runs."""
    return [LinkedRow(row["run_ids"].split(";")[0], _scaling_cells(row)) for row in rows]


def _scaling_cells(row: Row) -> tuple[str, ...]:
    """One row as text; a dash is a value that does not exist, and a speed-up without a baseline says why."""

    def interval(name: str, digits: int, factor: float = 1.0) -> str:
        value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
        if value is None:
            return row["reason"] or "—"
        middle = f"{value * factor:.{digits}f}"
        return middle if low is None else f"{middle} ({low * factor:.{digits}f} to {high * factor:.{digits}f})"

    sent, peak = row["communication_bytes_per_step"], row["peak_allocated_bytes"]
    return (
        f"{row['mode']}: {row['curve']}",
        f"{row['gpus']}",
        "—" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        interval("speed_up", 2),
        interval("efficiency", 0, 100),
        "—" if peak is None else f"{peak / 2**20:,.1f}",
        "—" if sent is None else f"{sent / 2**20:,.2f}",
    )


PARTITION = ("compute_ns", "exposed_communication_ns", "exposed_copy_ns", "idle_ns")


def windows(facts_dir: Path, plan: Row, scenes: Iterable[Scene]) -> list[LinkedRow]:
    """One row per captured run and device, the exact partition of its window; one with the reason where it failed."""
    rows: dict[str, list[LinkedRow]] = {}
    asked = {experiment["name"]: experiment.get("captures", []) for experiment in plan["experiments"]}
    for scene in scenes:
        points = dict(zip(scene.runs["run"], scene.runs["point"], strict=True))
        for run in asked[scene.name]:
            found = [LinkedRow(run, cells) for cells in _windows_of(facts_dir / run, points.get(run, run))]
            rows.setdefault(run, found)
    return [row for found in rows.values() for row in found]


def _windows_of(folder: Path, point: str) -> Iterator[tuple[str, ...]]:
    if not (folder / "summary.json").is_file():
        described = read_json(folder / "capture.json") if (folder / "capture.json").is_file() else {}
        yield (point, described.get("reason") or "not captured", *("—" for _ in PARTITION))
        return
    for device in read_json(folder / "summary.json")["devices"]:
        whole = device["window_ns"] or 1
        shares = (f"{100 * device[part] / whole:.1f}" for part in PARTITION)
        yield (f"{point}, device {device['device']}", f"{whole / 1e6:,.1f}", *shares)


def read_calibration(path: Path, study: str, runs: Mapping[str, str]) -> Calibration | None:
    """Predicted against measured peak memory, from the record in `path`; None where there is none.

    The sentence speaks of every run in the file, the table of the runs of `study`; `runs` says how each of them ended.
    """
    rows = _read(path, ("study", "run", "predicted_peak_bytes", "measured_peak_bytes")) if path.is_file() else []
    pairs = [row for row in rows if row["predicted_peak_bytes"] and row["measured_peak_bytes"]]
    if not pairs:
        return None
    ratios = [row["predicted_peak_bytes"] / row["measured_peak_bytes"] for row in pairs]
    near = sum(abs(ratio - 1) <= CLOSE for ratio in ratios)
    sentence = (
        f"Predicted over measured peak memory in {len(ratios)} runs: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}; {near} within {CLOSE:.0%}."
    )
    mine = (row for row in rows if row["study"] == study and row["run"] in runs)  # studies share ids of runs
    listed = tuple(_calibration_row(row, runs[row["run"]]) for row in mine)
    if len(listed) > MOST_ROWS:
        sentence += f" The first {MOST_ROWS} runs of this study:"
    return Calibration(sentence, listed[:MOST_ROWS])


def _calibration_row(row: Row, outcome: str) -> LinkedRow:
    predicted, measured = row["predicted_peak_bytes"], row["measured_peak_bytes"]
    cells = (
        f"{predicted / 2**20:,.1f}" if predicted else "not predicted",
        f"{measured / 2**20:,.1f}" if measured else outcome_word(outcome) if outcome != "ok" else "not measured",
        f"{predicted / measured:.2f}" if predicted and measured else "—",
    )
    return LinkedRow(row["run"], (row["run"], *cells))


INFERENCE = ("Run", "Form", "Latency, ms", "Median, ms", "p95, ms", "Per second", "Peak memory, MiB")


def inference_row(row: Row) -> LinkedRow:
    """One row of the table of inference as text; a form without numbers says why."""
    if row["latency_mean_s"] is None:
        reason = row["reason"] or "not measured"
        return LinkedRow(row["run"], (row["run"], row["form"] or "—", reason, "—", "—", "—", "—"))
    latencies = (f"{1e3 * row[f'latency_{name}_s']:.1f}" for name in ("mean", "median", "p95"))
    speed, peak = f"{row['units_per_second']:.1f}", f"{row['peak_allocated_bytes'] / 2**20:,.1f}"
    return LinkedRow(row["run"], (row["run"], row["form"], *latencies, speed, peak))


def read_published(path: Path) -> Table | None:
    """Published numbers beside ours, as the table has them; None where the study compares with none."""
    rows = _read(path, ()) if path.is_file() else []
    if not rows:
        return None
    sentence = (
        "Only like is compared with like; a published number with a known flaw stands with its flaw. "
        f"{len(rows)} numbers are in tables/{path.name}."
    )
    columns = tuple(rows[0])
    cells = tuple(tuple(_text(row[column]) for column in columns) for row in rows[:MOST_ROWS])
    return Table(sentence, tuple(column.replace("_", " ") for column in columns), cells)


def _read(path: Path, needed: tuple[str, ...]) -> list[Row]:
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete the file and make it again") from None
    missing = [name for name in needed if name not in frame]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}")
    return records(frame)


def _text(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
