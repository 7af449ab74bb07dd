"""Which method, strategy and batch for this model on these GPUs: what fits, how fast, what results say of accuracy.

    tunemap advise --model Qwen/Qwen2.5-1.5B-Instruct --gpu rtx4090 --max-length 1024
    tunemap advise --model models/llama --gpu h100 --gpus 8 --max-length 4096 --objective cost --study best.yaml

Memory comes from two accounts of each way to train, at one and at four rows: between and beyond them it is taken for a
straight line in the rows, which it is for a step whose highest moment stays the same. The best three are accounted for
again at the batch that is recommended.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from tunemap.config import DatasetConfig, Factors, HubModel, LocalModel
from tunemap.errors import UserError
from tunemap.hardware import Hardware, load_hardware
from tunemap.planner import cache, cost, device, time
from tunemap.planner.data import data_of
from tunemap.planner.device import Target
from tunemap.planner.plan import make_account
from tunemap.planner.prediction import Account, Data, Work
from tunemap.planner.table import Ticker, span
from tunemap.run import Run

Objective = Literal["throughput", "memory", "cost", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "memory", "cost", "accuracy")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 16},
    "qlora": {"kind": "qlora", "rank": 16},
}
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
PROBED_ROWS = (1, 4)
MOST_ROWS = 64
RECOMMENDED = 3
DATASET = DatasetConfig(task="gsm8k", source="hub", id="openai/gsm8k", subset="main")


@dataclass(frozen=True)
class Option:
    """One way to train. rows: the most per device that fit, of max_length tokens; 0 where not even one does.

    longest: the longest sequence that fits alone. peak_bytes: what a device takes at `rows`. tokens_per_second_*: token
    slots of all devices. accuracy: mean difference in percentage points to the best method of each collected study.
    """

    method: str
    precision: str
    checkpointing: bool
    strategy: str
    gpus: int
    rows: int
    longest: int
    peak_bytes: int
    tokens_per_second_low: float
    tokens_per_second_high: float
    cost_per_million_tokens: float | None
    accuracy: float | None
    accuracy_runs: int
    reason: str = ""

    @property
    def name(self) -> str:
        """Method, then what differs from the plain one."""
        parts = [self.method, *(["checkpointed"] if self.checkpointing else [])]
        return "-".join([*parts, *([self.strategy] if self.strategy != "single" else [])])


@dataclass(frozen=True)
class Advice:
    """All options, the best that fit, why in two sentences, and a study file of them."""

    options: tuple[Option, ...]
    best: tuple[Option, ...]
    why: str
    study: str


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

    budget_bytes: memory per GPU that may be used; None: all that it has. Raises UserError for an unknown model or GPU,
    and where nothing fits, with what would be needed.
    """
    hardware = load_hardware(gpu)
    if hardware.kind != "gpu" or hardware.memory_bytes is None:
        raise UserError(f"--gpu {gpu}: no GPU with known memory; `ls resources/hardware` lists them")
    if objective == "cost" and hardware.price is None:
        raise UserError(f"--objective cost: {hardware.name} has no price; add one to resources/hardware")
    limit = min(hardware.memory_bytes, budget_bytes or hardware.memory_bytes)
    target = replace(Target.gpu(hardware), memory_bytes=limit)
    known = collected_accuracy(results)
    ways = list(_ways(model, hardware, gpus, max_length))
    options = []
    for done, run in enumerate(ways):
        progress(done, len(ways))
        options.append(_option(run, target, results, known))
    progress(len(ways), len(ways))
    fitting = sorted((one for one in options if one.rows), key=_order(objective))
    if not fitting:
        least = min(options, key=lambda one: one.peak_bytes)
        raise UserError(
            f"nothing fits: {least.name} with one row of {max_length} tokens needs {least.peak_bytes / 2**30:.1f} GiB "
            f"per GPU, {limit / 2**30:.1f} GiB are there; use more or larger GPUs, or a shorter --max-length"
        )
    best = _distinct(fitting)
    why = _why(best, objective, hardware, limit, known)
    return Advice(tuple(options), best, why, study_text(model, best, hardware, max_length))


def _ways(model: str, hardware: Hardware, gpus: int, max_length: int) -> Iterator[Run]:
    half: Literal["bf16", "fp16"] = "bf16" if hardware.peak("bfloat16") else "fp16"
    strategies: tuple[Literal["single", "ddp", "fsdp"], ...] = ("single",) if gpus == 1 else ("ddp", "fsdp")
    for method, values in METHODS.items():
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
                        "method": values,
                        "prompt_template": None,
                        "factors": Factors(
                            precision=half,
                            strategy=strategy,
                            gpus=gpus,
                            gradient_checkpointing=checkpointing,
                            max_length=max_length,
                            max_steps=100,
                        ),
                    }
                )


def _source(model: str) -> HubModel | LocalModel:
    path = Path(model).expanduser()
    if path.exists():
        return LocalModel(source="local", path=str(path.resolve() if path.is_dir() else path.resolve().parent))
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise UserError(f"--model {model}: neither a folder here nor a name of the form owner/name on the hub")
    return HubModel(source="hub", id=model)


def _with_rows(run: Run, rows: int) -> Run:
    return run.model_copy(update={"factors": run.factors.model_copy(update={"per_device_batch_size": rows})})


def _account(run: Run, rows: int, target: Target, results: Path) -> tuple[Account, Data]:
    probed = _with_rows(run, rows)
    data = data_of(probed, results)
    key = cache.account_key(probed, data, on_gpu=True)
    found = cache.read_account(key, results)
    if found is None:
        found = make_account(probed, data, target, data_root=Path(), results=results)
        cache.write_account(key, found, results)
    if not isinstance(found, Account):
        raise UserError(found.reason)
    return found, data


def _option(run: Run, target: Target, results: Path, known: dict[str, tuple[float, int]]) -> Option:
    """The largest batch of one way to train, and its speed there."""
    factors, limit = run.factors, round((target.memory_bytes or 0) * device.TIGHT_SHARE)
    probes = [_account(run, rows, target, results) for rows in PROBED_ROWS]
    needs = [sum(device.device_bytes(account, target, devices=factors.gpus).values()) for account, _ in probes]
    per_row = max(1.0, (needs[1] - needs[0]) / (PROBED_ROWS[1] - PROBED_ROWS[0]))
    fixed = needs[0] - per_row * PROBED_ROWS[0]
    rows = int((limit - fixed) // per_row) if needs[0] <= limit else 0
    # Powers of two: the next smaller one is what people choose, and it leaves room for what a prediction misses.
    rows = min(MOST_ROWS, 1 << (rows.bit_length() - 1)) if rows else 0
    longest = int((limit - fixed) / per_row * factors.max_length) if rows else 0
    account, data = probes[1]
    at_rows = replace(account, work=_rows_of(account.work, max(rows, 1) / PROBED_ROWS[1]))
    step = time.step_seconds(at_rows, data, target, threads=1, ceilings={}) or (0.0, 0.0)
    slots = max(rows, 1) * factors.max_length * factors.gpus
    speeds = [slots / seconds if seconds else 0.0 for seconds in step]
    money = cost.costs(step, target.hardware, devices=factors.gpus)
    accuracy, runs = known.get(run.method.kind, (None, 0))
    return Option(
        method=run.method_name,
        precision=factors.precision,
        checkpointing=factors.gradient_checkpointing,
        strategy=factors.strategy,
        gpus=factors.gpus,
        rows=rows,
        longest=longest,
        peak_bytes=round(fixed + per_row * max(rows, 1)),
        tokens_per_second_low=speeds[1],
        tokens_per_second_high=speeds[0],
        cost_per_million_tokens=money.cost_high / slots * 1e6 if money.cost_high is not None else None,
        accuracy=accuracy,
        accuracy_runs=runs,
        reason="" if rows else f"one row needs {needs[0] / 2**30:.1f} GiB",
    )


def _rows_of(work: Work, factor: float) -> Work:
    """The work of so many times the rows: launches stay."""
    return replace(work.scaled(factor), kernels=work.kernels)


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
    best: Sequence[Option], objective: Objective, hardware: Hardware, limit: int, known: dict[str, tuple[float, int]]
) -> str:
    first = best[0]
    sentence = (
        f"{first.name} is first by {objective}: {first.rows} rows fit in {first.peak_bytes / 2**30:.1f} of "
        f"{limit / 2**30:.1f} GiB, at {_speed(first)} tokens/s"
    )
    if len(best) > 1:
        sentence += f", against {_speed(best[1])} of {best[1].name}"
    overlap = len(best) > 1 and best[1].tokens_per_second_high > first.tokens_per_second_low
    sure = (
        "Memory is computed from the step itself (context and allocator are estimates), speed is a roofline range"
        f"{' whose ends overlap, so measure before you trust the order' if overlap else ''}; accuracy "
        + (
            f"is from {sum(runs for _, runs in known.values())} collected runs."
            if known
            else "is not known: no results are collected here."
        )
    )
    return f"{sentence}. {sure}"


def _speed(option: Option) -> str:
    return span(option.tokens_per_second_low, option.tokens_per_second_high, lambda value: f"{value:,.0f}")


def collected_accuracy(results: Path) -> dict[str, tuple[float, int]]:
    """Method kind -> mean difference in percentage points to the best kind of each study, model and data; its runs."""
    import csv

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
    """A study file that compares the options, on GSM8K until somebody names other data."""
    methods = {
        one.name: METHODS[one.method]
        | {
            "factors": {
                "learning_rate": LEARNING_RATES[one.method],
                "strategy": one.strategy,
                "gpus": one.gpus,
                "per_device_batch_size": one.rows,
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
    head = "# Written by `tunemap advise`; batches are the largest that fit: compare speeds, not losses per step.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# --- the command ------------------------------------------------------------------------------------------


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap advise`."""
    parser.add_argument("--model", required=True, help="folder with a config.json, or a name on the hub")
    parser.add_argument("--gpu", required=True, help="name of a file in resources/hardware, such as rtx4090")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them (default: 1)")
    parser.add_argument("--max-length", type=int, required=True, help="longest sequence in tokens")
    parser.add_argument("--objective", choices=OBJECTIVES, default="throughput", help="default: throughput")
    parser.add_argument("--budget-gb", type=float, help="memory per GPU that may be used, in GB (default: all)")
    parser.add_argument("--study", type=Path, help="write a study file of the best three here")
    parser.add_argument("--results", type=Path, default=cache.RESULTS, help="folder of results (default: results)")


def run_advise(arguments: argparse.Namespace) -> int:
    """Print the options, the best and why."""
    for name in ("gpus", "max_length", "budget_gb"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: allowed are numbers above 0")
    advice = advise(
        arguments.model,
        arguments.gpu,
        gpus=arguments.gpus,
        max_length=arguments.max_length,
        objective=arguments.objective,
        budget_bytes=round(arguments.budget_gb * 1e9) if arguments.budget_gb else None,
        results=arguments.results,
        progress=Ticker("advising"),
    )
    console = Console(markup=False, highlight=False)
    table = Table(title=f"Ways to train with {arguments.max_length} tokens on {arguments.gpus} × {arguments.gpu}")
    for column in ("", "way", "rows", "longest", "memory", "tokens/s", "per million tokens", "accuracy"):
        table.add_column(column, justify="left" if column in ("", "way") else "right")
    places = {one.name: str(place) for place, one in enumerate(advice.best, 1)}
    for one in sorted(advice.options, key=lambda one: (not one.rows, places.get(one.name, "9"))):
        table.add_row(
            places.get(one.name, ""),
            one.name,
            str(one.rows) if one.rows else "cannot",
            f"{one.longest:,}" if one.rows else "",
            f"{one.peak_bytes / 2**30:.1f} GiB",
            _speed(one) if one.rows else one.reason,
            f"{one.cost_per_million_tokens:.3f}" if one.cost_per_million_tokens is not None and one.rows else "",
            f"{one.accuracy:+.1f} points ({one.accuracy_runs} runs)" if one.accuracy is not None else "",
        )
    console.print(table)
    console.print(advice.why)
    if arguments.study:
        arguments.study.write_text(advice.study, encoding="utf-8")
        console.print(f"study file of the best {len(advice.best)}: {arguments.study}")
    return 0
