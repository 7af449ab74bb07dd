"""Predicted against measured: what was predicted of a study's runs, and the record of all runs ever collected.

    results/STUDY/predictions.json    run id -> prediction, made once the tokens are there
    results/calibration.csv           one row per run of any study: predicted, measured, and the error
    results/STUDY/calibration.csv     the same as it stood when the study's tables were made; the report reads this one

Imports no torch, so that collecting results needs none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import locked, read_json, write_atomic

PREDICTIONS = "predictions.json"
CALIBRATION = "calibration.csv"
COLUMNS = (
    "study", "run", "digest", "device", "predicted_peak_bytes", "measured_peak_bytes", "memory_error",
    "predicted_step_low_s", "predicted_step_high_s", "measured_step_s", "step_in_range",
    "predicted_flops_per_step", "measured_flops_per_step",
    "predicted_communication_bytes_per_step", "measured_communication_bytes_per_step",
)  # fmt: skip


def read_predictions(results_dir: Path) -> dict[str, dict[str, Any]]:
    """The predictions of a study by run; empty where nobody made them."""
    path = results_dir / PREDICTIONS
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; delete the file and run the workflow again")
    return found


def predicted_columns(prediction: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a prediction stands among a run's measurements."""
    if not prediction:
        return {}
    columns = {
        "predicted_peak_bytes": prediction["predicted_peak_bytes"],
        "predicted_step_low_s": prediction["step_seconds_low"],
        "predicted_step_high_s": prediction["step_seconds_high"],
    }
    return {name: value for name, value in columns.items() if value is not None}


def calibration_rows(
    study: str,
    planned: Mapping[str, Mapping[str, Any]],
    predictions: Mapping[str, Mapping[str, Any]],
    runs: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One row per predicted run of a study, in the order of `runs`; only a run that ended ok has measured anything."""
    measurements = ((run["run"], run if run["outcome"] == "ok" else {}) for run in runs)
    return [
        calibration_row(study, run, planned[run]["digest"], predictions[run], measured)
        for run, measured in measurements
        if run in predictions
    ]


def calibration_row(
    study: str, run: str, digest: str, prediction: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """One row; what was not predicted or not measured is None. The step is the one with its wait for data."""
    predicted, peak = prediction["predicted_peak_bytes"], measured.get("peak_allocated_bytes")
    low, high = prediction["step_seconds_low"], prediction["step_seconds_high"]
    step = measured.get("step_period_mean_s")
    return {
        "study": study,
        "run": run,
        "digest": digest,
        "device": prediction["device"],
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak,
        "memory_error": round(predicted / peak - 1, 6) if predicted and peak else None,
        "predicted_step_low_s": low,
        "predicted_step_high_s": high,
        "measured_step_s": step,
        "step_in_range": int(low <= step <= high) if None not in (low, high, step) else None,
        "predicted_flops_per_step": prediction["flops_per_step"],
        "measured_flops_per_step": measured.get("hardware_flops_per_step"),
        "predicted_communication_bytes_per_step": prediction["communication_bytes_per_step"],
        "measured_communication_bytes_per_step": measured.get("communication_bytes_per_step"),
    }


def record_calibration(results_dir: Path, study: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put the rows of a study into the record of all studies, and leave a copy with the study.

    The report is made from the copy: what other studies collect later changes no report that is finished.
    """
    write_atomic(results_dir / CALIBRATION, update_calibration(results_dir.parent / CALIBRATION, study, rows))


def update_calibration(path: Path, study: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Put the rows of a study in place of those that it had, and return the file's text; the other studies' stay."""
    with locked(path):  # two studies may be collected at the same time
        kept = [row for row in read_calibration_rows(path) if row.get("study") != study]
        text = calibration_text(sorted([*kept, *rows], key=lambda row: str(row.get("study"))))
        write_atomic(path, text)
    return text


def read_calibration_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a record as text; none where there is no record."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def calibration_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as they stand in a record."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
