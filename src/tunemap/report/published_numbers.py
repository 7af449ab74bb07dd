"""Published numbers beside ours: like with like only, and for all others the reason why they are not compared.

Alike are two numbers of the same definition, method, model, batch, length, precision, number and class of GPUs. Counts
of parameters depend on model and method alone. `resources/published/numbers.csv` holds the numbers with their trust
(A printed and consistent to D second-hand, X derived) and known flaws, as numbered in docs/validity.md.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, Any]
FILE = Path(__file__).resolve().parents[3] / "resources" / "published" / "numbers.csv"
STUDIES = {"nyu": "NYU", "columbia": "COL", "rtx": "RTX"}
MODELS = {"NYU": "Qwen2.5-1.5B-Instruct", "RTX": "Qwen2.5-1.5B-Instruct", "COL": "distilbert-base-uncased"}
COLUMNS = (
    *("number", "source", "method", "metric", "setting", "published", "unit", "ours", "ratio", "residual"),
    *("trust", "flaw", "point", "not_compared"),
)
MIB = 2.0**-20


@dataclass(frozen=True)
class Measure:
    """Our column for a published metric, and what turns it into the published unit."""

    column: str
    factor: float = 1.0
    of_method_alone: bool = False  # a count: the same whatever the batch, the length or the machine


MEASURES = {
    ("NYU", "trainable_params"): Measure("trainable_parameters", of_method_alone=True),
    ("COL", "trainable_params"): Measure("trainable_parameters", of_method_alone=True),
    ("NYU", "peak_memory"): Measure("peak_allocated_bytes", MIB),
    ("COL", "peak_memory_torch"): Measure("peak_allocated_bytes", MIB),
    ("NYU", "step_time"): Measure("step_time_mean_s"),
    ("NYU", "throughput"): Measure("tokens_per_second"),
    ("NYU", "end_of_run_allocated"): Measure("end_allocated_bytes", MIB),
    ("NYU", "accuracy"): Measure("accuracy", 100.0),
    ("COL", "accuracy"): Measure("accuracy", 100.0),
    ("RTX", "throughput"): Measure("tokens_per_second"),
    ("RTX", "time_per_10k_tokens"): Measure("seconds_per_10k_tokens"),
}
OTHER_DEFINITIONS = {
    ("COL", "throughput"): "examples of all epochs over a clock that includes evaluation and saving",
    ("COL", "train_time"): "a clock that includes evaluation, saving and reloading",
    ("COL", "epoch_time"): "the hardware and the clock of an epoch are not those of a step here",
    ("COL", "peak_memory_nvml"): "memory of the whole board, other programs included",
    ("COL", "peak_memory"): "a reading that the publication itself contradicts",
    ("COL", "total_params"): "4-bit weights counted as bytes",
    ("NYU", "train_loss"): "mean over an epoch on one rank; here the last 10 steps on all ranks",
    ("COL", "eval_loss"): "loss on the validation rows, which is not measured here",
    ("NYU", "throughput_sd"): "a ± without a definition",
    ("NYU", "step_time_sd"): "a ± without a definition",
    ("NYU", "throughput_cv"): "a ± without a definition",
    ("NYU", "step_time_cv"): "spread of a cumulative mean",
}
PREFIXES = {  # of metrics
    "ncu_": "one sampled kernel; here kernels are counted by category over a window",
    "nccl_share": "summed kernel times over summed kernel times; here shares of the window",
    "d2d_memcpy": "copies within a GPU under the name of copies between GPUs",
    "step_latency": "a clock without synchronisation, which times launches",
    "inference_latency": "another machine and no warm-up; see tables/inference.csv",
    "param_efficiency": "a ratio that rewards small heads",
    "throughput_profiled": "taken under a profiler",
    "peak_vram": "taken under a profiler on unknown hardware",
}


def read_numbers(study: str) -> list[dict[str, str]]:
    """The published numbers of a study: nyu, columbia or rtx."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["seed"] == STUDIES[study]]


def compare_published(plan: Row, points: list[Row], runs: list[Row]) -> list[Row]:
    """One row per published number of the study that `report.published` names, those that are compared first."""
    study = plan["report"].get("published")
    if study is None:
        return []
    means = _run_means(plan, runs)
    rows = [_compared(number, plan, points, means) for number in read_numbers(study)]
    return sorted(rows, key=lambda row: row["not_compared"] is not None)


def _run_means(plan: Row, runs: list[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """Means over the runs of each point that ended ok, by experiment and label: what the table of points leaves out."""
    from tunemap.report.scene import point_runs

    by_run = {row["run"]: row for row in runs}
    columns = dict.fromkeys(measure.column for measure in MEASURES.values())
    found = {}
    for experiment in plan["experiments"]:
        for label, names in point_runs(plan, experiment).items():
            ended = [by_run[name] for name in names if by_run[name]["outcome"] == "ok"]
            values = {column: [run[column] for run in ended if run.get(column) is not None] for column in columns}
            found[experiment["name"], label] = {column: fmean(known) for column, known in values.items() if known}
    return found


def _compared(
    number: dict[str, str], plan: Row, points: list[Row], means: dict[tuple[str, str], dict[str, float]]
) -> Row:
    row: Row = {
        "number": number["id"],
        "source": number["source"],
        "method": number["method"],
        "metric": number["metric"],
        "setting": number["setting"] or None,
        "published": number["value"],
        "unit": number["unit"],
        "trust": number["trust"],
        "flaw": number["flaw"] or None,
    }
    measure = MEASURES.get((number["seed"], number["metric"]))
    if measure is None:
        return row | {"not_compared": f"definition: {_other_definition(number)}"}
    reasons = ["no point of this method in the study"]
    for point in points:
        if not _is_method(number, point):
            continue
        unlike = list(_differences(number, measure, point, plan))
        ours = point.get(measure.column)
        ours = means[point["experiment"], point["point"]].get(measure.column) if ours is None else ours
        if ours is None:
            unlike = unlike or [f"{point['point']} has no {measure.column}"]
        elif not unlike:
            return row | _numbers(number, float(ours) * measure.factor) | {"point": point["point"]}
        if reasons[0].startswith("no point") or len(unlike) < len(reasons):
            reasons = unlike
    return row | {"not_compared": "; ".join(reasons)}


def _other_definition(number: dict[str, str]) -> str:
    known = OTHER_DEFINITIONS.get((number["seed"], number["metric"]))
    if known is None:
        known = next((why for start, why in PREFIXES.items() if number["metric"].startswith(start)), None)
    return known or "a claim or a setting, no measurement of one run"


def _numbers(number: dict[str, str], ours: float) -> Row:
    published = float(number["value"])
    return {"ours": ours, "ratio": ours / published, "residual": ours - published, "not_compared": None}


# --- which point is meant ---------------------------------------------------------------------------------


def _is_method(number: dict[str, str], point: Row) -> bool:
    """Whether a point is of the published method: its kind, rank, strategy and gradient checkpointing."""
    words, kind = number["method"], point["method_kind"]
    if kind == "base" or not words:
        return False
    checkpointing = _is_true(point["gradient_checkpointing"])
    if number["seed"] == "NYU" and words.startswith(("FT ", "PEFT ")):
        regime, strategy = words.split()
        published = strategy.lower() if number["gpus"] != "1" else "single"
        return kind == {"FT": "full", "PEFT": "lora"}[regime] and point["strategy"] == published and not checkpointing
    if words == "LoRA+GradCkpt":
        return kind == "lora" and checkpointing
    name, _, rank = words.partition(" r")
    kinds = {"LoRA": "lora", "QLoRA": "qlora", "GoRA": "gora", "Full FT": "full"}
    if number["seed"] == "RTX":
        return kind in ("lora", "qlora") and ("PagedAdamW" in words) == str(point["optimizer"]).startswith("paged")
    if kinds.get(name) != kind or (rank and str(point["rank"]).removesuffix(".0") != rank):
        return False
    return not checkpointing or number["seed"] == "COL"


def _differences(number: dict[str, str], measure: Measure, point: Row, plan: Row) -> Iterator[str]:
    """In what a point is unlike the published run; nothing where the two may be compared."""
    model = _model_of(plan, point["model"])
    if model != MODELS[number["seed"]]:
        yield f"model: {model}, published: {MODELS[number['seed']]}"
    expected = dict(_expected(number))
    counts = ("rank", "method.target_modules", "method.variant")
    for key, due in expected.items():
        if measure.of_method_alone and key not in counts:
            continue
        found = point.get(key)
        if found is not None and not _same(found, due):
            yield f"{key.removeprefix('method.')}: {found}, published: {due}"
    if measure.of_method_alone:
        return
    if number["seed"] == "RTX" and number["trust"] == "D":
        yield "second-hand"
    if number["gpus"] and str(point["gpus"]).removesuffix(".0") != number["gpus"]:
        yield f"gpus: {point['gpus']}, published: {number['gpus']}"
    if number["trust"] == "C":
        yield f"contradicted by the publication or its code ({number['flaw'] or 'see note'})"
    if number["metric"] == "accuracy":
        yield from _unlike_accuracy(number, point, plan)
    else:
        yield from _unlike_hardware(number, point)


def _expected(number: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Factors of the published run, as its code and text give them."""
    seed, setting = number["seed"], number["setting"]
    if seed == "NYU" and (number["method"].startswith(("FT ", "PEFT "))):
        yield from {"per_device_batch_size": 4, "max_length": 256, "precision": "pure_bf16"}.items()
        yield "fsdp_unit", "model" if number["method"].endswith("FSDP") and number["gpus"] != "1" else "block"
    elif seed == "NYU":
        yield from {"per_device_batch_size": 8, "max_length": 512, "precision": "bf16"}.items()
    elif seed == "COL":
        yield from {"max_length": 128, "precision": "fp32"}.items()
        yield "per_device_batch_size", 8 if number["method"] == "Full FT" else 32
    elif seed == "RTX":
        yield from {"per_device_batch_size": 1, "max_length": 512, "precision": "fp16"}.items()
    if number["metric"] == "trainable_params" and number["method"].startswith("LoRA"):
        if seed == "NYU":
            yield "rank", 16
            yield "method.target_modules", "q_proj;v_proj" if "q_proj" in setting else "all-linear"
        else:
            yield "method.target_modules", "q_lin;v_lin"
    if number["method"] == "GoRA":
        yield "method.variant", "gora_hpml"


def _same(found: Any, due: Any) -> bool:
    return float(found) == due if isinstance(due, int) else str(found) == due


def _model_of(plan: Row, name: str) -> str:
    """The name of the model on the hub; of random weights that of the architecture, unless its sizes are changed."""
    model = next(run["model"] for run in plan["runs"].values() if run["model_name"] == name)
    if model["source"] == "hub":
        return str(model["id"]).rpartition("/")[2]
    if model["source"] == "random":
        return str(model["config"]).rstrip("/").rpartition("/")[2] + (" of other sizes" if model["overrides"] else "")
    return f"{name} ({model['source']})"


def _unlike_accuracy(number: dict[str, str], point: Row, plan: Row) -> Iterator[str]:
    model = next(run["model"] for run in plan["runs"].values() if run["model_name"] == point["model"])
    if model["source"] == "random":
        yield "random weights have no accuracy to compare"
    metric = {"NYU": "exact_match_hpml", "COL": "accuracy"}[number["seed"]]
    if point["metric"] != metric:
        yield f"definition: {point['metric']}, published: {metric}"
    rows = {"NYU": 374, "COL": 872}[number["seed"]]
    if point["examples"] is None or int(point["examples"]) != rows:
        yield f"answers of {point['examples']} rows, published: {rows}"


def _unlike_hardware(number: dict[str, str], point: Row) -> Iterator[str]:
    published, device = number["hw"], str(point["device"])
    if "nb:" in published or published in ("", "unknown", "A100"):
        yield f"GPU of the publication: {published or 'not named'} (F38)"
        return
    parts = published.replace("RTX 4060 8GB", "RTX 4060").split("-")
    if not all(part in device for part in parts):
        yield f"GPU: {device}, published: {published}"


def _is_true(value: Any) -> bool:
    return str(value) == "True"
