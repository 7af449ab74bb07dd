"""The two main tables of a study as LaTeX (booktabs)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tunemap.report.formats import p_text, records


def points_latex(points: pd.DataFrame) -> str:
    """The points with their intervals as a LaTeX table (needs booktabs)."""
    rows = [
        {
            "Experiment": row["experiment"],
            "Point": row["point"],
            "Seeds": row["seeds"],
            "Accuracy (%)": _range(row, "accuracy", 100, 1),
            "Throughput (tokens/s)": _range(row, "tokens_per_second", 1, 0),
            "Peak memory (MiB)": _range(row, "peak_allocated_bytes", 2**-20, 1),
            "Outcome": row["outcomes"],
        }
        for row in records(points)
    ]
    return _latex(rows, "Points: mean over seeds with 95 % interval.", "tab:points")


def comparisons_latex(comparisons: pd.DataFrame) -> str:
    """Each point against its baseline as a LaTeX table (needs booktabs)."""
    rows = [
        {
            "Experiment": row["experiment"],
            "Point": row["point"],
            "Baseline": row["baseline"],
            "Accuracy (points)": _range(row, "accuracy_difference", 100, 1),
            "Holm p": p_text(row["accuracy_p_holm"]),
            "Throughput (×)": _range(row, "throughput_ratio", 1, 2),
            "Memory (×)": _number(row["memory_ratio"], 2),
            "Accuracy is": row["accuracy_verdict"] or "not compared",
        }
        for row in records(comparisons)
    ]
    return _latex(rows, "Each point against its baseline, with 95 % intervals.", "tab:comparisons")


def _latex(rows: list[dict[str, Any]], caption: str, label: str) -> str:
    styler = pd.DataFrame(rows).style.hide(axis="index").format(escape="latex", na_rep="")
    styler = styler.format_index(escape="latex", axis="columns")
    return str(
        styler.to_latex(hrules=True, caption=caption.replace("%", r"\%"), label=label, position_float="centering")
    )


def _number(value: Any, digits: int) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _range(row: dict[str, Any], name: str, factor: float, digits: int) -> str:
    value, low, high = (_scaled(row[f"{name}{suffix}"], factor) for suffix in ("", "_low", "_high"))
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text if low is None or high is None or low == high else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None or np.isnan(value) else value * factor
