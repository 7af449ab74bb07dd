"""Loss curves: training loss against steps and against time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tunemap.report.scene import WIDTH, Row, Scene, seeds_text


def draw_loss(scene: Scene) -> tuple[Figure, str, str] | None:
    """Training loss against optimizer steps and against time; one row of panels per model and dataset."""
    ok = scene.runs.loc[(scene.runs["outcome"] == "ok") & scene.runs["run"].isin(scene.losses["run"])]
    places = {place: [p for p in points if p["point"] in set(ok["point"])] for place, points in scene.places().items()}
    places = {place: points for place, points in places.items() if points}
    if not places:
        return None
    named = [point for points in places.values() for point in points]
    by_method = len(named) > 20
    entries = len({point["method"] for point in named}) if by_method else len(named)
    columns = max(1, min(entries, 84 // (6 + max(len(point["point"]) for point in named))))
    height = 2.7 * len(places) + 0.3 + 0.19 * -(-entries // columns)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(len(places), 2, squeeze=False, sharey="row")
    curves = dict(list(scene.losses.groupby("run", sort=False)))
    handles: dict[str, Line2D] = {}
    for (place, points), panels in zip(places.items(), grid, strict=True):
        looks = _line_looks(points, scene.colours)
        for axes, against, label in zip(
            panels, ("step", "elapsed_s"), ("optimizer step", "training time, s"), strict=True
        ):
            for point in points:
                runs = [curves[run] for run in ok.loc[ok["point"] == point["point"], "run"]]
                _draw_curves(axes, runs, against, looks[point["point"]])
                name = point["method"] if by_method else point["point"]
                handles.setdefault(name, Line2D([], [], linewidth=1.8, **looks[point["point"]]))
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        panels[0].set_ylabel("training loss")
        if len(places) > 1:
            panels[0].set_title(" · ".join(place))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    finals = [
        f"{point['point']}: ends at {point['train_loss']:.3g}" for point in named if point["train_loss"] is not None
    ]
    caption = (
        "Training loss per label token against steps (left) and time (right): mean over seeds, "
        f"{seeds_text(scene.trained)}; thin lines are single runs."
    )
    if by_method:
        caption += " So many lines are named by their method alone; lighter ones come later in the table."
    return figure, caption, f"Loss curves. {'; '.join(finals)}."


def _line_looks(points: list[Row], colours: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour of the method; dashes, then lighter shades, tell the points of a method apart."""
    seen: dict[str, int] = {}
    counts = pd.Series([point["method"] for point in points]).value_counts()
    looks = {}
    for point in points:
        index = seen.get(point["method"], 0)
        seen[point["method"]] = index + 1
        shades = sns.light_palette(
            colours[point["method"]], n_colors=counts[point["method"]] + 4, reverse=True
        ).as_hex()
        colour = shades[index] if counts[point["method"]] > len(DASHES) else colours[point["method"]]
        looks[point["point"]] = {"color": colour, "linestyle": DASHES[index % len(DASHES)]}
    return looks


DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.4, 1.2, 1.4)))


def _draw_curves(axes: Axes, runs: list[pd.DataFrame], against: str, look: dict[str, Any]) -> None:
    if len(runs) > 1:
        for run in runs:
            axes.plot(run[against], run["loss"], linewidth=0.6, alpha=0.28, color=look["color"])
    start = max(float(run[against].iloc[0]) for run in runs)
    end = min(float(run[against].iloc[-1]) for run in runs)
    grid = np.linspace(start, end, max(2, len(runs[0])))
    mean = np.mean([np.interp(grid, run[against], run["loss"]) for run in runs], axis=0)
    axes.plot(grid, mean, linewidth=1.6, **look)
