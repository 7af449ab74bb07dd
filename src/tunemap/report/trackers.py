"""`tunemap export-tracker NAME`: a study's runs for TensorBoard, Weights & Biases, MLflow or trackio.

Written after the runs, from their files: a tracker inside the training loop would be part of every time that it shows.
Everything goes into one folder; nothing is sent anywhere. Each run is a run of the tracker: its factors and how it
ended as configuration, every step of its first rank, and under `result/` its measurements and its accuracy. The writers
are accelerate's (https://huggingface.co/docs/accelerate/usage_guides/tracking); the library of a tracker is none of
TuneMap's dependencies and is imported when its name is given.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.report.command import DEFAULT_STUDY
from tunemap.report.points import flat_factors

Values = dict[str, float]
NOT_LOGGED = ("rank", "step", "measured")  # of steps.csv


@dataclass(frozen=True)
class Tracker:
    """A library that shows runs, and how accelerate's writer for it is told to write into a folder."""

    modules: tuple[str, ...]  # any of them will do
    package: str  # as pip calls it
    writer: str  # class in accelerate.tracking
    settings: Callable[[str, str, Path], dict[str, Any]]  # of study, run and folder
    environment: Callable[[Path], dict[str, str]]
    look: str  # the command that shows the folder


TRACKERS = {
    "tensorboard": Tracker(
        modules=("tensorboard", "tensorboardX"),
        package="tensorboard",
        writer="TensorBoardTracker",
        settings=lambda study, run, folder: {"run_name": run, "logging_dir": str(folder)},
        environment=lambda folder: {},
        look="tensorboard --logdir {folder}",
    ),
    "wandb": Tracker(
        modules=("wandb",),
        package="wandb",
        writer="WandBTracker",
        settings=lambda study, run, folder: {
            "run_name": study,
            "name": run,
            "dir": str(folder),
            "mode": "offline",
        },
        environment=lambda folder: {"WANDB_SILENT": "true"},
        look="wandb sync {folder}/wandb/offline-run-*",
    ),
    "mlflow": Tracker(
        modules=("mlflow",),
        package="mlflow",
        writer="MLflowTracker",
        settings=lambda study, run, folder: {
            "experiment_name": study,
            "run_name": run,
            "logging_dir": (folder / "artifacts").resolve().as_uri(),
        },
        environment=lambda folder: {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.resolve() / 'mlflow.db'}"},
        look="mlflow server --backend-store-uri sqlite:///{folder}/mlflow.db",
    ),
    "trackio": Tracker(
        modules=("trackio",),
        package="trackio",
        writer="TrackioTracker",
        settings=lambda study, run, folder: {"run_name": study, "name": run},
        environment=lambda folder: {"TRACKIO_DIR": str(folder.resolve())},
        look="TRACKIO_DIR={folder} trackio show",
    ),
}


def add_export_tracker_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap export-tracker`."""
    parser.add_argument("name", choices=TRACKERS, help="whose files to write")
    parser.add_argument(
        "--study", type=Path, default=DEFAULT_STUDY, metavar="results/STUDY", help=f"default: {DEFAULT_STUDY}"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--run", action="append", metavar="RUN", help="only this run; may be given again")


def run_export_tracker(arguments: argparse.Namespace) -> int:
    """Write the folder, and print how to look at it."""
    tracker = TRACKERS[arguments.name]
    exported = export(arguments.name, arguments.study, arguments.output, arguments.run)
    print(f"{exported} runs; to see them: {tracker.look.format(folder=arguments.output)}")
    return 0


def export(name: str, results_dir: Path, folder: Path, only: list[str] | None = None) -> int:
    """Write the runs of a study that have a result, or `only` some; returns how many.

    Raises UserError where the tracker is not installed, the folder holds something, or a run is not of the study.
    """
    tracker = TRACKERS[name]
    if not any(importlib.util.find_spec(module) for module in tracker.modules):
        raise UserError(f"{name} is not installed; install it with: pip install {tracker.package}")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder}: holds something already; give a new folder, or the runs would stand twice")
    if not (results_dir / "plan.json").exists():
        raise UserError(f"{results_dir}: no plan.json; give the folder of a study's results")
    plan = read_json(results_dir / "plan.json")
    if unknown := [run for run in only or () if run not in plan["runs"]]:
        raise UserError(f"--run {unknown[0]}: not in {results_dir / 'plan.json'}; `tunemap plan` lists the runs")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(tracker.environment(folder))  # read by the library when it is imported

    from accelerate import PartialState, tracking  # torch takes seconds, which refusals need not wait for

    PartialState(cpu=True)
    exported = 0
    for run in only or plan["runs"]:
        outcome = results_dir / "runs" / run / "outcome.json"
        if outcome.is_file():
            writer = getattr(tracking, tracker.writer)(**tracker.settings(plan["study"], run, folder))
            _write(writer, plan["runs"][run], read_json(outcome), results_dir, run)
            exported += 1
    return exported


def _write(writer: Any, planned: dict[str, Any], outcome: dict[str, Any], results_dir: Path, run: str) -> None:
    configuration = flat_factors(planned) | {name: outcome[name] for name in ("digest", "outcome", "reason")}
    writer.start()
    try:
        writer.store_init_configuration({name: _plain(value) for name, value in configuration.items()})
        last = 0
        for last, values in steps(results_dir / "runs" / run / "steps.csv"):
            writer.log(values, step=last)
        if found := results(outcome, results_dir / "evaluations" / run / "evaluation.json"):
            writer.log(found, step=last)
    finally:
        writer.finish()


def _plain(value: Any) -> Any:
    """A value that every tracker takes as configuration."""
    return value if isinstance(value, (bool, int, float)) else str(value)


def steps(path: Path) -> Iterator[tuple[int, Values]]:
    """(step, its values) of the first rank; values that were not measured are left out."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["rank"] == "0":
                values = {name: float(text) for name, text in row.items() if text and name not in NOT_LOGGED}
                yield int(row["step"]), {name: value for name, value in values.items() if not math.isnan(value)}


def results(outcome: dict[str, Any], evaluation: Path) -> Values:
    """What a run measured once, and its accuracy, by names that stand apart from those of its steps."""
    found = dict(outcome["measurements"])
    if evaluation.is_file():
        found["accuracy"] = read_json(evaluation).get("accuracy")
    return {
        f"result/{name}": value
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
