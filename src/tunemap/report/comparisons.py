"""From runs to answers: each point compared with its experiment's baseline.

Two points are compared only where they differ in the factors that the experiment varies. No number here ranks
anything without an interval, and what cannot be told apart is called "not distinguishable".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from tunemap import statistics
from tunemap.gates import GateResult
from tunemap.gates.comparison import (
    equal_factors_gate,
    interval_gate,
    same_adapters_gate,
    speed_up_bound_gate,
)
from tunemap.report.equal_factors import DATA_FACTORS, unequal_factors
from tunemap.report.formats import ratio_text, signed
from tunemap.report.points import BASE_FACTORS, Point, Result, blank, front, interval_cells, point_row, points_of
from tunemap.statistics import NOT_DISTINGUISHABLE, Comparison, Interval

COMPARISON_COLUMNS = (
    *("experiment", "model", "dataset", "baseline", "point", "refused", "caveat"),
    *("accuracy_difference", "accuracy_difference_low", "accuracy_difference_high"),
    *("accuracy_examples_low", "accuracy_examples_high", "accuracy_p", "accuracy_p_holm", "accuracy_verdict"),
    *("throughput_ratio", "throughput_ratio_low", "throughput_ratio_high"),
    *("throughput_p", "throughput_p_holm", "throughput_verdict"),
    *("memory_ratio", "memory_ratio_low", "memory_ratio_high", "verdict"),
)
GATE_COLUMNS = ("scope", "experiment", "subject", "gate", "passed", "fatal", "message")


def compare(
    plan: dict[str, Any], results: dict[str, Result]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of points.csv, comparisons.csv, and the gates that comparing tripped or passed."""
    point_rows: list[dict[str, Any]] = []
    comparison_rows: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    for experiment in plan["experiments"]:
        points = points_of(plan, experiment, results)
        fronts: dict[str, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []
        for group in _places(points):
            fronts |= front([point for point in group if not point.is_base])
            baseline = _baseline(group, plan["report"].get("baseline_method"))
            if baseline is not None:
                compared = [p for p in group if p is not baseline and (not p.is_base or _base_of(p, baseline))]
                rows += [_comparison(point, baseline, experiment["vary"]) for point in compared]
        point_rows += [point_row(point) | fronts.get(point.label, {}) for point in points]
        _decide(rows)
        gates += [gate for row in rows for gate in row.pop("gates")]
        comparison_rows += [{key: blank(value) for key, value in row.items()} for row in rows]
    return point_rows, comparison_rows, gates


def _places(points: list[Point]) -> list[list[Point]]:
    """Points of the same model and dataset: only these answer the same question."""
    places: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        places.setdefault((point.planned["model_name"], point.planned["dataset_name"]), []).append(point)
    return list(places.values())


def _baseline(points: list[Point], method: str | None) -> Point | None:
    """The first point of the report's baseline method, else the first point that is trained."""
    trained = [point for point in points if not point.is_base]
    return next((point for point in trained if point.planned["method_name"] == method), trained[0] if trained else None)


def _base_of(base: Point, baseline: Point) -> bool:
    left, right = base.planned["factors"], baseline.planned["factors"]
    return all(left.get(key) == right.get(key) for key in BASE_FACTORS)


def _comparison(point: Point, baseline: Point, vary: list[str]) -> dict[str, Any]:
    """One row without its verdict: that needs all rows of the experiment."""
    row: dict[str, Any] = {
        "experiment": point.experiment,
        "model": point.planned["model_name"],
        "dataset": point.planned["dataset_name"],
        "baseline": baseline.label,
        "point": point.label,
        "gates": [],
    }
    refused: list[str] = []
    named: list[str] = []
    if not point.is_base:
        refused, named = unequal_factors(point, baseline, vary)
        equal = equal_factors_gate(point.label, baseline.label, refused)
        row["gates"].append(_gate(point, equal))
    unusable = [one for one in (point, baseline) if not one.ok]
    if refused:
        row["refused"] = equal.message
    elif unusable:
        row["refused"] = "; ".join(f"{one.label} has no run that ended ok ({_endings(one)})" for one in unusable)
    if "refused" in row:
        return row
    caveats = [f"the method brings along its own {', '.join(named)}"] if named else []
    caveats += [f"{one.label}: {_endings(one)}" for one in (point, baseline) if len(one.ok) < len(one.results)]
    correct, reference = _paired(point, baseline)
    if correct.size and reference.size:
        for one, array in ((point, correct), (baseline, reference)):
            if len(array) == 1 and not one.is_base:
                caveats.append(f"{one.label}: one seed, so that the interval speaks of other examples, not other seeds")
        row["accuracy"] = statistics.accuracy_difference(correct, reference)
        examples = statistics.paired_bootstrap(correct, reference)
        row |= {"accuracy_examples_low": examples.low, "accuracy_examples_high": examples.high}
    else:
        row["accuracy"] = Comparison(statistics.UNKNOWN, float("nan"))
        caveats.append("no accuracy: not both were evaluated on the same examples")
    row["throughput"] = statistics.ratio(point.values("tokens_per_second"), baseline.values("tokens_per_second"))
    memory = statistics.ratio(point.values("peak_allocated_bytes"), baseline.values("peak_allocated_bytes"))
    row |= interval_cells("memory_ratio", memory.effect)
    adapters = _differing_adapters(point, baseline, vary)
    if adapters is not None:
        same = same_adapters_gate(point.label, baseline.label, adapters)
        row["gates"].append(_gate(point, same))
        caveats += [] if same.passed else [same.message]
    row["gates"] += _speed_gates(point, baseline, row["throughput"].effect)
    row["caveat"] = "; ".join(caveats) or None
    return row


def _differing_adapters(point: Point, baseline: Point, vary: list[str]) -> list[str] | None:
    """How the adapters of two methods of the LoRA family differ besides their numbers; None for other methods.

    Over a base in 4 bits peft has layers of another class; they are compared where both bases are alike.
    """
    layers = [
        {name for result in one.ok for name in result.facts.get("adapter_layers") or ()} for one in (point, baseline)
    ]
    if not all(names and all(name.startswith(LORA_LAYERS) for name in names) for names in layers):
        return None
    methods = point.planned["method"], baseline.planned["method"]
    differing = []
    if layers[0] != layers[1] and methods[0].get("quantization_type") == methods[1].get("quantization_type"):
        differing.append(" against ".join("+".join(sorted(names)) for names in layers))
    dtypes = [method.get("adapter_dtype") for method in methods]
    if dtypes[0] != dtypes[1] and "method.adapter_dtype" not in vary:
        differing.append(f"{dtypes[0]} against {dtypes[1]}")
    return differing


LORA_LAYERS = "peft.tuners.lora."


def _endings(point: Point) -> str:
    counts = Counter(result.outcome for result in point.results)
    return ", ".join(f"{count} of {len(point.results)} {outcome}" for outcome, count in counts.items())


def _paired(point: Point, baseline: Point) -> tuple[np.ndarray, np.ndarray]:
    """Correctness of both on the same examples in the same order, or empty arrays."""
    correct, reference = point.correctness(), baseline.correctness()
    same = correct.size and reference.size and point.evaluated[0].correct.keys() == baseline.evaluated[0].correct.keys()
    return (correct, reference) if same else (np.zeros((0, 0)), np.zeros((0, 0)))


def _gate(point: Point, result: GateResult) -> dict[str, Any]:
    return {"scope": "comparison", "experiment": point.experiment, "subject": point.label, **asdict(result)}


def _speed_gates(point: Point, baseline: Point, ratio: Interval) -> Iterator[dict[str, Any]]:
    """Gates 8 and 12: an adapter cannot save more than the weight gradients; a speed without interval ranks nothing."""
    if point.is_base or np.isnan(ratio.estimate):
        return
    kinds = point.planned["method"]["kind"], baseline.planned["method"]["kind"]
    same = all(
        point.planned["factors"].get(key) == value
        for key, value in baseline.planned["factors"].items()
        if key in DATA_FACTORS | {"precision", "gradient_checkpointing", "compile", "attention"}
    )
    if kinds[0] != "full" and kinds[1] == "full" and same:
        surely = ratio.low if ratio.is_known else ratio.estimate
        yield _gate(point, speed_up_bound_gate(baseline.label, ratio.estimate, surely))
    yield _gate(point, interval_gate(point.label, baseline.label, known=ratio.is_known))


# --- verdicts ---------------------------------------------------------------------------------------------


def _decide(rows: list[dict[str, Any]]) -> None:
    """Holm's correction over the comparisons of an experiment, once per measure; then words."""
    compared = [row for row in rows if "accuracy" in row]
    for name, effect, no_effect in (("accuracy", "accuracy_difference", 0.0), ("throughput", "throughput_ratio", 1.0)):
        adjusted = statistics.holm([row[name].p_value for row in compared])
        for row, p_value in zip(compared, adjusted, strict=True):
            comparison: Comparison = row.pop(name)
            row |= interval_cells(effect, comparison.effect)
            row |= {f"{name}_p": comparison.p_value, f"{name}_p_holm": float(p_value)}
            row[f"{name}_verdict"] = _verdict(comparison, float(p_value), no_effect)
    for row in rows:
        row["verdict"] = f"not compared: {row['refused']}" if row.get("refused") else _sentence(row)


def _verdict(comparison: Comparison, adjusted: float, no_effect: float) -> str | None:
    if np.isnan(comparison.effect.estimate):
        return None
    distinguishable = statistics.is_distinguishable(comparison, adjusted, no_effect)
    if distinguishable is None:
        return "no interval"
    if not distinguishable:
        return NOT_DISTINGUISHABLE
    return "higher" if comparison.effect.estimate > no_effect else "lower"


def _sentence(row: dict[str, Any]) -> str:
    parts = []
    if row["accuracy_verdict"]:
        low, high = 100 * row["accuracy_difference_low"], 100 * row["accuracy_difference_high"]
        numbers = f"{signed(100 * row['accuracy_difference'])} points, {signed(low)} to {signed(high)}"
        parts.append(f"accuracy {row['accuracy_verdict']} ({numbers})")
    if row["throughput_verdict"]:
        parts.append(f"throughput {row['throughput_verdict']} ({ratio_text(row, 'throughput_ratio')})")
    if not np.isnan(row["memory_ratio"]):
        parts.append(f"peak memory {ratio_text(row, 'memory_ratio')}")
    return "; ".join(parts) or "nothing to compare"
