"""`tunemap verify results/STUDY`: derive everything again from the raw files, and say what differs.

Raw files are steps.csv, predictions.jsonl, the plan, and what a run measured once (memory, energy, parts of its time).
Everything else follows from them: summaries in outcome.json and evaluation.json, gates, digests, and all tables.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json, sha256_of

PLAN = "plan.json"
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
    print(f"{runs} runs: digests, summaries, gates, tables and figures all follow from the raw files")
    return 0


def _made_by_other_sources(results_dir: Path) -> int:
    """How many results carry a source digest that is not this package's."""
    from tunemap.measure.environment import package_digest

    found = [read_json(path).get("environment", {}) for path in (results_dir / "runs").glob("*/outcome.json")]
    return sum(one.get("source_digest", package_digest()) != package_digest() for one in found)


def verify(results_dir: Path) -> list[str]:
    """Every difference between the derived files of a study and what its raw files give; empty if there is none.

    Raises UserError where there is no plan to compare with.
    """
    if not (results_dir / PLAN).exists():
        raise UserError(f"{results_dir}: no {PLAN}; give the folder of a study, such as results/quickstart")
    plan = read_json(results_dir / PLAN)
    differences = list(_checksum_differences(results_dir))
    for run, planned in plan["runs"].items():
        differences += _plan_differences(run, planned)
        differences += _run_differences(results_dir / "runs" / run, planned)
        differences += _evaluation_differences(results_dir / "evaluations" / run, planned)
    differences += [*_measurement_table_differences(results_dir, plan), *_table_differences(results_dir, plan)]
    return differences + list(_figure_differences(results_dir))


# --- checksums --------------------------------------------------------------------------------------------


def _checksum_differences(results_dir: Path) -> Iterator[str]:
    """In an unpacked artifact: every file that is not what was packed."""
    root = results_dir.resolve().parent.parent
    if not (root / CHECKSUMS).is_file():
        return
    for line in (root / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (root / name).is_file():
            yield f"{name}: no such file, but {CHECKSUMS} has it"
        elif sha256_of(root / name) != digest:
            yield f"{name}: its SHA-256 is not the one in {CHECKSUMS}: the file was changed after packing"


# --- digests ----------------------------------------------------------------------------------------------


def _plan_differences(run: str, planned: dict[str, Any]) -> Iterator[str]:
    from tunemap.run import Run, canonical_json

    found = Run.from_json(canonical_json({key: planned[key] for key in Run.model_fields}))
    for name, digest in (("digest", found.training_digest), ("evaluation_digest", found.evaluation_digest)):
        if planned[name] != digest:
            yield f"{PLAN}: run {run}: {name} is {planned[name]}, its factors give {digest}"


# --- runs -------------------------------------------------------------------------------------------------


def _run_differences(folder: Path, planned: dict[str, Any]) -> Iterator[str]:
    from tunemap.run import Run, canonical_json

    path = folder / "outcome.json"
    try:
        outcome = read_json(path)
    except UserError as error:
        yield str(error)
        return
    if outcome["digest"] != planned["digest"]:
        yield f"{path}: digest is {outcome['digest']}, the plan's is {planned['digest']}"
    spec = Run.from_json(canonical_json(outcome["spec"])).training_digest
    if spec != outcome["digest"]:
        yield f"{path}: digest is {outcome['digest']}, its spec gives {spec}"
    yield from _steps_differences(folder, outcome)
    yield from _measurement_differences(path, outcome)
    yield from _gate_differences(path, outcome)


def _steps_differences(folder: Path, outcome: dict[str, Any]) -> Iterator[str]:
    from tunemap.training.steps import read_records, summarise_steps

    path = folder / "steps.csv"
    if not path.exists():
        yield f"{path}: no such file"
        return
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if checksum != outcome.get("steps_sha256"):
        yield f"{path}: its SHA-256 is not the one in outcome.json: the file was changed after the run"
    records = read_records(path)
    if not outcome["measurements"]:
        return
    again = summarise_steps(records)
    yield from _unequal(f"{folder / 'outcome.json'}: measurements", outcome["measurements"], again, "steps.csv gives")


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


def _gate_differences(path: Path, outcome: dict[str, Any]) -> Iterator[str]:
    from tunemap.gates import GateResult, tripped
    from tunemap.gates.measurement import throughput_gate
    from tunemap.gates.model import trainable_parameters_gate
    from tunemap.gates.training import finite_loss_gate, gradient_norm_gate
    from tunemap.training.steps import read_records

    recorded = {gate["gate"]: GateResult(**gate) for gate in outcome["gates"]}
    trips = tripped(recorded.values())
    if trips and outcome["outcome"] == "ok":
        yield f"{path}: outcome is ok, and fatal gates tripped: {', '.join(gate.gate for gate in trips)}"
    if outcome["outcome"] == "invalid" and not trips:
        yield f"{path}: outcome is invalid, and no fatal gate tripped"
    values, records = outcome["measurements"], read_records(path.parent / "steps.csv")
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


def _evaluation_differences(folder: Path, planned: dict[str, Any]) -> Iterator[str]:
    path = folder / "evaluation.json"
    try:
        evaluation = read_json(path)
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        predictions = [json.loads(line) for line in lines]
    except (UserError, OSError, ValueError) as error:
        yield f"{folder}: {error}"
        return
    for name, key in (("digest", "evaluation_digest"), ("training_digest", "digest")):
        if evaluation[name] != planned[key]:
            yield f"{path}: {name} is {evaluation[name]}, the plan's is {planned[key]}"
    if evaluation["outcome"] != "ok":
        return
    for prediction in predictions:
        yield from _unequal(
            f"{folder / 'predictions.jsonl'}: {prediction['id']}",
            prediction,
            _scored(evaluation["task"], evaluation["task_kind"], prediction),
            "its output gives",
        )
    yield from _unequal(str(path), evaluation, _accuracy(evaluation, predictions), "predictions.jsonl gives")


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
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            outcome = results_dir / "runs" / row["run"] / "outcome.json"
            if row["run"] not in plan["runs"] or not outcome.is_file():
                continue
            for name, value in read_json(outcome).get("measurements", {}).items():
                text = row.get(name)
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if is_number and text and not _same(value, float(text)):
                    yield f"{outcome}: measurements: {name} is {value!r}, {path} says {text}"


def _table_differences(results_dir: Path, plan: dict[str, Any]) -> Iterator[str]:
    from tunemap.collect import calibration_of, collect, table_texts

    try:
        collected = collect(results_dir / PLAN, results_dir)
        calibration = calibration_of(plan, results_dir, collected)
    except UserError as error:
        yield f"tables cannot be derived: {error}"
        return
    yield from _calibration_differences(results_dir, plan["study"], calibration)
    for name, text in table_texts(collected).items():
        path = results_dir / "tables" / name
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
    path = results_dir / "figures" / "figures.json"
    if not path.is_file():
        return
    from tunemap.report.figures import describe  # matplotlib takes a second

    try:
        due = {drawing["name"]: drawing for drawing in describe(results_dir)}
    except (UserError, KeyError, ValueError) as error:
        yield f"{path}: figures cannot be derived: {error}"
        return
    found = {drawing["name"]: drawing for drawing in read_json(path)}
    for name in dict.fromkeys([*found, *due]):
        if found.get(name) != due.get(name):
            yield f"{path}: {name} is not what the tables give"


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
