"""Points: the runs of an experiment that differ in nothing but their seed, with means, intervals and Pareto front."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunemap import statistics
from tunemap.config import EVALUATION_FACTORS
from tunemap.statistics import Interval

# What a row without fine-tuning shares with the runs that it belongs to; its other factors mean nothing.
BASE_FACTORS = ("max_length", "precision", "attention", *sorted(EVALUATION_FACTORS))
SEPARATOR = " · "  # in the label of a point
POINT_MEASURES = (  # mean over seeds with t interval
    "tokens_per_second",
    "samples_per_second",
    "step_time_median_s",
    "train_time_s",
    "peak_allocated_bytes",
    "train_loss",
    "energy_per_10k_tokens_joules",
)
POINT_MEANS = (  # mean over seeds
    "step_period_mean_s",
    "data_time_mean_s",
    "forward_time_mean_s",
    "backward_time_mean_s",
    "optimizer_time_mean_s",
    "peak_reserved_bytes",
    "parameters_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "other_bytes",
    "trainable_parameters",
)
POINT_COLUMNS = (
    *("experiment", "point", "model", "dataset", "method", "method_kind", "rank", "device"),
    *("runs", "seeds", "outcomes", "reason"),
    *(f"{name}{suffix}" for name in POINT_MEASURES for suffix in ("", "_low", "_high")),
    *POINT_MEANS,
    *("accuracy", "accuracy_low", "accuracy_high", "accuracy_seeds", "examples", "metric"),
    *("front_probability", "front"),
)


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


def point_row(point: Point) -> dict[str, Any]:
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
        "device": next(filter(None, (device_name(result.environment) for result in point.results)), None),
        "runs": len(point.results),
        "seeds": len(point.ok),
        "outcomes": ";".join(f"{name}:{n}" for name, n in Counter(r.outcome for r in point.results).items()),
        "reason": next((result.reason for result in point.results if result.outcome != "ok"), None),
    }
    for name in POINT_MEASURES:
        row |= interval_cells(name, statistics.mean(point.values(name)))
    for name in POINT_MEANS:
        row[name] = statistics.mean(point.values(name)).estimate
    row |= interval_cells("accuracy", accuracy)
    row |= {"accuracy_seeds": correct.shape[0], "examples": correct.shape[1]}
    row["metric"] = next((result.evaluation.get("metric") for result in point.evaluated), None)
    extra = {key: join_list(value) for key, value in (factors | parameters).items() if key != "method.rank"}
    return {key: blank(value) for key, value in (row | extra).items()}


def device_name(environment: dict[str, Any]) -> str | None:
    """Name of the GPUs that a result was made on, or of the CPU where it used none; None without a fingerprint."""
    gpus = list(dict.fromkeys(gpu.get("name") for gpu in environment.get("gpus") or []))
    names = gpus if gpus and environment.get("device") != "cpu" else [(environment.get("cpu") or {}).get("model")]
    return " + ".join(filter(None, names)) or None


def interval_cells(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def blank(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


def join_list(value: Any) -> Any:
    return ";".join(map(str, value)) if isinstance(value, list) else value


# --- trade-offs -------------------------------------------------------------------------------------------


def front(points: list[Point]) -> dict[str, dict[str, Any]]:
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
