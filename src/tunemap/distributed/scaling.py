"""Scaling over devices, from the rows of runs.csv: speed-up and efficiency against one device of the same strategy.

    weak     each device keeps its batch (per_device_batch_size × gradient_accumulation), so the global batch grows
    strong   the global batch stays, so each device's part of it shrinks; losses are comparable step by step

A study asks for either with the factors it has: vary `gpus` alone (weak), or `gpus` together with
`per_device_batch_size` through `only` (strong). Speed-up is the ratio of real tokens per second; efficiency divides
it by the number of devices. The baseline is the run on one device through the same strategy (a group of one
process, wrapped as the others are): an unwrapped baseline would count the strategy's own overhead as communication.

With weak scaling an epoch has fewer, larger steps: compare losses at equal tokens. A larger batch bears a larger
learning rate; √N times is the usual rule for Adam (https://arxiv.org/abs/1404.5997 derives it for SGD,
https://arxiv.org/abs/2205.10287 for Adam), and a study must set it by name, for no rule is applied in silence.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tunemap import statistics
from tunemap.config import EVALUATION_FACTORS, Factors

MODES = ("weak", "strong")
# Factors that may differ between points of one curve: how the batch is dealt out, how often, and what does not
# change the work of a step (the learning rate may follow the batch).
_DEALING = ("gpus", "per_device_batch_size", "gradient_accumulation")
_FREE = (*_DEALING, "seed", "learning_rate", "schedule", "warmup_steps", "max_steps", "epochs", *EVALUATION_FACTORS)
_KEYS = ("model", "dataset", "method", *(name for name in Factors.model_fields if name not in _FREE))
_LARGEST = ("peak_allocated_bytes", "communication_bytes_per_step", "communication_sent_bytes_per_step")


@dataclass(frozen=True)
class ScalingRow:
    """One number of devices on one curve. Without a baseline there is no speed-up, and `reason` says why."""

    mode: str
    curve: str  # what tells it from the other curves of its mode: method, strategy, and the factors that differ
    model: str
    dataset: str
    method: str
    strategy: str
    gpus: int
    per_device_batch_size: int
    gradient_accumulation: int
    runs: int  # repeats that ended well
    failed: int  # repeats that did not
    run_ids: str  # of all repeats, joined by ;
    tokens_per_second: float | None  # geometric mean over the repeats
    speed_up: float | None
    speed_up_low: float | None  # 95 % interval; None with fewer than two repeats on either side
    speed_up_high: float | None
    efficiency: float | None
    efficiency_low: float | None
    efficiency_high: float | None
    peak_allocated_bytes: int | None  # of the rank that needs most
    communication_bytes_per_step: int | None
    communication_sent_bytes_per_step: int | None
    reason: str | None


SCALING_COLUMNS = tuple(field.name for field in fields(ScalingRow))


def scaling_rows(runs: Iterable[Mapping[str, Any]]) -> list[ScalingRow]:
    """The rows of all `scaling_curves`, one after the other."""
    return [row for curve in scaling_curves(runs) for row in curve]


def scaling_curves(runs: Iterable[Mapping[str, Any]]) -> list[list[ScalingRow]]:
    """Every curve of at least two numbers of devices, weak ones first, from rows of runs.csv.

    Runs that differ in nothing but seed and learning-rate settings are repeats of one point.
    """
    trained = [run for run in runs if run.get("method_kind") != "base"]
    found: list[list[ScalingRow]] = []
    for mode in MODES:
        curves: defaultdict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
        for run in trained:
            curves[_curve(run, mode)].append(run)
        several = {key: curve for key, curve in curves.items() if len({run["gpus"] for run in curve}) > 1}
        labels = _labels([dict(key) for key in several], mode)
        found += [_points(curve, mode, label) for label, curve in zip(labels, several.values(), strict=True)]
    return found


def global_batch_size(run: Mapping[str, Any]) -> int:
    """Examples of one optimizer step, over all devices and micro-batches."""
    return int(run["gpus"]) * _device_batch_size(run)


def _device_batch_size(run: Mapping[str, Any]) -> int:
    return int(run["per_device_batch_size"]) * int(run["gradient_accumulation"])


def _curve(run: Mapping[str, Any], mode: str) -> tuple[tuple[str, Any], ...]:
    """Everything that the points of one curve have in common, by name."""
    parameters = sorted(name for name in run if name.startswith("method."))
    batch = _device_batch_size(run) if mode == "weak" else global_batch_size(run)
    return (*((name, _known(run.get(name))) for name in (*_KEYS, "rank", *parameters)), ("batch", batch))


def _labels(curves: Sequence[Mapping[str, Any]], mode: str) -> list[str]:
    """Method, strategy, and what differs of model, dataset and batch; where that is not enough, every other factor."""
    varying = [name for name in ("model", "dataset", "batch") if len({curve[name] for curve in curves}) > 1]
    shown = ("method", "strategy", *varying)
    labels = [SEPARATOR.join(_words(name, curve[name], mode) for name in shown) for curve in curves]
    for label in {label for label in labels if labels.count(label) > 1}:
        places = [place for place, other in enumerate(labels) if other == label]
        names = dict.fromkeys(name for place in places for name in curves[place])
        differing = [name for name in names if len({curves[place].get(name) for place in places}) > 1]
        for place in places:
            more = (_words(name, curves[place].get(name), mode) for name in differing)
            labels[place] = SEPARATOR.join([label, *more])
    return labels


SEPARATOR = " · "  # in the label of a curve


def _words(name: str, value: Any, mode: str) -> str:
    """`lora`, `batch 8 each`, `precision bf16`, `no compile`."""
    if name in ("model", "dataset", "method", "strategy"):
        return str(value)
    if name == "batch":  # what stays along a curve: the batch of a device, or that of all
        return f"batch {value} each" if mode == "weak" else f"batch {value}"
    words = name.removeprefix("method.").replace("_", " ")
    if str(value) in ("True", "False"):
        return words if str(value) == "True" else f"no {words}"
    if value is None:
        return f"{words} none"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def _points(curve: Sequence[Mapping[str, Any]], mode: str, label: str) -> list[ScalingRow]:
    points: defaultdict[tuple[int, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for run in curve:
        points[tuple(int(run[name]) for name in _DEALING)].append(run)
    ones = [repeats for (gpus, *_), repeats in sorted(points.items()) if gpus == 1]
    baseline = max(ones, key=lambda repeats: len(_speeds(repeats)), default=[])
    return [_row(repeats, mode, label, baseline) for _, repeats in sorted(points.items())]


def _row(
    repeats: Sequence[Mapping[str, Any]], mode: str, label: str, baseline: Sequence[Mapping[str, Any]]
) -> ScalingRow:
    first, speeds = repeats[0], _speeds(repeats)
    gpus, strategy = int(first["gpus"]), str(first["strategy"])
    base_speeds = _speeds(baseline)
    effect = statistics.ratio(speeds, base_speeds).effect if speeds and base_speeds else None
    reason = None
    if not speeds:
        reason = "no run ended well: " + ", ".join(sorted({str(run.get("outcome")) for run in repeats}))
    elif not base_speeds:
        reason = f"no run of {strategy} on one device with this batch ended well"
    speed_up = (
        [None, None, None] if effect is None else [_known(effect.estimate), _known(effect.low), _known(effect.high)]
    )
    if repeats is baseline and effect is not None:
        speed_up = [1.0, None, None]
    efficiency = [None if value is None else value / gpus for value in speed_up]
    largest = {
        name: max((run[name] for run in _ok(repeats) if _known(run.get(name)) is not None), default=None)
        for name in _LARGEST
    }
    return ScalingRow(
        mode=mode,
        curve=label,
        model=str(first["model"]),
        dataset=str(first["dataset"]),
        method=str(first["method"]),
        strategy=strategy,
        gpus=gpus,
        per_device_batch_size=int(first["per_device_batch_size"]),
        gradient_accumulation=int(first["gradient_accumulation"]),
        runs=len(speeds),
        failed=len(repeats) - len(_ok(repeats)),
        run_ids=";".join(str(run["run"]) for run in repeats),
        tokens_per_second=math.exp(sum(map(math.log, speeds)) / len(speeds)) if speeds else None,
        speed_up=speed_up[0],
        speed_up_low=speed_up[1],
        speed_up_high=speed_up[2],
        efficiency=efficiency[0],
        efficiency_low=efficiency[1],
        efficiency_high=efficiency[2],
        **{name: None if value is None else int(value) for name, value in largest.items()},
        reason=reason,
    )


def _ok(repeats: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for run in repeats if run.get("outcome") == "ok"]


def _speeds(repeats: Sequence[Mapping[str, Any]]) -> list[float]:
    speeds = [_known(run.get("tokens_per_second")) for run in _ok(repeats)]
    return [float(speed) for speed in speeds if speed is not None]


def _known(value: Any) -> Any:
    """The value, or None for the NaN that pandas makes of an empty cell."""
    return None if isinstance(value, float) and math.isnan(value) else value
