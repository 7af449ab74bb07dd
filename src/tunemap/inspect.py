"""Looking at studies and runs: list them, explain one, compare two, forget the failed, find what is stale."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from tunemap.errors import UserError, nearest
from tunemap.files import naming, read_json, read_object, read_sealed
from tunemap.paths import expanded
from tunemap.planner.plan import predictions
from tunemap.planner.prediction import Prediction
from tunemap.planner.table import Ticker, print_plan
from tunemap.run import Run, canonical_json, differing_factors
from tunemap.study import Plan
from tunemap.study_file import load_plan
from tunemap.training import finished

DEFAULT_STUDY = Path("config/config.yaml")
RESULTS = Path("results")
PIPE_COLUMNS = 2000  # a table is as wide as its contents; folding would cut ids in two
RESULTS_OF_RUNS = ("runs", "evaluations", "unfinished", "captures", "facts", "rooflines")  # each with a folder per run
RETRIED = ("error", "timeout", "oom", "invalid", "unsupported")


def plain_console() -> Console:
    """A terminal's own width; wide where the output goes to a file or a pipe, so that ids stay whole."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}  # a question may hold [brackets]
    console = Console(soft_wrap=True, **plain)
    return console if console.is_terminal else Console(width=PIPE_COLUMNS, **plain)


def study_argument(parser: argparse.ArgumentParser, *, option: bool, what: str = "study file") -> None:
    """The arguments that name a study, as --study or by place."""
    name = "--study" if option else "study"
    meaning = f"{what} (default: {DEFAULT_STUDY})"
    if option:
        parser.add_argument(name, type=Path, default=DEFAULT_STUDY, help=meaning)
    else:
        parser.add_argument(name, type=Path, nargs="?", default=DEFAULT_STUDY, help=meaning)
    parser.add_argument("--scale", help="another size of the study, as its `scales` name them")
    parser.add_argument("--data-root", help="where relative paths start, in place of the study's data_root")


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan of the study that the arguments name."""
    return load_plan(arguments.study, data_root=arguments.data_root, scale=arguments.scale)


def run_of(plan: Plan, name: str) -> Run:
    """The run of that id. Raises UserError, with the nearest id, where there is none."""
    if name in plan.runs:
        return plan.runs[name]
    meant = nearest(name, plan.runs)
    hint = f"; did you mean {meant}?" if meant else "."
    raise UserError(f"no run '{name}' in study {plan.study.study}{hint} `tunemap plan` lists them")


# --- plan -------------------------------------------------------------------------------------------------


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap plan`."""
    study_argument(parser, option=False)
    parser.add_argument(
        "--json", action="store_true", help="print JSON: every run with all of its factors, and every prediction"
    )
    only = parser.add_mutually_exclusive_group()  # both together would leave nothing to print
    only.add_argument("--list", action="store_true", help="only list the runs; predict nothing")
    only.add_argument("--predict", action="store_true", help="only predict; list nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: results)")


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the runs of a study, and what each of them will need."""
    plan = plan_of(arguments)
    found = {} if arguments.list else _predictions(plan, arguments.results)
    if arguments.json:
        values = plan.to_dict() | {"predictions": [one.to_dict() for one in found.values()]}
        print(json.dumps(values, indent=1, ensure_ascii=False))
        return 0
    console = plain_console()
    if not arguments.predict:
        _print_runs(console, plan)
    if found:
        print_plan(console, found, {name: SEED.sub("", name) for name in found})
    return 0


SEED = re.compile(r"\.seed-\d+$")


def _predictions(plan: Plan, results: Path) -> dict[str, Prediction]:
    hardware = plan.study.hardware
    return predictions(
        plan.runs.values(),
        device=hardware.device,
        description=hardware.description,
        data_root=Path(expanded(plan.study.data_root)),
        results=results,
        progress=Ticker("planning"),
    )


def _print_runs(console: Console, plan: Plan) -> None:
    for experiment in plan.experiments:
        table = Table(title=f"{experiment.name}: {experiment.question}", title_justify="left")
        for column in ("run", "digest", "varied"):
            table.add_column(column, overflow="fold")
        for name in (*experiment.base_runs, *experiment.runs):
            run = plan.runs[name]
            varied = ", ".join(f"{key}={_value(run, key)}" for key in experiment.vary) if not run.is_base else ""
            table.add_row(name, run.training_digest, varied)
        console.print(table)
    listed = sum(len(experiment.runs) for experiment in plan.experiments)
    trained = [run for run in plan.runs.values() if not run.is_base]
    shared = f" ({listed - len(trained)} are shared between experiments)" if listed > len(trained) else ""
    console.print(f"{len(trained)} runs to train{shared}, {len(plan.runs) - len(trained)} base models to evaluate")


def _value(run: Run, key: str) -> Any:
    if key in ("model", "dataset", "method"):
        return getattr(run, f"{key}_name")
    if key.startswith("method."):
        return getattr(run.method, key.removeprefix("method."), None)
    return getattr(run.factors, key)


# --- explain and diff -------------------------------------------------------------------------------------


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap explain`."""
    parser.add_argument("run", help="id of the run, as `tunemap plan` prints it")
    study_argument(parser, option=True)


def run_explain(arguments: argparse.Namespace) -> int:
    """Print every factor of a run with the place that its value came from."""
    plan = plan_of(arguments)
    run = run_of(plan, arguments.run)
    origins = plan.provenance[run.id]
    table = Table(title=run.id, title_justify="left")
    for column in ("factor", "value", "from"):
        table.add_column(column, overflow="fold")
    for choice in ("model", "dataset", "method"):
        table.add_row(choice, getattr(run, f"{choice}_name"), origins.get(choice, ""))
        for key, value in getattr(run, choice).model_dump().items():
            if key != "factors":
                table.add_row(f"  {choice}.{key}", str(value), origins.get(f"{choice}.{key}", f"{choice}s"))
    for key, value in run.factors.model_dump().items():
        table.add_row(key, str(value), origins.get(key, "built-in default"))
    plain_console().print(table)
    return 0


def add_diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap diff`."""
    parser.add_argument("first", metavar="RUN", help="id of a run, or an outcome.json")
    parser.add_argument("second", metavar="RUN", help="id of another run, or an outcome.json")
    study_argument(parser, option=True)


def run_diff(arguments: argparse.Namespace) -> int:
    """Print the factors in which two runs differ."""
    first, second = (_run_or_file(arguments, name) for name in (arguments.first, arguments.second))
    differences = differing_factors(first, second)
    if not differences:
        print("the runs are the same")
        return 0
    table = Table()
    for column in ("factor", arguments.first, arguments.second):
        table.add_column(column, overflow="fold")
    for key, (left, right) in differences.items():
        table.add_row(key, str(left), str(right))
    plain_console().print(table)
    return 0


def _run_or_file(arguments: argparse.Namespace, name: str) -> Run:
    path = Path(name)
    if path.suffix == ".json":
        try:
            return Run.from_json(canonical_json(read_json(path)["spec"]))
        except (KeyError, TypeError, ValidationError):
            raise UserError(f"{path}: no outcome of a run of this version of tunemap") from None
    return run_of(plan_of(arguments), name)


# --- retry and gc -----------------------------------------------------------------------------------------


def add_retry_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap retry`."""
    study_argument(parser, option=False)
    parser.add_argument("--outcome", choices=RETRIED, action="append", help="only these outcomes (default: error)")
    parser.add_argument("--from-the-start", action="store_true", help="leave no checkpoint to resume from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: results)")


def run_retry(arguments: argparse.Namespace) -> int:
    """Remove the results of failed runs: a failure is a result, and is repeated only when somebody says so.

    A damaged result is an error, as it is in the tables.
    """
    plan, wanted = plan_of(arguments), arguments.outcome or ["error"]
    folder = arguments.results / plan.study.study
    forgotten = []
    for name in plan.runs:
        outcome = folder / "runs" / name / "outcome.json"
        evaluation = folder / "evaluations" / name / "evaluation.json"
        if _outcome(outcome) in wanted:
            work = folder / "unfinished" / name
            finished.forget(work)
            if arguments.from_the_start:
                shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(outcome.parent)
            shutil.rmtree(evaluation.parent, ignore_errors=True)
            forgotten.append(name + _resumed(work / finished.CHECKPOINT / "manifest.json"))
        elif "error" in wanted and _outcome(evaluation) == "error":
            shutil.rmtree(evaluation.parent)
            forgotten.append(f"{name} (evaluation)")
    for name in forgotten:
        print(f"will be repeated: {name}")
    print(f"{len(forgotten)} of {len(plan.runs)} runs will be repeated by the next start")
    return 0


def _resumed(manifest: Path) -> str:
    """From where the repetition goes on; a damaged checkpoint is of no use to it."""
    try:
        with naming(manifest):
            return f", from step {int(read_object(manifest)['step'])} on"
    except UserError:
        return ""


def _outcome(path: Path) -> str | None:
    """How a training or an evaluation ended; None where it has not, `error` where its file is damaged."""
    if not path.exists():
        return None
    try:
        with naming(path):
            return str(read_sealed(path)["outcome"])
    except UserError:
        return "error"


def add_gc_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap gc`."""
    study_argument(parser, option=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: results)")
    parser.add_argument("--remove", action="store_true", help="remove them; without this they are only listed")


def run_gc(arguments: argparse.Namespace) -> int:
    """List or remove results of runs that the study does not plan any more."""
    plan = plan_of(arguments)
    stale = _stale(arguments.results / plan.study.study, plan)
    for path in stale:
        print(path)
        if arguments.remove and path.is_dir():
            shutil.rmtree(path)
        elif arguments.remove:
            path.unlink()
    print(f"{len(stale)} results {'removed' if arguments.remove else 'belong to no run of the study'}")
    return 0


def _stale(folder: Path, plan: Plan) -> list[Path]:
    """Folders and files that are named by a run which the plan has not."""
    folders = [
        path
        for kind in RESULTS_OF_RUNS
        for path in sorted((folder / kind).glob("*"))
        if path.is_dir() and not path.is_symlink() and path.name not in plan.runs
    ]
    inferences = sorted((folder / "inference").glob("*.json"))
    return folders + [path for path in inferences if not path.is_symlink() and path.stem not in plan.runs]
