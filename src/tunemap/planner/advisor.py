"""Which method, strategy and batch for this model on these GPUs: what fits, how fast, what results say of accuracy.

    from tunemap.planner.advisor import advise
    print(advise("Qwen/Qwen2.5-1.5B-Instruct", "rtx4090", max_length=1024).why)

Each way to train is accounted for at the batch that it gets, and at those on either side of what fits. No line is drawn
beyond them: where the highest moment is the optimizer's, few rows do not show what many need.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from tunemap.config import DatasetConfig, Factors, HubModel, LocalModel
from tunemap.errors import UserError
from tunemap.hardware import Hardware, load_hardware
from tunemap.planner import cache, cost, device, time
from tunemap.planner.calibration import CALIBRATION
from tunemap.planner.data import data_of
from tunemap.planner.device import Target
from tunemap.planner.largest import largest_power_below, positions_of
from tunemap.planner.plan import make_account
from tunemap.planner.prediction import Account, Data
from tunemap.planner.table import span
from tunemap.run import Run

Precision = Literal["bf16", "pure_bf16", "fp16"]
Strategy = Literal["single", "ddp", "fsdp"]
Objective = Literal["throughput", "memory", "cost", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "memory", "cost", "accuracy")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 16},
    "gora": {"kind": "gora", "reference_rank": 16},
    "qlora": {"kind": "qlora", "rank": 16},
}
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "gora": 2e-4, "qlora": 2e-4}
LEAN: Precision = "pure_bf16"  # weights and optimizer states in half precision: how full fine-tuning fits small GPUs
MOST_ROWS = 64  # per device: more rows seldom train faster, and each doubling costs an account
RECOMMENDED = 3
DATASET = DatasetConfig(task="gsm8k", source="hub", id="openai/gsm8k", subset="main")


@dataclass(frozen=True)
class Option:
    """One way to train. rows: the largest power of two per device, up to 64, that fits, of max_length tokens.

    rows is 0 where not even one fits. longest: the longest sequence that fits alone, of those that the model has
    positions for. peak_bytes: what a device takes at `rows`, or at one. tokens_per_second_*: token slots of all
    devices. accuracy: mean difference in percentage points to the best method of each collected study.
    """

    method: str
    precision: str
    checkpointing: bool
    strategy: str
    gpus: int
    rows: int = 0
    longest: int = 0
    peak_bytes: int = 0
    tokens_per_second_low: float = 0.0
    tokens_per_second_high: float = 0.0
    cost_per_million_tokens: float | None = None
    accuracy: float | None = None
    accuracy_runs: int = 0
    reason: str = ""

    @property
    def name(self) -> str:
        """Method, then what differs from the plain one."""
        extras = {
            "bf16": self.precision == LEAN,
            "checkpointed": self.checkpointing,
            self.strategy: self.strategy != "single",
        }
        return "-".join([self.method, *(name for name, differs in extras.items() if differs)])


@dataclass(frozen=True)
class Advice:
    """All options, the best that fit, why in two sentences, and a study file of them."""

    options: tuple[Option, ...]
    best: tuple[Option, ...]
    why: str
    study: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the best by name, best first."""
        return {
            "best": [one.name for one in self.best],
            "why": self.why,
            "options": [{"name": one.name} | asdict(one) for one in self.options],
            "study": self.study,
        }


def advise(
    model: str,
    gpu: str,
    *,
    gpus: int = 1,
    max_length: int,
    objective: Objective = "throughput",
    budget_bytes: int | None = None,
    results: Path = cache.RESULTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Advice:
    """Compare the ways to train `model` (a folder, or a name on the hub) on `gpus` GPUs of one kind.

    budget_bytes: memory per GPU that may be used; None: all that it has. Full fine-tuning with weights and optimizer in
    bfloat16 is only looked at where it does not fit otherwise. Raises UserError for an unknown model or GPU, a budget
    above the GPU's memory, and where nothing fits, with what would be needed.
    """
    hardware = load_hardware(gpu)
    if hardware.kind != "gpu" or hardware.memory_bytes is None:
        raise UserError(f"--gpu {gpu}: no GPU with known memory; `ls resources/hardware` lists them")
    if objective == "cost" and hardware.price is None:
        raise UserError(f"--objective cost: {hardware.name} has no price; add one to resources/hardware")
    if budget_bytes is not None and budget_bytes > hardware.memory_bytes:
        raise UserError(f"--budget-gb {budget_bytes / 1e9:g}: {hardware.name} has {hardware.memory_bytes / 1e9:.1f} GB")
    limit = budget_bytes or hardware.memory_bytes
    target = replace(Target.gpu(hardware), memory_bytes=limit)
    known = collected_accuracy(results)
    ways = {_name(run): run for run in _ways(model, hardware, gpus, max_length)}
    total = len(ways)
    options: dict[str, Option] = {}
    for name, run in ways.items():
        plain = [one for one in options.values() if one.method == "full" and one.precision != LEAN]
        if run.factors.precision == LEAN and any(one.rows for one in plain):
            total -= 1  # nobody who has room for full precision wants less
            continue
        progress(len(options), total)
        options[name] = _option(run, target, results, known)
    progress(total, total)
    fitting = sorted((one for one in options.values() if one.rows), key=_order(objective))
    if not fitting:
        least = min(options.values(), key=lambda one: one.peak_bytes)
        raise UserError(
            f"nothing fits: {least.name} with one row of {max_length} tokens needs {least.peak_bytes / 2**30:.1f} GiB "
            f"per GPU, {limit / 2**30:.1f} GiB are there; use more or larger GPUs, or a shorter --max-length"
        )
    best = _distinct(fitting)
    why = _why(best, objective, limit, known, calibrated(results))
    return Advice(tuple(options.values()), best, why, study_text(model, best, hardware, max_length))


def _ways(model: str, hardware: Hardware, gpus: int, max_length: int) -> Iterator[Run]:
    half: Precision = "bf16" if hardware.peak("bfloat16") else "fp16"
    strategies: tuple[Strategy, ...] = ("single",) if gpus == 1 else ("ddp", "fsdp")
    precisions: list[tuple[str, Precision]] = [(method, half) for method in METHODS]
    if half == "bf16":
        precisions.insert(1, ("full", LEAN))
    for method, precision in precisions:
        for strategy in strategies:
            for checkpointing in (False, True):
                yield Run.model_validate(
                    {
                        "id": "",
                        "model_name": "model",
                        "model": _source(model),
                        "dataset_name": "data",
                        "dataset": DATASET,
                        "method_name": method,
                        "method": METHODS[method],
                        "prompt_template": None,
                        "factors": Factors(
                            precision=precision,
                            strategy=strategy,
                            gpus=gpus,
                            gradient_checkpointing=checkpointing,
                            max_length=max_length,
                            max_steps=100,
                        ),
                    }
                )


def _name(run: Run) -> str:
    return _empty_option(run).name


def _empty_option(run: Run) -> Option:
    """The way of a run, before anything is known of it."""
    factors = run.factors
    return Option(
        method=run.method_name,
        precision=factors.precision,
        checkpointing=factors.gradient_checkpointing,
        strategy=factors.strategy,
        gpus=factors.gpus,
    )


def _source(model: str) -> HubModel | LocalModel:
    path = Path(model).expanduser()
    if path.exists():
        return LocalModel(source="local", path=str(path.resolve() if path.is_dir() else path.resolve().parent))
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise UserError(f"--model {model}: neither a folder here nor a name of the form owner/name on the hub")
    return HubModel(source="hub", id=model)


def _account(run: Run, rows: int, length: int, target: Target, results: Path) -> tuple[Account, Data]:
    sizes = {"per_device_batch_size": rows, "max_length": length}
    sized = run.model_copy(update={"factors": run.factors.model_copy(update=sizes)})
    data = data_of(sized, results)
    key = cache.account_key(sized, data, on_gpu=True)
    found = cache.read_account(key, results)
    if found is None:
        found = make_account(sized, data, target, data_root=Path(), results=results)
        cache.write_account(key, found, results)
    if not isinstance(found, Account):
        raise UserError(found.reason)
    return found, data


def _needed(account: Account, target: Target, gpus: int) -> int:
    return sum(device.device_bytes(account, target, devices=gpus).values())


def _option(run: Run, target: Target, results: Path, known: dict[str, tuple[float, int]]) -> Option:
    """The largest batch of one way to train, and its speed there."""
    factors, limit = run.factors, round((target.memory_bytes or 0) * device.TIGHT_SHARE)
    length, positions = factors.max_length, positions_of(run, Path(), results)
    accounts: dict[int, tuple[Account, Data]] = {}
    needs: dict[int, int] = {}  # by tokens of a batch

    def needed(rows: int) -> int:
        accounts[rows] = _account(run, rows, length, target, results)
        needs[rows * length] = _needed(accounts[rows][0], target, factors.gpus)
        return needs[rows * length]

    # Powers of two: the next smaller one is what people choose, and it leaves room for what a prediction misses.
    rows = largest_power_below(needed, limit, most=MOST_ROWS)
    if rows == MOST_ROWS and rows * length < positions:  # nothing that is too much has been seen yet
        needs[positions] = _needed(_account(run, 1, positions, target, results)[0], target, factors.gpus)
    shown = max(rows, 1)
    accuracy, runs = known.get(run.method.kind, (None, 0))
    return replace(
        _empty_option(run),
        rows=rows,
        longest=_longest(needs, limit, positions) if rows else 0,
        peak_bytes=needs[shown * length],
        accuracy=accuracy,
        accuracy_runs=runs,
        reason="" if rows else f"one row needs {needs[length] / 2**30:.1f} GiB",
        **_speeds(*accounts[shown], target, shown * length * factors.gpus, factors.gpus),
    )


def _longest(needs: dict[int, int], limit: int, positions: int) -> int:
    """Tokens of the longest row that fits, by a line between the largest batch that fits and the next that does not.

    Memory bends upwards in the tokens, if at all, so the line says rather too little than too much.
    """
    fits = max(tokens for tokens, need in needs.items() if need <= limit)
    if fits >= positions:
        return positions
    above = min(tokens for tokens, need in needs.items() if need > limit)
    share = (limit - needs[fits]) / (needs[above] - needs[fits])
    return min(positions, fits + int((above - fits) * share))


def _speeds(account: Account, data: Data, target: Target, slots: int, gpus: int) -> dict[str, Any]:
    """Fields of an option whose step, of so many token slots, has this account."""
    step = time.step_seconds(account, data, target, threads=1, ceilings={}) or (0.0, 0.0)
    fastest, slowest = (slots / seconds if seconds else 0.0 for seconds in step)
    money = cost.costs(step, target.hardware, devices=gpus)
    return {
        "tokens_per_second_low": slowest,
        "tokens_per_second_high": fastest,
        "cost_per_million_tokens": money.cost_high / slots * 1e6 if money.cost_high is not None else None,
    }


def _order(objective: Objective) -> Callable[[Option], tuple[float, ...]]:
    """What to sort by; equals go to the faster one."""

    def speed(one: Option) -> float:
        return -((one.tokens_per_second_low * one.tokens_per_second_high) ** 0.5)

    if objective == "memory":
        return lambda one: (one.peak_bytes / one.rows, speed(one))
    if objective == "cost":
        return lambda one: (one.cost_per_million_tokens or 0.0, speed(one))
    if objective == "accuracy":
        order = list(METHODS)  # without results: the fewer weights are frozen or rounded, the better
        return lambda one: (-one.accuracy if one.accuracy is not None else order.index(one.method), speed(one))
    return lambda one: (speed(one),)


def _distinct(fitting: Sequence[Option]) -> tuple[Option, ...]:
    """The best three, of different methods first."""
    firsts = [one for index, one in enumerate(fitting) if one.method not in {o.method for o in fitting[:index]}]
    rest = [one for one in fitting if one not in firsts]
    chosen = (firsts + rest)[:RECOMMENDED]
    return tuple(sorted(chosen, key=fitting.index))


def _why(
    best: Sequence[Option], objective: Objective, limit: int, known: dict[str, tuple[float, int]], calibration: str
) -> str:
    """Why the first is first, and how sure that is: two sentences."""
    first = best[0]
    reason = (
        f"{first.name} is first by {objective}: {_rows(first.rows)} in {first.peak_bytes / 2**30:.1f} of "
        f"{limit / 2**30:.1f} GiB, at {speed_words(first)} tokens/s"
    )
    if len(best) > 1:
        reason += f", against {speed_words(best[1])} of {best[1].name}"
    overlap = len(best) > 1 and max(one.tokens_per_second_low for one in best[:2]) < min(
        one.tokens_per_second_high for one in best[:2]
    )
    accuracy = (
        f"accuracy is from {sum(runs for _, runs in known.values())} collected runs"
        if known
        else "accuracy is not known, for no results are collected here"
        + (", and the order of the methods is that of how many weights they train" if objective == "accuracy" else "")
    )
    return (
        f"{reason}. Memory is computed from the training step itself ({calibration}); speed is a range between what "
        f"the GPU reaches at best and on awkward shapes"
        f"{', and the first two overlap: measure before you trust their order' if overlap else ''}; {accuracy}."
    )


def _rows(count: int) -> str:
    return "1 row fits" if count == 1 else f"{count} rows fit"


def speed_words(option: Option) -> str:
    """Tokens per second as a range."""
    return span(option.tokens_per_second_low, option.tokens_per_second_high, lambda value: f"{value:,.0f}")


def calibrated(results: Path) -> str:
    """How predictions of memory did in the runs that were collected on GPUs, in words."""
    path = results / CALIBRATION
    errors = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["device"] != "cpu"]
            errors = [abs(float(row["memory_error"])) for row in rows if row["memory_error"]]
    if not errors:
        return "no GPU run is collected here that would say how well"
    return f"off by {statistics.median(errors):.1%} in the middle of {len(errors)} collected GPU runs"


def collected_accuracy(results: Path) -> dict[str, tuple[float, int]]:
    """Method kind -> mean difference in percentage points to the best kind of each study, model and data; its runs."""
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for path in sorted(results.glob("*/tables/runs.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("outcome") == "ok" and row.get("accuracy") and row.get("method_kind") in METHODS:
                    group = (path.parent.parent.name, row["model"], row["dataset"])
                    groups.setdefault(group, {}).setdefault(row["method_kind"], []).append(float(row["accuracy"]))
    gaps: dict[str, list[tuple[float, int]]] = {}
    for kinds in groups.values():
        if len(kinds) < 2:
            continue
        means = {kind: sum(values) / len(values) for kind, values in kinds.items()}
        for kind, mean in means.items():
            gaps.setdefault(kind, []).append((100 * (mean - max(means.values())), len(kinds[kind])))
    return {
        kind: (sum(gap for gap, _ in found) / len(found), sum(runs for _, runs in found))
        for kind, found in gaps.items()
    }


def study_text(model: str, best: Sequence[Option], hardware: Hardware, max_length: int) -> str:
    """A study file that compares the options at one global batch, on GSM8K until somebody names other data."""
    most = max(one.rows for one in best)
    methods = {
        one.name: METHODS[one.method]
        | {
            "factors": {
                "learning_rate": LEARNING_RATES[one.method],
                "strategy": one.strategy,
                "gpus": one.gpus,
                "per_device_batch_size": one.rows,
                "gradient_accumulation": most // one.rows,
                "gradient_checkpointing": one.checkpointing,
                "precision": one.precision,
            }
        }
        for one in best
    }
    values = {
        "study": "advised",
        "models": {"model": _source(model).model_dump(mode="json")},
        "datasets": {"gsm8k": DATASET.model_dump(mode="json", exclude_defaults=True)},
        "methods": methods,
        "defaults": {"model": "model", "dataset": "gsm8k", "max_length": max_length, "max_steps": 200, "epochs": None},
        "experiments": [
            {
                "name": "advised",
                "question": "Which of the advised ways to train is the best here?",
                "vary": {"method": list(methods)},
            }
        ],
        "hardware": {"device": "cuda", "description": hardware.name},
    }
    if len({one.checkpointing for one in best}) > 1:
        values["accept_flaws"] = ["F39"]  # each option at its best is the question here, not what checkpointing costs
    head = (
        "# Written by `tunemap advise`; batches are the largest powers of two that fit, up to "
        f"{MOST_ROWS}, accumulated to the same rows per step.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
