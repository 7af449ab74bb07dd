"""Loss curves of runs, from the steps that training wrote to the rows of tables/losses.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

LOSS_COLUMNS = ("step", "elapsed_s", "loss")
LOSS_ROWS = 300  # rows per run; a longer curve is averaged over windows of steps
Curve = dict[str, np.ndarray]
"""Columns of equal length."""


def read_curve(path: Path) -> tuple[Curve | None, str]:
    """Loss per step with ranks joined, averaged over windows of steps where the run is long; or a problem."""
    try:
        columns = _read_columns(path, ("rank", "label_tokens", *LOSS_COLUMNS))
    except FileNotFoundError:
        return None, f"no {path}"
    except (ValueError, OSError, csv.Error) as error:
        return None, f"{path}: {error}"
    read = np.isfinite(columns["loss"]) & np.isfinite(columns["step"])
    if not read.any():
        return None, f"{path}: holds no loss"
    columns = {name: values[read] for name, values in columns.items()}
    if (columns["rank"] != columns["rank"][0]).any():
        columns = _join_ranks(columns)
    windows = min(LOSS_ROWS, columns["step"].size)
    edges = np.linspace(0, columns["step"].size, windows + 1).astype(int)
    counts = np.diff(edges)
    curve = {
        "step": columns["step"][edges[1:] - 1].astype(int),
        "elapsed_s": columns["elapsed_s"][edges[1:] - 1],
        "loss": np.add.reduceat(columns["loss"], edges[:-1]) / counts,
    }
    return curve, ""


def _read_columns(path: Path, names: Sequence[str]) -> Curve:
    """Numbers of a csv file by column, NaN where there is none. pandas takes longer to begin than this to end."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        if missing := [name for name in names if name not in head]:
            raise ValueError(f"no column {missing[0]}")
        places = [head.index(name) for name in names]
        try:
            rows = [[float(line[place] or "nan") for place in places] for line in lines]
        except (ValueError, IndexError) as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None
    return dict(zip(names, np.array(rows, dtype=float).reshape(-1, len(names)).T, strict=True))


def loss_table(curves: dict[str, Curve]) -> pd.DataFrame:
    """One table of the curves of all runs."""
    if not curves:
        return pd.DataFrame(columns=["run", *LOSS_COLUMNS])
    lengths = [curve["step"].size for curve in curves.values()]
    joined = {name: np.concatenate([curve[name] for curve in curves.values()]) for name in LOSS_COLUMNS}
    return pd.DataFrame({"run": np.repeat(np.array(list(curves), dtype=object), lengths)} | joined)


def _join_ranks(columns: Curve) -> Curve:
    """One row per step: loss weighted by each rank's label tokens, time of the slowest rank."""
    steps, place = np.unique(columns["step"], return_inverse=True)
    weight = np.maximum(columns["label_tokens"], 1e-9)
    elapsed = np.zeros(steps.size)
    np.maximum.at(elapsed, place, columns["elapsed_s"])
    loss = np.bincount(place, weight * columns["loss"]) / np.bincount(place, weight)
    return {"step": steps, "elapsed_s": elapsed, "loss": loss}
