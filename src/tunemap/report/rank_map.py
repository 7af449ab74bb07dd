"""The heat maps of ranks that methods chose, and of the importances behind them: layers down, modules across."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 7.2  # inches, as of every figure
MOST_MAPS = 6
ACROSS = 3
MOST_NUMBERS = 200  # cells of a map; beyond, the numbers would not be read


def draw_ranks(ranks: pd.DataFrame) -> tuple[Figure, str, str] | None:
    """One map of ranks per point with unequal ranks (its first run), and one of the importances; None without any.

    `ranks` is the table `ranks.csv` with a column `point`. Returns figure, caption and alternative text.
    """
    if ranks.empty:
        return None
    chosen = ranks.dropna(subset=["layer"])
    firsts = {
        str(point): rows[rows["run"] == rows["run"].iloc[0]] for point, rows in chosen.groupby("point", sort=False)
    }
    uneven = {point: rows for point, rows in firsts.items() if rows["rank"].nunique() > 1}
    if not uneven:
        return None
    shown = dict(list(uneven.items())[: MOST_MAPS - 1])
    maps = {point: _grid(rows, "rank") for point, rows in shown.items()}
    source, first = next(iter(shown.items()))
    layers, parts = maps[source].shape
    down = -(-(len(maps) + 1) // ACROSS)
    figure = Figure(figsize=(WIDTH, down * (1.3 + 0.2 * min(layers, 40))), layout="constrained")
    panels = figure.subplots(down, ACROSS, squeeze=False).ravel()
    highest = max(float(np.nanmax(grid.to_numpy())) for grid in maps.values())
    numbers = layers * parts <= MOST_NUMBERS
    for axes, (point, grid) in zip(panels, maps.items(), strict=False):
        _draw(axes, grid, f"rank: {point}", "{:.0f}" if numbers else None, vmin=0, vmax=highest)
    importances = _grid(first, "importance")
    largest = float(np.nanmax(importances.to_numpy()))
    share = importances / largest
    _draw(panels[len(maps)], share, f"importance: {source}", "{:.2f}" if numbers else None, vmin=0, vmax=1)
    for axes in panels[len(maps) + 1 :]:
        axes.set_axis_off()
    left_out = len(uneven) - len(shown)
    caption = (
        "Rank of each adapted module, layers from the input at the top; one run of each method that chose its ranks. "
        f"Reference rank {int(first['reference_rank'].iloc[0])}. Importances relative to the largest, {largest:.2g}."
    ) + (f" {left_out} more in tables/ranks.csv." if left_out else "")
    alt = ". ".join(f"{point}: ranks {int(r['rank'].min())} to {int(r['rank'].max())}" for point, r in shown.items())
    return figure, caption, f"Heat maps of rank by layer and module. {alt}."


def _grid(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Layers x parts; where a layer has a part twice, their mean."""
    values = rows.assign(layer=rows["layer"].astype(int), value=rows[column].astype(float))
    grid = values.pivot_table(index="layer", columns="part", values="value", aggfunc="mean", sort=False)
    return grid.sort_index()[list(dict.fromkeys(rows["part"]))]


def _draw(axes: Axes, grid: pd.DataFrame, title: str, numbers: str | None, **limits: Any) -> None:
    annotations = grid.map(numbers.format).to_numpy() if numbers else False
    sns.heatmap(
        grid,
        ax=axes,
        annot=annotations,
        fmt="",
        cmap="Blues",
        cbar=numbers is None,
        linewidths=0.4,
        annot_kws={"fontsize": 7},
        **limits,
    )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("")
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(axis="both", labelsize=7, length=0)
    axes.tick_params(axis="x", rotation=60)
