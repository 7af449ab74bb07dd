"""How numbers and rows stand in sentences and cells: signs, ratios, p-values, empty cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a real minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    return ("±" + text[1:] if float(text) == 0 else text).replace("-", "−")


def ratio_text(row: dict[str, Any], name: str) -> str:
    """`0.62×, 0.60 to 0.64`; without an interval it says so."""
    if row.get(f"{name}_low") is None or np.isnan(row[f"{name}_low"]):
        return f"{row[name]:.2f}×, one run"
    if row[f"{name}_low"] == row[f"{name}_high"]:
        return f"{row[name]:.2f}×, the same in every run"
    return f"{row[name]:.2f}×, {row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f}"


def p_text(value: float | None) -> str:
    """A p-value with two figures; below 0.001 only that it is."""
    if value is None or np.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dicts by column name; an empty cell is None."""
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in frame.to_dict("records")
    ]
