"""`tunemap verify results/STUDY`: derive everything again from the raw files, and say what differs.

Raw files are steps.csv, predictions.jsonl, the plan, and what a run measured once (memory, energy, parts of its time).
Everything else follows from them: summaries in outcome.json and evaluation.json, gates, digests, and all tables.
The database is made again and compared. Drawings and the page are not: in an artifact their checksums are compared,
elsewhere it is only seen that they are there. A file that cannot be read is a difference, and the others are still
looked at.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.errors import UserError
from tunemap.files import DAMAGE, naming, read_json, read_object, sha256_of

if TYPE_CHECKING:
    from tunemap.training.steps import StepRecord

PLAN = "plan.json"
PLAN_KEYS = ("study", "report", "hardware", "experiments", "runs")
FIGURES = "figures/figures.json"
PREDICTION_KEYS = {"id", "output", "reference", "correct"}
DATABASE = "study.sqlite"
MADE_LAST = (FIGURES, "report.html", DATABASE)  # of a finished study, besides its tables
CHECKSUMS = "SHA256SUMS"  # at the root of an artifact
RELATIVE_TOLERANCE = 1e-9  # of sums taken again in the same order, after a round trip through decimal text


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tunemap verify`."""
    parser.add_argument("results", type=Path, metavar="results/STUDY", help="folder of a study's results")


def run_verify(args: argparse.Namespace) -> int:
    """Print every difference; 1 if there is any."""
    differences = verify(args.results)
    for difference in differences:
        print(difference)
    runs = len(read_json(args.results / PLAN)["runs"])
    if differences:
        if others := _made_by_other_sources(args.results):
            print(f"note: {others} runs were made by other sources of this package, whose definitions may differ")
        print(f"{len(differences)} difference(s) between the results of {runs} runs and what follows from their files")
        return 1
    print(f"{runs} runs: digests, summaries, gates, tables, database and captions all follow from the raw files")
    if _checksums(args.results).is_file():
        print(f"every file has its checksum in {CHECKSUMS}")
    else:
        print(f"drawings and report.html are there; only an artifact's {CHECKSUMS} shows changes in them")
    return 0


def _made_by_other_sources(results_dir: Path) -> int:
    """How many results carry a source digest that is not this package's."""
    from tunemap.measure.environment import package_digest

    own = package_digest()
    found = (results_dir / "runs").glob("*/outcome.json")
    return sum(_source_digest(path) not in (None, own) for path in found)


def _source_digest(path: Path) -> str | None:
    """The digest of the package that made a result; None where the file does not say it."""
    try:
        environment = read_object(path).get("environment")
    except UserError:
        return None
    return environment.get("source_digest") if isinstance(environment, dict) else None


def verify(results_dir: Path) -> list[str]:
    """Every difference between the derived files of a study and what its raw files give; empty if there is none.

    Raises UserError where there is no plan to compare with.
    """
    plan = _plan(results_dir)
    differences = list(_checked(_checksums(results_dir), _checksum_differences(results_dir)))
    for run, planned in plan["runs"].items():
        outcome = results_dir / "runs" / run / "outcome.json"
        evaluation = results_dir / "evaluations" / run / "evaluation.json"
        differences += _plan_differences(run, planned)
        differences += _checked(outcome, _run_differences(outcome, planned))
        differences += _checked(evaluation, _evaluation_differences(evaluation, planned))
    differences += _measurement_table_differences(results_dir, plan)
    of_tables = list(_table_differences(results_dir, plan))
    differences += [*of_tables, *_missing(results_dir)]
    differences += _checked(results_dir / FIGURES, _figure_differences(results_dir))
    if not of_tables:  # the database is made of the tables, and would say the same again
        differences += _checked(results_dir / DATABASE, _database_differences(results_dir))
    return list(dict.fromkeys(differences))  # a file that several checks read is damaged once


def _missing(results_dir: Path) -> Iterator[str]:
    """What a finished study has and this one has not, or has empty."""
    for path in (results_dir / name for name in MADE_LAST):
        if not path.is_file():
            yield f"{path}: no such file"
        elif path.stat().st_size == 0:
            yield f"{path}: damaged (the file is empty)"


def _checked(path: Path, differences: Iterator[str]) -> Iterator[str]:
    """The differences that a check finds in a file, and what keeps it from its end: the other checks go on."""
    try:
        with naming(path):
            yield from differences
    except UserError as error:
        yield str(error)


# --- the plan ---------------------------------------------------------------------------------------------


def _plan(results_dir: Path) -> dict[str, Any]:
    """The plan, with all that the checks look up in it."""
    path = results_dir / PLAN
    if not path.exists():
        raise UserError(f"{results_dir}: no {PLAN}; give the folder of a study, such as results/quickstart")
    plan = read_object(path)
    if missing := [key for key in PLAN_KEYS if key not in plan]:
        raise UserError(f"{path}: damaged (no '{missing[0]}')")
    with naming(path):
        for run, planned in plan["runs"].items():
            list(_plan_differences(run, planned))
    return plan


def _plan_differences(run: str, planned: dict[str, Any]) -> Iterator[str]:
    from tunemap.planned import run_of

    found = run_of(planned)
    for name, digest in (("digest", found.training_digest), ("evaluation_digest", found.evaluation_digest)):
        if planned[name] != digest:
            yield f"{PLAN}: run {run}: {name} is {planned[name]}, its factors give {digest}"


# --- checksums --------------------------------------------------------------------------------------------


def _checksums(results_dir: Path) -> Path:
    """Where an artifact has its checksums; a study that was not packed has none."""
    return results_dir.resolve().parent.parent / CHECKSUMS


def _checksum_differences(results_dir: Path) -> Iterator[str]:
    """In an unpacked artifact: every file that is not what was packed."""
    sums = _checksums(results_dir)
    if not sums.is_file():
        return
    root = sums.parent
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (root / name).is_file():
            yield f"{name}: no such file, but {CHECKSUMS} has it"
        elif sha256_of(root / name) != digest:
            yield f"{name}: its SHA-256 is not the one in {CHECKSUMS}: the file was changed after packing"


# --- runs -------------------------------------------------------------------------------------------------


def _run_differences(path: Path, planned: dict[str, Any]) -> Iterator[str]:
    from tunemap.run import Run, canonical_json
    from tunemap.training.steps import read_records, summarise_steps

    outcome, steps = read_object(path), path.with_name("steps.csv")
    if outcome["digest"] != planned["digest"]:
        yield f"{path}: digest is {outcome['digest']}, the plan's is {planned['digest']}"
    spec = Run.from_json(canonical_json(outcome["spec"])).training_digest
    if spec != outcome["digest"]:
        yield f"{path}: digest is {outcome['digest']}, its spec gives {spec}"
    yield from _measurement_differences(path, outcome)
    yield from _steps_file_differences(steps, outcome)
    with naming(steps):
        records = read_records(steps)
    if steps.exists() and outcome["measurements"]:
        again = summarise_steps(records)
        yield from _unequal(f"{path}: measurements", outcome["measurements"], again, "steps.csv gives")
    yield from _gate_differences(path, outcome, records)


def _steps_file_differences(path: Path, outcome: dict[str, Any]) -> Iterator[str]:
    if not path.exists():
        yield f"{path}: no such file"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != outcome.get("steps_sha256"):
        yield f"{path}: its SHA-256 is not the one in outcome.json: the file was changed after the run"


def _measurement_differences(path: Path, outcome: dict[str, Any]) -> Iterator[str]:
    """What follows from other columns of the same file."""
    from tunemap.measure.ranks import memory_of_run

    values = outcome["measurements"]
    ranks = outcome["memory_by_rank"]
    expected: dict[str, Any] = dict(memory_of_run(ranks)) if ranks else {}
    if values.get("wall_time_s") is not None:
        parts = ("load", "compile", "estimation", "train", "checkpoint", "save", "other")
        expected["wall_time_s"] = sum(values[f"{part}_time_s"] for part in parts)
    period, flops = values.get("step_period_mean_s"), values.get("model_flops_per_step")
    if period and flops is not None:
        expected["model_flops_per_second"] = flops / period
    joules, tokens = values.get("energy_joules"), values.get("energy_window_tokens")
    if joules is not None and tokens:
        expected["energy_per_token_joules"] = joules / tokens
        expected["energy_per_10k_tokens_joules"] = 10_000 * joules / tokens
    yield from _unequal(f"{path}: measurements", values, expected, "the other columns give")


def _gate_differences(path: Path, outcome: dict[str, Any], records: list[StepRecord]) -> Iterator[str]:
    from tunemap.gates import GateResult, tripped
    from tunemap.gates.measurement import throughput_gate
    from tunemap.gates.model import trainable_parameters_gate
    from tunemap.gates.training import finite_loss_gate, gradient_norm_gate

    recorded = {gate["gate"]: GateResult(**gate) for gate in outcome["gates"]}
    trips = tripped(recorded.values())
    if trips and outcome["outcome"] == "ok":
        yield f"{path}: outcome is ok, and fatal gates tripped: {', '.join(gate.gate for gate in trips)}"
    if outcome["outcome"] == "invalid" and not trips:
        yield f"{path}: outcome is invalid, and no fatal gate tripped"
    values = outcome["measurements"]
    first_rank = [record for record in records if record.rank == 0]
    again = [
        throughput_gate(values),
        finite_loss_gate([record.loss for record in first_rank]),
        gradient_norm_gate(
            [record.gradient_norm for record in first_rank],
            scaled=outcome["spec"]["factors"]["precision"] == "fp16",
        ),
    ]
    closed_form = outcome["facts"].get("expected_trainable_parameters")
    if closed_form is not None and values.get("trainable_parameters") is not None:
        again.append(trainable_parameters_gate(values["trainable_parameters"], closed_form))
    for gate in again:
        known = recorded.get(gate.gate)
        if known is not None and known.passed != gate.passed:
            yield f"{path}: gate {gate.gate}: passed is {known.passed}, derived again {gate.passed} ({gate.message})"


# --- evaluations ------------------------------------------------------------------------------------------


def _evaluation_differences(path: Path, planned: dict[str, Any]) -> Iterator[str]:
    evaluation, answers = read_object(path), path.with_name("predictions.jsonl")
    for name, key in (("digest", "evaluation_digest"), ("training_digest", "digest")):
        if evaluation[name] != planned[key]:
            yield f"{path}: {name} is {evaluation[name]}, the plan's is {planned[key]}"
    with naming(answers):
        predictions = _predictions(answers)
    if evaluation["outcome"] != "ok":
        return
    task, kind = evaluation["task"], evaluation["task_kind"]
    for prediction in predictions:
        with naming(answers):
            again = _scored(task, kind, prediction)
        yield from _unequal(f"{answers}: {prediction['id']}", prediction, again, "its output gives")
    yield from _unequal(str(path), evaluation, _accuracy(evaluation, predictions), "predictions.jsonl gives")


def _predictions(path: Path) -> list[dict[str, Any]]:
    predictions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for number, prediction in enumerate(predictions, 1):
        if not isinstance(prediction, dict) or not prediction.keys() >= PREDICTION_KEYS:
            raise ValueError(f"line {number} is no prediction")
    return predictions


def _scored(task: str, task_kind: str, prediction: dict[str, Any]) -> dict[str, Any]:
    from tunemap.data.answers import score

    if task_kind == "classification":
        return {"correct": prediction["output"] == prediction["reference"]}
    names = ("extracted_strict", "extracted_flexible", "correct", "correct_flexible", "malformed")
    scored = score(task, prediction["output"], prediction["reference"])
    return {name: getattr(scored, name) for name in names}


def _accuracy(evaluation: dict[str, Any], predictions: list[dict[str, Any]]) -> dict[str, Any]:
    from tunemap.statistics import wilson

    count, correct = len(predictions), sum(prediction["correct"] for prediction in predictions)
    if count == 0:
        return {"n": 0}
    interval = wilson(correct, count)
    expected = {"n": count, "correct": correct, "accuracy": correct / count}
    expected |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    if evaluation["task_kind"] == "generation":
        shares = {"accuracy_flexible": "correct_flexible", "malformed_share": "malformed"}
        shares |= {"truncated_share": "truncated"}
        expected |= {name: sum(bool(p[key]) for p in predictions) / count for name, key in shares.items()}
    return expected


# --- tables -----------------------------------------------------------------------------------------------


def _measurement_table_differences(results_dir: Path, plan: dict[str, Any]) -> Iterator[str]:
    """Measurements that follow from nothing (memory, energy) are at least what the table of runs says of them."""
    path = results_dir / "tables" / "runs.csv"
    if path.is_file():
        yield from _checked(path, _row_differences(path, results_dir / "runs", plan))


def _row_differences(path: Path, runs_dir: Path, plan: dict[str, Any]) -> Iterator[str]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            outcome = runs_dir / row["run"] / "outcome.json"
            if row["run"] not in plan["runs"] or not outcome.is_file():
                continue
            for name, value in _measurements(outcome).items():
                text = row.get(name)
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if is_number and text and not _same(value, float(text)):
                    yield f"{outcome}: measurements: {name} is {value!r}, {path} says {text}"


def _measurements(path: Path) -> dict[str, Any]:
    """Those of a result; none where it is damaged, which the check of its run says."""
    try:
        found = read_object(path).get("measurements")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _table_differences(results_dir: Path, plan: dict[str, Any]) -> Iterator[str]:
    from tunemap.collect import calibration_of, collect, table_texts
    from tunemap.planner.calibration import CALIBRATION

    try:
        collected = collect(results_dir / PLAN, results_dir)
        calibration = calibration_of(plan, results_dir, collected)
        texts = table_texts(collected)
    except (UserError, *DAMAGE) as error:
        yield f"tables cannot be derived: {error if isinstance(error, UserError) else repr(error)}"
        return
    yield from _checked(results_dir / CALIBRATION, _calibration_differences(results_dir, plan["study"], calibration))
    for name, text in texts.items():
        path = results_dir / "tables" / name
        yield from _checked(path, _text_differences(path, text))


def _text_differences(path: Path, text: str) -> Iterator[str]:
    if not path.exists():
        yield f"{path}: no such file"
    elif (found := path.read_text(encoding="utf-8")) != text:
        yield f"{path}: {_first_difference(found, text)}"


def _calibration_differences(results_dir: Path, study: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Predicted against measured of this study; the file's other rows follow from other studies' results."""
    from tunemap.planner.calibration import CALIBRATION, calibration_text, read_calibration_rows

    path = results_dir / CALIBRATION
    if not path.is_file():
        yield f"{path}: no such file"
        return
    found = calibration_text(row for row in read_calibration_rows(path) if row.get("study") == study)
    if found != (due := calibration_text(rows)):
        yield f"{path}: rows of {study}: {_first_difference(found, due)}"


def _figure_differences(results_dir: Path) -> Iterator[str]:
    """Captions and alternative texts of the figures, which say their numbers; the drawing itself is matplotlib's."""
    path = results_dir / FIGURES
    if not path.is_file():
        return
    from tunemap.report.figures import describe  # matplotlib takes a second

    try:
        due = {drawing["name"]: drawing for drawing in describe(results_dir)}
    except (UserError, *DAMAGE) as error:  # by damaged tables or facts
        yield f"{path}: figures cannot be derived: {error}"
        return
    found = {drawing["name"]: drawing for drawing in read_json(path)}
    for name in dict.fromkeys([*found, *due]):
        if found.get(name) != due.get(name):
            yield f"{path}: {name} is not what the tables give"


def _database_differences(results_dir: Path) -> Iterator[str]:
    """Rows of the database, which has the tables and most of the raw files' contents."""
    from tunemap.report.database import database_differences

    path = results_dir / DATABASE
    if path.is_file() and path.stat().st_size:
        for difference in database_differences(path, results_dir / PLAN, results_dir):
            yield f"{path}: {difference}"


def _first_difference(found: str, expected: str) -> str:
    lines, due = found.splitlines(), expected.splitlines()
    for number, (line, other) in enumerate(zip(lines, due, strict=False), 1):
        if line != other:
            place = next(i for i, (a, b) in enumerate(zip(line + "\n", other + "\n", strict=False)) if a != b)
            start = max(0, place - 20)
            return f"line {number} has {line[start : place + 20]!r}, the raw files give {other[start : place + 20]!r}"
    return f"has {len(lines)} lines, the raw files give {len(due)}"


# --- values -----------------------------------------------------------------------------------------------


def _unequal(where: str, found: dict[str, Any], expected: dict[str, Any], source: str) -> Iterator[str]:
    for name, value in expected.items():
        if not _same(found.get(name), value):
            yield f"{where}: {name} is {found.get(name)!r}, {source} {value!r}"


def _same(found: Any, expected: Any) -> bool:
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (found, expected)]
    if all(numbers):
        return math.isclose(found, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)
    if isinstance(expected, float) and not math.isfinite(expected):
        return found is None  # no measurement, and no JSON
    return bool(found == expected)
