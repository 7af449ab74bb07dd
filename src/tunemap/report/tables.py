"""From runs to answers: points (a run without its seed), each compared with its experiment's baseline.

Two points are compared only where they differ in the factors that the experiment varies. No number here ranks
anything without an interval, and what cannot be told apart is called "not distinguishable".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from tunemap import statistics
from tunemap.config import EVALUATION_FACTORS
from tunemap.gates import GateResult, order_gate
from tunemap.gates.comparison import (
    equal_factors_gate,
    interval_gate,
    same_adapters_gate,
    speed_up_bound_gate,
)
from tunemap.statistics import NOT_DISTINGUISHABLE, Comparison, Interval

# What a row without fine-tuning shares with the runs that it belongs to; its other factors mean nothing.
BASE_FACTORS = ("max_length", "precision", "attention", *sorted(EVALUATION_FACTORS))
# Factors that change which examples are trained on, or in which order.
DATA_FACTORS = frozenset(
    {"model", "dataset", "strategy", "gpus", "per_device_batch_size", "gradient_accumulation", "max_length"}
    | {"batching", "max_steps", "epochs"}
)

SEPARATOR = " · "  # in the label of a point
POINT_MEASURES = (  # mean over seeds with t interval
    "tokens_per_second",
    "samples_per_second",
    "step_time_median_s",
    "train_time_s",
    "peak_allocated_bytes",
    "train_loss",
)
POINT_MEANS = (  # mean over seeds
    "peak_reserved_bytes",
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "other_bytes",
    "trainable_parameters",
)
POINT_COLUMNS = (
    *("experiment", "point", "model", "dataset", "method", "method_kind", "rank"),
    *("runs", "seeds", "outcomes", "reason"),
    *(f"{name}{suffix}" for name in POINT_MEASURES for suffix in ("", "_low", "_high")),
    *POINT_MEANS,
    *("accuracy", "accuracy_low", "accuracy_high", "accuracy_seeds", "examples", "metric"),
    *("front_probability", "front"),
)
COMPARISON_COLUMNS = (
    *("experiment", "model", "dataset", "baseline", "point", "refused", "caveat"),
    *("accuracy_difference", "accuracy_difference_low", "accuracy_difference_high"),
    *("accuracy_examples_low", "accuracy_examples_high", "accuracy_p", "accuracy_p_holm", "accuracy_verdict"),
    *("throughput_ratio", "throughput_ratio_low", "throughput_ratio_high"),
    *("throughput_p", "throughput_p_holm", "throughput_verdict"),
    *("memory_ratio", "memory_ratio_low", "memory_ratio_high", "verdict"),
)
GATE_COLUMNS = ("scope", "experiment", "subject", "gate", "passed", "fatal", "message")


@dataclass(frozen=True)
class Result:
    """What is known of one planned run. Correctness is empty where there is no usable evaluation."""

    run: str
    planned: dict[str, Any]
    outcome: str
    reason: str | None = None
    phase: str | None = None
    step: int | None = None
    measurements: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    gates: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    evaluation_outcome: str = "missing"
    evaluation_reason: str | None = None
    correct: dict[str, bool] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        """Whether this is a row without fine-tuning."""
        return bool(self.planned["method"]["kind"] == "base")


@dataclass(frozen=True)
class Point:
    """The runs of an experiment that differ in nothing but their seed."""

    experiment: str
    label: str
    results: tuple[Result, ...]

    @property
    def planned(self) -> dict[str, Any]:
        """The plan's entry of the first run; the others differ in the seed alone."""
        return self.results[0].planned

    @property
    def is_base(self) -> bool:
        """Whether this is a row without fine-tuning."""
        return self.results[0].is_base

    @property
    def ok(self) -> tuple[Result, ...]:
        """Runs whose measurements may be compared."""
        return tuple(result for result in self.results if result.outcome == "ok")

    @property
    def evaluated(self) -> tuple[Result, ...]:
        """Runs whose accuracy may be compared."""
        return tuple(result for result in self.ok if result.correct)

    def values(self, name: str) -> list[float]:
        """A measurement of every run that has it."""
        found = [result.measurements.get(name) for result in self.ok]
        return [float(value) for value in found if isinstance(value, (int, float))]

    def correctness(self) -> np.ndarray:
        """[seeds, examples], examples in the order of their ids; empty where the runs answered different ones."""
        answers = [result.correct for result in self.evaluated]
        if not answers or any(one.keys() != answers[0].keys() for one in answers):
            return np.zeros((0, 0))
        return np.array([[one[example] for example in sorted(answers[0])] for one in answers], dtype=float)


# --- points -----------------------------------------------------------------------------------------------


def flat_factors(planned: dict[str, Any]) -> dict[str, Any]:
    """Factors of a planned run by the names that a study gives them: `method`, `method.rank`, `learning_rate`, ..."""
    parameters = {f"method.{k}": v for k, v in planned["method"].items() if k not in ("kind", "factors")}
    names = {choice: planned[f"{choice}_name"] for choice in ("model", "dataset", "method")}
    return names | parameters | planned["factors"]


def points_of(plan: dict[str, Any], experiment: dict[str, Any], results: dict[str, Result]) -> list[Point]:
    """The points of one experiment in the plan's order, rows without fine-tuning first."""
    groups: dict[str, list[Result]] = {}
    for run in [*experiment["base_runs"], *experiment["runs"]]:
        factors = {key: value for key, value in flat_factors(plan["runs"][run]).items() if key != "seed"}
        groups.setdefault(json.dumps(factors, sort_keys=True), []).append(results[run])
    return [
        Point(experiment["name"], label, tuple(group))
        for label, group in zip(_labels(list(groups.values()), experiment["vary"]), groups.values(), strict=True)
    ]


def _labels(groups: list[list[Result]], vary: list[str]) -> list[str]:
    """Short names that are unique in their experiment: the method, then what is varied."""
    factors = [flat_factors(group[0].planned) for group in groups]
    labels = []
    for group, values in zip(groups, factors, strict=True):
        shown = [key for key in vary if key in values and (not group[0].is_base or key in BASE_FACTORS)]
        labels.append(_label(values, vary, shown))
    for label in [label for label, count in Counter(labels).items() if count > 1]:
        alike = [index for index, other in enumerate(labels) if other == label]
        differing = [
            key
            for key in factors[alike[0]]
            if key not in vary and key != "seed" and len({repr(factors[index].get(key)) for index in alike}) > 1
        ]
        for index in alike:
            more = [_words(key, factors[index].get(key), always=True) for key in differing]
            labels[index] = SEPARATOR.join([label, *more])
    return labels


def _label(values: dict[str, Any], vary: list[str], shown: list[str]) -> str:
    places = [str(values[key]) for key in ("model", "dataset") if key in vary]
    details = [_words(key, values[key]) for key in shown if key not in ("model", "dataset", "method")]
    return SEPARATOR.join(part for part in [*places, values["method"], *details] if part)


def _words(key: str, value: Any, always: bool = False) -> str:
    """`rank 8`, `gradient checkpointing`; a switch that is off is not mentioned."""
    name = key.removeprefix("method.").replace("_", " ")
    if isinstance(value, bool):
        return name if value else (f"no {name}" if always else "")
    return f"{name} {'none' if value is None else value}"


def _point_row(point: Point) -> dict[str, Any]:
    planned, correct = point.planned, point.correctness()
    accuracy = statistics.accuracy(correct)
    factors = {key: value for key, value in planned["factors"].items() if key != "seed"}
    parameters = {key: value for key, value in flat_factors(planned).items() if key.startswith("method.")}
    row: dict[str, Any] = {
        "experiment": point.experiment,
        "point": point.label,
        "model": planned["model_name"],
        "dataset": planned["dataset_name"],
        "method": planned["method_name"],
        "method_kind": planned["method"]["kind"],
        "rank": planned["method"].get("rank"),
        "runs": len(point.results),
        "seeds": len(point.ok),
        "outcomes": ";".join(f"{name}:{n}" for name, n in Counter(r.outcome for r in point.results).items()),
        "reason": next((result.reason for result in point.results if result.outcome != "ok"), None),
    }
    for name in POINT_MEASURES:
        row |= _interval_cells(name, statistics.mean(point.values(name)))
    for name in POINT_MEANS:
        row[name] = statistics.mean(point.values(name)).estimate
    row |= _interval_cells("accuracy", accuracy)
    row |= {"accuracy_seeds": correct.shape[0], "examples": correct.shape[1]}
    row["metric"] = next((result.evaluation.get("metric") for result in point.evaluated), None)
    extra = {key: _join(value) for key, value in (factors | parameters).items() if key != "method.rank"}
    return {key: _blank(value) for key, value in (row | extra).items()}


def _interval_cells(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _blank(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def _join(value: Any) -> Any:
    return ";".join(map(str, value)) if isinstance(value, list) else value


# --- trade-offs -------------------------------------------------------------------------------------------


def _front(points: list[Point]) -> dict[str, dict[str, Any]]:
    """Whether each point is on the front of accuracy, throughput and memory; by label.

    Bytes are counted, not sampled: a peak of one run has no spread. Throughput of one run has an unknown one, so
    that nothing is said of it.
    """
    objectives: dict[str, list[Interval]] = {}
    for point in points:
        memory = statistics.mean(point.values("peak_allocated_bytes"))
        if len(point.values("peak_allocated_bytes")) == 1:
            memory = Interval(memory.estimate, memory.estimate, memory.estimate)
        less_memory = Interval(-memory.estimate, -memory.high, -memory.low)
        three = [
            statistics.accuracy(point.correctness()),
            statistics.mean(point.values("tokens_per_second")),
            less_memory,
        ]
        if all(objective.is_known for objective in three):
            objectives[point.label] = three
    probabilities = dict(zip(objectives, statistics.front_probability(list(objectives.values())), strict=True))
    return {
        label: {"front_probability": float(p), "front": _front_word(float(p))} for label, p in probabilities.items()
    }


def _front_word(probability: float) -> str:
    if probability >= statistics.CONFIDENCE:
        return "on the front"
    return "beaten" if probability <= 1 - statistics.CONFIDENCE else "undecided"


# --- the equal-factor gate --------------------------------------------------------------------------------


def unequal_factors(first: Point, second: Point, vary: list[str]) -> tuple[list[str], list[str]]:
    """Gate 7. What else than the varied factors differs: what forbids a comparison, and what must be said with it.

    A factor that a method brings along (its own learning rate) is part of the method; it is allowed and named.
    Hardware and package versions are factors that nobody wrote down. Speeds of batch 8 and batch 32 side by side
    once passed as a 3.6-fold gain of LoRA.
    """
    left, right = flat_factors(first.planned), flat_factors(second.planned)
    refused: list[str] = []
    named: list[str] = []
    for key in dict.fromkeys([*left, *right]):
        if key in ("seed", *vary) or left.get(key) == right.get(key):
            continue
        if key.startswith("method.") and "method" in vary:
            continue
        text = f"{key} ({_value(left.get(key))} against {_value(right.get(key))})"
        origins = [point.planned.get("provenance", {}).get(key, "") for point in (first, second)]
        brought = "method" in vary and any(origin == "method" or origin.startswith("method ") for origin in origins)
        (named if brought else refused).append(text)
    for key in ("model", "dataset"):
        if key not in vary and first.planned.get(key) != second.planned.get(key):
            refused.append(f"the definition of {key} {left[key]}")
    refused += _unequal_environments(first, second)
    refused += _unequal_orders(first, second, vary)
    return refused, named


def _value(value: Any) -> str:
    return "none" if value is None else str(_join(value))


HARDWARE = {"cpu": ("model", "physical_cores"), "gpus": ("name", "memory_bytes", "power_limit_w")}
VERSIONS = ("python", "packages", "cuda")


def fingerprint(environment: dict[str, Any]) -> dict[str, str]:
    """Names and versions of a fingerprint by their place in it; not clocks and loads, which change by the minute."""
    found: dict[str, str] = {}
    for part, keys in HARDWARE.items():
        devices = environment.get(part) or []
        for key in keys:
            values = {str(device.get(key)) for device in (devices if isinstance(devices, list) else [devices])}
            found[f"{part}.{key}"] = " + ".join(sorted(values)) or "none"
    for part in VERSIONS:
        value = environment.get(part)
        found |= {f"{part}.{k}": str(v) for k, v in value.items()} if isinstance(value, dict) else {part: str(value)}
    return found


def _unequal_environments(first: Point, second: Point) -> list[str]:
    """Where the machines or the software of two points differ; nothing where a result has no fingerprint."""
    fingerprints = [fingerprint(result.environment) for result in [*second.ok, *first.ok] if result.environment]
    differing: dict[str, str] = {}
    for this in fingerprints[1:]:
        for key, expected in fingerprints[0].items():
            if this.get(key, "none") != expected:
                differing[key] = f"{key} ({this.get(key, 'none')} against {expected})"
    return list(differing.values())


def _unequal_orders(first: Point, second: Point, vary: list[str]) -> list[str]:
    """Gate 9: with the same seed and data factors, every method sees the same examples in the same order."""
    if DATA_FACTORS & set(vary):
        return []
    orders = [
        {result.planned["factors"].get("seed"): result.measurements.get("data_order_hash") for result in point.ok}
        for point in (first, second)
    ]
    for seed in orders[0].keys() & orders[1].keys():
        one, other = orders[0][seed], orders[1][seed]
        if one and other and not order_gate({"this": one, "other": other}).passed:
            return [f"the order of the training examples of seed {seed} ({one} against {other})"]
    return []


# --- comparisons ------------------------------------------------------------------------------------------


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
            fronts |= _front([point for point in group if not point.is_base])
            baseline = _baseline(group, plan["report"].get("baseline_method"))
            if baseline is not None:
                compared = [p for p in group if p is not baseline and (not p.is_base or _base_of(p, baseline))]
                rows += [_comparison(point, baseline, experiment["vary"]) for point in compared]
        point_rows += [_point_row(point) | fronts.get(point.label, {}) for point in points]
        _decide(rows)
        gates += [gate for row in rows for gate in row.pop("gates")]
        comparison_rows += [{key: _blank(value) for key, value in row.items()} for row in rows]
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
    row |= _interval_cells("memory_ratio", memory.effect)
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
            row |= _interval_cells(effect, comparison.effect)
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


# --- LaTeX ------------------------------------------------------------------------------------------------


def points_latex(points: pd.DataFrame) -> str:
    """The points with their intervals as a LaTeX table (needs booktabs)."""
    rows = [
        {
            "Experiment": row["experiment"],
            "Point": row["point"],
            "Seeds": row["seeds"],
            "Accuracy (%)": _range(row, "accuracy", 100, 1),
            "Throughput (tokens/s)": _range(row, "tokens_per_second", 1, 0),
            "Peak memory (MiB)": _range(row, "peak_allocated_bytes", 2**-20, 1),
            "Outcome": row["outcomes"],
        }
        for row in records(points)
    ]
    return _latex(rows, "Points: mean over seeds with 95 % interval.", "tab:points")


def comparisons_latex(comparisons: pd.DataFrame) -> str:
    """Each point against its baseline as a LaTeX table (needs booktabs)."""
    rows = [
        {
            "Experiment": row["experiment"],
            "Point": row["point"],
            "Baseline": row["baseline"],
            "Accuracy (points)": _range(row, "accuracy_difference", 100, 1),
            "Holm p": p_text(row["accuracy_p_holm"]),
            "Throughput (×)": _range(row, "throughput_ratio", 1, 2),
            "Memory (×)": _number(row["memory_ratio"], 2),
            "Accuracy is": row["accuracy_verdict"] or "not compared",
        }
        for row in records(comparisons)
    ]
    return _latex(rows, "Each point against its baseline, with 95 % intervals.", "tab:comparisons")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dicts by column name; an empty cell is None."""
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in frame.to_dict("records")
    ]


def _latex(rows: list[dict[str, Any]], caption: str, label: str) -> str:
    styler = pd.DataFrame(rows).style.hide(axis="index").format(escape="latex", na_rep="")
    styler = styler.format_index(escape="latex", axis="columns")
    return str(
        styler.to_latex(hrules=True, caption=caption.replace("%", r"\%"), label=label, position_float="centering")
    )


def p_text(value: float | None) -> str:
    """A p-value with two figures; below 0.001 only that it is."""
    if value is None or np.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _number(value: Any, digits: int) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def _range(row: dict[str, Any], name: str, factor: float, digits: int) -> str:
    value, low, high = (_scaled(row[f"{name}{suffix}"], factor) for suffix in ("", "_low", "_high"))
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text if low is None or high is None or low == high else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None or np.isnan(value) else value * factor
