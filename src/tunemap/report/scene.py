"""What figures are drawn from: the points, runs and curves of one experiment, and one colour per method of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunemap.collect import Tables
from tunemap.errors import UserError, nearest
from tunemap.report.captures import Captured, read_captures
from tunemap.report.formats import records
from tunemap.report.points import Result, points_of
from tunemap.report.rooflines import Roofline, read_rooflines

INK, AXIS, GRID, PAPER = "#1b1f24", "#7a828c", "#d5dae0", "#ffffff"  # as in the style file
BASE_COLOUR = "#7f7f7f"
# At least 3:1 against white and against the page's dark ground; the first three are far apart for dichromats too.
# Beyond three no such set exists, so that each method has a marker of its own as well.
METHOD_COLOURS = ("#0173b2", "#d55e00", "#029e73", "#ac66c4", "#8f7a00", "#3d8fc4", "#c4557c", "#6f7f52")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
FAILURE_COLOUR = "#c0392b"
WIDTH = 7.2  # inches; the text width of the report and of a double-column page
OUTCOME_WORDS = {
    "oom": "out of memory",
    "timeout": "time limit",
    "error": "error",
    "invalid": "invalid",
    "unsupported": "not supported",
    "missing": "not run",
}

Row = dict[str, Any]


def outcome_word(outcome: str) -> str:
    """`oom` as people say it."""
    return OUTCOME_WORDS.get(outcome, outcome)


@dataclass(frozen=True)
class Scene:
    """One experiment with everything that its figures need."""

    name: str
    points: list[Row]
    runs: pd.DataFrame
    losses: pd.DataFrame
    colours: dict[str, Any]
    captures: list[Captured]
    ranks: pd.DataFrame = field(default_factory=pd.DataFrame)
    markers: dict[str, str] = field(default_factory=dict)
    baselines: dict[tuple[str, str], str] = field(default_factory=dict)  # label by model and dataset
    rooflines: list[Roofline] = field(default_factory=list)

    @property
    def trained(self) -> list[Row]:
        """Points without the rows of the untouched model."""
        return [point for point in self.points if point["method_kind"] != "base"]

    def only(self, runs: Sequence[str]) -> Scene:
        """The points that hold some of these runs, with all their seeds; UserError for a run of no point here."""
        labels = dict(zip(self.runs["run"], self.runs["point"], strict=True))
        if unknown := [run for run in runs if run not in labels]:
            meant = nearest(unknown[0], labels)
            raise UserError(
                f"--run {unknown[0]}: not in experiment {self.name}{f'; did you mean {meant}?' if meant else ''}"
            )
        chosen = {labels[run] for run in runs}
        return replace(
            self,
            points=[point for point in self.points if point["point"] in chosen],
            runs=self.runs[self.runs["point"].isin(chosen)],
            losses=self.losses[self.losses["run"].map(labels).isin(chosen)],
            captures=[capture for capture in self.captures if capture.point in chosen],
            ranks=self.ranks[self.ranks["point"].isin(chosen)],
        )

    def places(self) -> dict[tuple[str, str], list[Row]]:
        """Points by model and dataset."""
        places: dict[tuple[str, str], list[Row]] = {}
        for point in self.trained:
            places.setdefault((point["model"], point["dataset"]), []).append(point)
        return places


def scenes(plan: dict[str, Any], tables: Tables, facts_dir: Path) -> list[Scene]:
    """The experiments of a plan with their rows of the tables and the facts of their captures."""
    members = tables.experiments.groupby("experiment", sort=False)["run"].agg(list)
    points: dict[str, list[Row]] = {}
    for point in records(tables.points):
        points.setdefault(point["experiment"], []).append(point)
    baselines: dict[str, dict[tuple[str, str], str]] = {}
    for row in records(tables.comparisons):
        baselines.setdefault(row["experiment"], {})[row["model"], row["dataset"]] = row["baseline"]
    colours, markers = method_colours(plan), method_markers(plan)
    places = {name: getattr(tables, name).groupby("run", sort=False).indices for name in ("runs", "losses", "ranks")}
    drawn = []
    for experiment in plan["experiments"]:
        name = experiment["name"]
        runs = list(members.get(name, ()))
        labels = {run: label for label, group in point_runs(plan, experiment).items() for run in group}
        in_scene, losses, chosen = (_rows_of(getattr(tables, kind), found, runs) for kind, found in places.items())
        drawn.append(
            Scene(
                name,
                points.get(name, []),
                in_scene.assign(point=in_scene["run"].map(labels)),
                losses,
                colours,
                read_captures(facts_dir, {run: labels[run] for run in experiment.get("captures", [])}),
                chosen.assign(point=chosen["run"].map(labels)),
                markers,
                baselines.get(name, {}),
                read_rooflines(facts_dir, {run: labels[run] for run in experiment.get("rooflines", [])}),
            )
        )
    return drawn


def _rows_of(frame: pd.DataFrame, places: dict[str, np.ndarray], runs: list[str]) -> pd.DataFrame:
    """The rows of some runs in the table's order; `places` are the positions of each run's rows."""
    found = [places[run] for run in runs if run in places]
    return (frame.iloc[np.sort(np.concatenate(found))] if found else frame.iloc[:0]).copy()


def point_runs(plan: dict[str, Any], experiment: dict[str, Any]) -> dict[str, list[str]]:
    """The runs behind each point of an experiment, by the point's label."""
    runs = [*experiment["base_runs"], *experiment["runs"]]
    blank = {run: Result(run, plan["runs"][run], "missing") for run in runs}
    return {point.label: [r.run for r in point.results] for point in points_of(plan, experiment, blank)}


def method_colours(plan: dict[str, Any]) -> dict[str, Any]:
    """A colour for each method of a study, in the plan's order, safe for colour-blind readers; the base is grey."""
    kinds = {run["method_name"]: run["method"]["kind"] for run in plan["runs"].values()}
    methods = [name for name, kind in kinds.items() if kind != "base"]
    colours = {name: METHOD_COLOURS[index % len(METHOD_COLOURS)] for index, name in enumerate(methods)}
    return colours | {name: BASE_COLOUR for name, kind in kinds.items() if kind == "base"}


def method_markers(plan: dict[str, Any]) -> dict[str, str]:
    """A marker for each method of a study, in the plan's order, so that no figure rests on colour alone."""
    kinds = {run["method_name"]: run["method"]["kind"] for run in plan["runs"].values()}
    methods = [name for name, kind in kinds.items() if kind != "base"]
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(methods)}
    return markers | {name: "o" for name, kind in kinds.items() if kind == "base"}


def failures(point: Row) -> str:
    """`1 of 3 out of memory`, or nothing where all runs ended ok."""
    counts = dict(part.rsplit(":", 1) for part in point["outcomes"].split(";"))
    return ", ".join(
        f"{count} of {point['runs']} {OUTCOME_WORDS.get(outcome, outcome)}"
        for outcome, count in counts.items()
        if outcome != "ok"
    )


def seeds_text(points: list[Row]) -> str:
    """`n = 3 seeds`, or the range where points differ; only points with a run that ended ok count."""
    counts = sorted({int(point["seeds"]) for point in points if point["seeds"]})
    if not counts:
        return "n = 0 seeds"
    if len(counts) == 1:
        return f"n = {counts[0]} seed{'s' if counts[0] > 1 else ''} per point"
    return f"n = {counts[0]} to {counts[-1]} seeds per point"
