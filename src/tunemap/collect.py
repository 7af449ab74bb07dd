"""From the result files of a study to its tables: every planned run is a row, however it ended.

    results/STUDY/runs/RUN/outcome.json, steps.csv        what training wrote
    results/STUDY/evaluations/RUN/evaluation.json, predictions.jsonl
    results/STUDY/predictions.json         what was predicted of each run
    results/STUDY/tables/runs.csv          one row per run, in the plan's order
    results/STUDY/tables/experiments.csv   which run belongs to which experiment
    results/STUDY/tables/points.csv        one row per experiment and point: all factors but the seed
    results/STUDY/tables/comparisons.csv   each point of an experiment against its baseline
    results/STUDY/tables/gates.csv         every validity gate of every run and comparison
    results/STUDY/tables/losses.csv        loss curves, thinned for drawing
    results/STUDY/tables/ranks.csv         rank and importance of each adapted module, where a method chose them
    results/STUDY/tables/environment.csv   machine and software, with the number of runs that had each value
    results/STUDY/tables/inference.csv     what runs cost when they are used, where an experiment asks for it
    results/STUDY/tables/published.csv     published numbers beside ours, where the study repeats a published one
    results/STUDY/tables/published_tables.csv   the tables of that publication, one row per cell
    results/calibration.csv                predicted against measured, runs of all studies; a copy with each study

A result that belongs to another plan is refused; a missing or broken file is a row with the reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from tunemap.distributed.scaling import SCALING_COLUMNS, scaling_rows
from tunemap.errors import UserError
from tunemap.files import read_json, read_sealed, sha256_of, write_atomic
from tunemap.gates.comparison import memory_prediction_gate
from tunemap.gates.measurement import mfu_bounds_gate
from tunemap.loss_curves import Curve, loss_table, read_curve
from tunemap.measure.datasheet import datasheet_columns, hardware_of
from tunemap.planner.calibration import calibration_rows, predicted_columns, read_predictions, record_calibration
from tunemap.report.comparisons import COMPARISON_COLUMNS, GATE_COLUMNS, compare
from tunemap.report.equal_factors import fingerprint
from tunemap.report.formats import records
from tunemap.report.latex import comparisons_latex, points_latex
from tunemap.report.points import POINT_COLUMNS, Result
from tunemap.report.published_numbers import COLUMNS as PUBLISHED_COLUMNS
from tunemap.report.published_numbers import compare_published
from tunemap.report.published_tables import COLUMNS as CELL_COLUMNS
from tunemap.report.published_tables import Source, published_tables

OUTCOMES = ("ok", "oom", "timeout", "error", "invalid", "unsupported")  # of a run; collect adds `missing`
MEASUREMENTS = (
    "tokens_per_second",
    "samples_per_second",
    "label_tokens_per_second",
    "padded_tokens_per_second",
    "seconds_per_10k_tokens",
    "steps",
    "measured_steps",
    "step_time_mean_s",
    "step_time_sd_s",
    "step_time_cv",
    "step_time_median_s",
    "step_time_p95_s",
    "data_time_mean_s",
    "forward_time_mean_s",
    "backward_time_mean_s",
    "optimizer_time_mean_s",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "end_allocated_bytes",
    "driver_process_bytes",
    "host_rss_peak_bytes",
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "other_bytes",
    "step_period_mean_s",
    "cpu_time_mean_s",
    "tokens_per_step_mean",
    "model_flops_per_step",
    "hardware_flops_per_step",
    "model_flops_per_second",
    "mfu_measured",
    "hfu_measured",
    "mfu_datasheet",
    "hfu_datasheet",
    "energy_joules",
    "energy_window_s",
    "energy_window_tokens",
    "energy_per_token_joules",
    "energy_per_10k_tokens_joules",
    "power_limit_joules",
    "cost",
    "cost_per_10k_tokens",
    "cost_currency",
    "train_loss",
    "trainable_parameters",
    "total_parameters",
    "adapter_parameters",
    "head_parameters",
    "load_time_s",
    "compile_time_s",
    "estimation_time_s",
    "train_time_s",
    "checkpoint_time_s",
    "save_time_s",
    "other_time_s",
    "wall_time_s",
    "tokens",
    "label_tokens",
    "padded_tokens",
    "padding_waste_share",
    "samples",
    "steps_planned",
    "data_order_hash",
)
EVALUATION = ("task", "task_kind", "split", "metric", "correct", "accuracy", "accuracy_low", "accuracy_high")
EVALUATION_DETAILS = ("accuracy_flexible", "malformed_share", "truncated_share", "evaluation_time_s")


@dataclass(frozen=True)
class Tables:
    """The tables of a study; every field is a file `tables/{field}.csv`."""

    runs: pd.DataFrame
    experiments: pd.DataFrame
    points: pd.DataFrame
    comparisons: pd.DataFrame
    gates: pd.DataFrame
    losses: pd.DataFrame
    ranks: pd.DataFrame
    scaling: pd.DataFrame
    environment: pd.DataFrame
    inference: pd.DataFrame
    published: pd.DataFrame
    published_tables: pd.DataFrame


# --- reading ----------------------------------------------------------------------------------------------


def collect(plan_path: Path, results_dir: Path) -> Tables:
    """Read every result that the plan names and build all tables; `results_dir` is results/STUDY.

    Raises UserError where a result's digest is not the plan's.
    """
    plan = read_json(plan_path)
    _refuse_foreign_results(plan, results_dir)
    predictions = read_predictions(results_dir)
    curves: dict[str, Curve] = {}
    results: dict[str, Result] = {}
    for run, planned in plan["runs"].items():
        result = _read_run(run, planned, results_dir)
        curve, problem = read_curve(results_dir / "runs" / run / "steps.csv")
        if problem and result.outcome == "ok" and not result.is_base:
            result = replace(result, gates=(*result.gates, _gate("steps_file", problem)))
        if curve is not None:
            curves[run] = curve
        if result.measurements:
            columns = predicted_columns(predictions.get(run))
            result = replace(result, measurements=result.measurements | columns)
        results[run] = _apply_gates(_with_datasheet(result, plan["hardware"].get("description")))
    points, comparisons, comparison_gates = compare(plan, results)
    memberships: dict[str, list[str]] = {run: [] for run in results}
    for experiment, run in _memberships(plan):
        memberships[run].append(experiment)
    rows = [_run_row(result, memberships[run]) for run, result in results.items()]
    return Tables(
        runs=_frame(rows),
        experiments=pd.DataFrame(_memberships(plan), columns=["experiment", "run"]),
        points=_frame(points, POINT_COLUMNS),
        comparisons=_frame(comparisons, COMPARISON_COLUMNS),
        gates=_frame([*_run_gates(results), *comparison_gates], GATE_COLUMNS),
        losses=loss_table(curves),
        ranks=_frame(list(rank_rows(results)), RANK_COLUMNS),
        scaling=_frame([asdict(row) for row in scaling_rows(rows)], SCALING_COLUMNS),
        environment=_frame(_environment_rows(results), ("name", "value", "runs")),
        inference=_frame(list(_inference_rows(plan, results_dir)), INFERENCE_COLUMNS),
        **_published(plan, points, rows, comparisons, [*_run_gates(results), *comparison_gates]),
    )


INFERENCE_COLUMNS = (
    *("run", "form", "latency_mean_s", "latency_median_s", "latency_p95_s", "units_per_second", "units_per_call"),
    *("repetitions", "peak_allocated_bytes", "reason"),
)


def _inference_rows(plan: dict[str, Any], results_dir: Path) -> Iterator[dict[str, Any]]:
    """One row per form of each run whose inference was measured; a missing or foreign file is a row with the reason."""
    for run in dict.fromkeys(run for experiment in plan["experiments"] for run in experiment.get("inferences", [])):
        found, problem = _read_object(results_dir / "inference" / f"{run}.json")
        if found is None or found.get("training_digest") != plan["runs"][run]["digest"]:
            yield {"run": run, "reason": problem or "of another configuration"}
        elif not found["forms"]:
            yield {"run": run, "reason": found["reason"]}
        else:
            yield from ({"run": run} | form for form in found["forms"])


Rows = list[dict[str, Any]]


def _published(
    plan: dict[str, Any], points: Rows, runs: Rows, comparisons: Rows, gates: Rows
) -> dict[str, pd.DataFrame]:
    """What a study has beside its own tables that repeats a published one; empty tables for any other."""
    study = plan["report"].get("published")
    cells = published_tables(study, Source(plan, points, runs, comparisons, gates)) if study else []
    return {
        "published": _frame(compare_published(plan, points, runs), PUBLISHED_COLUMNS),
        "published_tables": _frame(cells, CELL_COLUMNS),
    }


def _refuse_foreign_results(plan: dict[str, Any], results_dir: Path) -> None:
    """A result that was made from other settings must never stand under this plan's names."""
    problems = []
    for run, planned in plan["runs"].items():
        for path, key, expected in (
            (results_dir / "runs" / run / "outcome.json", "digest", planned["digest"]),
            (results_dir / "evaluations" / run / "evaluation.json", "training_digest", planned["digest"]),
            (results_dir / "evaluations" / run / "evaluation.json", "digest", planned["evaluation_digest"]),
        ):
            found, _ = _read_object(path)
            if found and key in found and found[key] != expected:
                problems.append(f"run {run}: {path}: {key} is {found[key]}, the plan's is {expected}")
                break
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        advice = (
            "These results were made from other settings. Run the workflow again (it repeats exactly these runs), "
            "or delete the files."
        )
        raise UserError("\n".join([*problems[:10], *more, advice]))


def _read_object(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A JSON object and no problem, or None and the problem."""
    if not path.exists():
        return None, "missing"
    try:
        return read_sealed(path), ""
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{path}: {error.strerror}"


def _read_run(run: str, planned: dict[str, Any], results_dir: Path) -> Result:
    """Everything that is known of one run; never raises for the content of a file."""
    path = results_dir / "runs" / run / "outcome.json"
    found, problem = _read_object(path)
    if found is None:
        missing = problem == "missing"
        result = Result(run, planned, "missing" if missing else "error", f"no {path}" if missing else problem)
    else:
        outcome, reason = found.get("outcome"), found.get("reason")
        steps = path.with_name("steps.csv")
        if outcome == "ok" and "steps_sha256" in found and steps.exists() and sha256_of(steps) != found["steps_sha256"]:
            outcome, reason = "error", f"{steps}: changed after it was written; delete the folder and run again"
        if outcome not in OUTCOMES:
            outcome, reason = "error", f"{path}: outcome is {outcome!r}; allowed: {', '.join(OUTCOMES)}"
        elif "digest" not in found:
            outcome, reason = "error", f"{path}: has no digest, so that nobody knows what it belongs to"
        measurements = found.get("measurements")
        environment, facts = found.get("environment"), found.get("facts")
        result = Result(
            run=run,
            planned=planned,
            outcome=outcome,
            reason=None if reason is None else str(reason),
            phase=_text(found.get("phase")),
            step=found.get("step"),
            measurements=_scalars(measurements) if isinstance(measurements, dict) else {},
            environment=environment if isinstance(environment, dict) else {},
            gates=tuple(gate for gate in found.get("gates") or () if isinstance(gate, dict) and "gate" in gate),
            facts=facts if isinstance(facts, dict) else {},
        )
    return _with_evaluation(result, results_dir / "evaluations" / run)


def _with_evaluation(result: Result, folder: Path) -> Result:
    found, problem = _read_object(folder / "evaluation.json")
    if found is None:
        if problem == "missing":
            return replace(result, evaluation_outcome="missing", evaluation_reason=f"no {folder / 'evaluation.json'}")
        return replace(result, evaluation_outcome="error", evaluation_reason=problem)
    if "digest" not in found:
        reason = f"{folder / 'evaluation.json'}: has no digest, so that nobody knows what it belongs to"
        return replace(result, evaluation_outcome="error", evaluation_reason=reason)
    result = replace(
        result,
        evaluation=_scalars(found),
        evaluation_outcome=str(found.get("outcome")),
        evaluation_reason=_text(found.get("reason")),
    )
    if found.get("outcome") != "ok":
        return result
    predictions, expected = folder / "predictions.jsonl", found.get("predictions_sha256")
    correct, problem = _read_predictions(predictions)
    if not problem and expected is not None and sha256_of(predictions) != expected:
        problem = f"{predictions}: changed after it was written; delete the folder and run the workflow again"
    if not problem and (len(correct), sum(correct.values())) != (found.get("n"), found.get("correct")):
        problem = (
            f"{folder}: predictions.jsonl has {sum(correct.values())} of {len(correct)} correct, "
            f"evaluation.json says {found.get('correct')} of {found.get('n')}"
        )
    if problem:
        return replace(result, evaluation_outcome="error", evaluation_reason=problem)
    return replace(result, correct=correct)


def _read_predictions(path: Path) -> tuple[dict[str, bool], str]:
    """Whether each example was answered correctly, by its id, or a problem."""
    correct: dict[str, bool] = {}
    number = 0  # what cannot be decoded fails before its first line
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if row["id"] in correct:
                    return {}, f"{path}: line {number}: example {row['id']} a second time"
                correct[row["id"]] = bool(row["correct"])
    except FileNotFoundError:
        return {}, f"no {path}"
    except OSError as error:
        return {}, f"{path}: cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return {}, f"{path}: not UTF-8, behind line {number}"
    except (ValueError, KeyError, TypeError) as error:
        return {}, f"{path}: line {number}: no prediction ({error!r})"
    return correct, ""


def _scalars(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and texts; a NaN, an infinity or a nested value is no measurement."""
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _with_datasheet(result: Result, description: str | None) -> Result:
    """Add what follows from the description of the device: utilisation against its datasheet, and cost."""
    if not result.measurements:
        return result
    factors = result.planned["factors"]
    columns = datasheet_columns(
        result.measurements,
        hardware_of(result.environment, description),
        precision=factors["precision"],
        devices=factors["gpus"],
    )
    return replace(result, measurements=result.measurements | {k: v for k, v in columns.items() if v is not None})


# --- gates of a single run --------------------------------------------------------------------------------


def _gate(name: str, message: str, *, passed: bool = False, fatal: bool = False) -> dict[str, Any]:
    return {"gate": name, "passed": passed, "fatal": fatal, "message": message}


def _apply_gates(result: Result) -> Result:
    """Add the bounds, and make a run that trips a fatal gate `invalid`; it keeps its data."""
    if result.outcome != "ok":
        return result
    gates = (*result.gates, *bounds(result.measurements))
    fatal = [f"{gate['gate']}: {gate.get('message')}" for gate in gates if gate.get("fatal") and not gate.get("passed")]
    if fatal:
        return replace(result, gates=gates, outcome="invalid", reason="; ".join(fatal))
    return replace(result, gates=gates)


def bounds(measurements: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Gate 8: no device does more than its peak, and a memory model that is 10 % off explains nothing."""
    for name, value in measurements.items():
        if name.startswith(("mfu_", "hfu_")) and _is_number(value):
            yield asdict(mfu_bounds_gate(name, value))
    predicted, measured = measurements.get("predicted_peak_bytes"), measurements.get("peak_allocated_bytes")
    if _is_number(predicted) and _is_number(measured) and measured:
        yield asdict(memory_prediction_gate(float(predicted or 0), float(measured)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- rows -------------------------------------------------------------------------------------------------


def _memberships(plan: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (experiment["name"], run)
        for experiment in plan["experiments"]
        for run in [*experiment["runs"], *experiment["base_runs"]]
    ]


def _run_row(result: Result, experiments: list[str]) -> dict[str, Any]:
    planned, evaluation = result.planned, result.evaluation
    parameters = {key: value for key, value in planned["method"].items() if key not in ("kind", "factors", "rank")}
    seen = evaluation if result.evaluation_outcome == "ok" else {}
    extra = {key: value for key, value in result.measurements.items() if key not in MEASUREMENTS}
    return {
        "run": result.run,
        "experiment": ";".join(experiments),
        "model": planned["model_name"],
        "dataset": planned["dataset_name"],
        "method": planned["method_name"],
        "method_kind": planned["method"]["kind"],
        "rank": planned["method"].get("rank"),
        **{key: planned["factors"].get(key) for key in ("strategy", "gpus", "seed")},
        "outcome": result.outcome,
        "reason": result.reason,
        "phase": result.phase,
        "step": result.step,
        "evaluation_outcome": result.evaluation_outcome,
        "evaluation_reason": result.evaluation_reason,
        **{key: seen.get(key) for key in EVALUATION},
        "examples": seen.get("n"),
        **{key: seen.get(key) for key in EVALUATION_DETAILS},
        **{key: result.measurements.get(key) for key in MEASUREMENTS},
        **{key: value for key, value in planned["factors"].items() if key not in ("strategy", "gpus", "seed")},
        **{f"method.{key}": _cell(value) for key, value in parameters.items()},
        **extra,
    }


def _cell(value: Any) -> Any:
    """A parameter of a method as one value: a list joined, the parameters of a peft type as JSON."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return ";".join(map(str, value)) if isinstance(value, list) else value


def _run_gates(results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    for result in results.values():
        for gate in result.gates:
            kept = {key: gate.get(key) for key in ("gate", "passed", "fatal", "message")}
            yield {"scope": "run", "experiment": None, "subject": result.run, **kept}


RANK_COLUMNS = ("run", "module", "layer", "part", "rank", "reference_rank", "importance")


def rank_rows(results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    """The plan of each run whose method chose ranks: one row per adapted module, in the model's order.

    `layer` is the number in the module's name, `part` its last step; `importance` is empty where nothing was estimated.
    """
    for result in results.values():
        plan = result.facts.get("gora")
        if not isinstance(plan, dict):
            continue
        for module, values in plan["modules"].items():
            steps = module.split(".")
            yield {
                "run": result.run,
                "module": module,
                "layer": next((int(step) for step in steps if step.isdigit()), None),
                "part": steps[-1],
                "rank": values["rank"],
                "reference_rank": plan["settings"]["reference_rank"],
                "importance": values["importance"],
            }


def _environment_rows(results: dict[str, Result]) -> list[dict[str, Any]]:
    counts = Counter(
        item for result in results.values() if result.environment for item in fingerprint(result.environment).items()
    )
    names = list(dict.fromkeys(name for name, _ in counts))
    ordered = sorted(counts.items(), key=lambda item: names.index(item[0][0]))
    return [{"name": name, "value": value, "runs": runs} for (name, value), runs in ordered]


def _frame(rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """A table that keeps whole numbers whole and missing values empty; given columns come first."""
    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names})


# --- files ------------------------------------------------------------------------------------------------


def write_tables(plan_path: Path, results_dir: Path) -> None:
    """Collect a study and write `tables/*.csv`, the two main tables as LaTeX, and the plan that they follow.

    Predicted against measured joins the record of all studies.
    """
    collected = collect(plan_path, results_dir)
    write_atomic(results_dir / "plan.json", plan_path.read_text(encoding="utf-8"))
    for name, text in table_texts(collected).items():
        write_atomic(results_dir / "tables" / name, text)
    plan = read_json(plan_path)
    record_calibration(results_dir, plan["study"], calibration_of(plan, results_dir, collected))


def table_texts(collected: Tables) -> dict[str, str]:
    """What stands in `tables/`, by file name."""
    texts = {
        f"{field.name}.csv": getattr(collected, field.name).to_csv(index=False, lineterminator="\n")
        for field in fields(Tables)
    }
    texts["points.tex"] = points_latex(collected.points)
    texts["comparisons.tex"] = comparisons_latex(collected.comparisons)
    return texts


def calibration_of(plan: dict[str, Any], results_dir: Path, collected: Tables) -> list[dict[str, Any]]:
    """What was predicted of this study's runs beside what was measured: its rows in the record of all studies."""
    return calibration_rows(plan["study"], plan["runs"], read_predictions(results_dir), records(collected.runs))


def read_tables(folder: Path) -> Tables:
    """Read the tables that `write_tables` wrote; a missing one is a UserError."""
    frames = {}
    for field in fields(Tables):
        path = folder / f"{field.name}.csv"
        try:
            frames[field.name] = pd.read_csv(path, keep_default_na=False, na_values=[""])
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; make the tables first") from None
    return Tables(**frames)
