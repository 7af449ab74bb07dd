"""The tables of three published studies as functions of the results, in one style: each number with interval and runs.

NYU I to III (methods, LoRA against GoRA, DDP against FSDP), Columbia I to III (ranks of LoRA, of QLoRA, speed), and the
metrics of the RTX study. Where an original misleads, its place is taken by what can be said: a ratio stands only where
the comparison was not refused, and beside each number stand the gates that its runs fail.

    tables/published_tables.csv     one row per cell: table, title, row, column, value, low, high, text, runs, fails
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
COLUMNS = ("table", "title", "row", "column", "value", "low", "high", "text", "runs", "fails")
MIB = 2.0**-20


@dataclass(frozen=True)
class Metric:
    """A column of the points (or of a run), as a table shows it."""

    title: str
    column: str
    factor: float = 1.0
    digits: int = 1


THROUGHPUT = Metric("Throughput, tokens/s", "tokens_per_second", 1, 1)
SAMPLES = Metric("Throughput, examples/s", "samples_per_second", 1, 1)
STEP_TIME = Metric("Step time, s", "step_time_median_s", 1, 4)
CV = Metric("Step time CV within a run, %", "step_time_cv", 100, 2)
MEMORY = Metric("Peak memory, MiB", "peak_allocated_bytes", MIB, 1)
ACCURACY = Metric("Accuracy, %", "accuracy", 100, 2)
LOSS = Metric("Train loss", "train_loss", 1, 4)
TRAINABLE = Metric("Trainable parameters", "trainable_parameters", 1, 0)
TRAIN_TIME = Metric("Training time, s", "train_time_s", 1, 1)
SECONDS_10K = Metric("Time per 10k tokens, s", "seconds_per_10k_tokens", 1, 2)
RESERVED = Metric("Reserved memory, MiB", "peak_reserved_bytes", MIB, 1)
ENERGY = Metric("Energy per 10k tokens, J", "energy_per_10k_tokens_joules", 1, 1)
POWER_LIMIT = Metric("Power limit × time, J", "power_limit_joules", 1, 1)


class Source:
    """The tables that the cells are made of: points, their runs, comparisons and gates; rows as dicts."""

    def __init__(self, plan: Row, points: list[Row], runs: list[Row], comparisons: list[Row], gates: list[Row]) -> None:
        from tunemap.report.scene import point_runs

        self.plan, self.points = plan, [point for point in points if point["method_kind"] != "base"]
        self._runs = {row["run"]: row for row in runs}
        self._compared = {(row["experiment"], row["point"]): row for row in comparisons}
        self._names = {
            (experiment["name"], label): names
            for experiment in plan["experiments"]
            for label, names in point_runs(plan, experiment).items()
        }
        self._tripped: dict[tuple[str | None, str], list[str]] = {}  # by experiment, which a run's gate has none of
        for gate in gates:
            if str(gate["passed"]) == "False":
                subject = gate["experiment"], str(gate["subject"])
                self._tripped.setdefault(subject, []).append(str(gate["gate"]))
        self._flaws = {one["name"]: [flaw["flaw"] for flaw in one.get("flaws", [])] for one in plan["experiments"]}

    def runs_of(self, point: Row) -> list[Row]:
        """The runs of a point, however they ended."""
        return [self._runs[name] for name in self._names[point["experiment"], point["point"]]]

    def ok_runs_of(self, point: Row) -> list[Row]:
        """Those of them whose measurements count."""
        return [run for run in self.runs_of(point) if run["outcome"] == "ok"]

    def comparison(self, point: Row) -> Row | None:
        """How a point compares with its experiment's baseline."""
        return self._compared.get((point["experiment"], point["point"]))

    def fails(self, point: Row) -> str:
        """Gates that the point's runs or its comparison fail, and the flaws that its experiment repeats."""
        names = [gate for run in self.runs_of(point) for gate in self._tripped.get((None, run["run"]), [])]
        names += self._tripped.get((point["experiment"], point["point"]), [])
        found = [*dict.fromkeys(names), *self._flaws.get(point["experiment"], [])]
        return ", ".join(found)

    def first(self, *, wanted: Callable[[Row], bool]) -> Row | None:
        """The first point that is wanted, in the plan's order."""
        return next((point for point in self.points if wanted(point)), None)


def published_tables(study: str, source: Source) -> list[Row]:
    """All cells of the tables of a published study (nyu, columbia or rtx)."""
    makers = {"nyu": (_nyu_1, _nyu_2, _nyu_3), "columbia": (_columbia_1, _columbia_2, _columbia_3), "rtx": (_rtx,)}
    return [cell for make in makers[study] for cell in make(source)]


@dataclass(frozen=True)
class PageTable:
    """A published table as it stands in the page."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page_tables(cells: list[Row]) -> list[PageTable]:
    """The cells as tables: a line per row, a column per column, and last the gates and flaws of the line's runs."""
    tables = []
    for name, title in dict.fromkeys((str(one["table"]), str(one["title"])) for one in cells):
        mine = [one for one in cells if one["table"] == name]
        columns = list(dict.fromkeys(str(one["column"]) for one in mine))
        lines = []
        for row in dict.fromkeys(str(one["row"]) for one in mine):
            line = {str(one["column"]): one for one in mine if one["row"] == row}
            fails = dict.fromkeys(str(one["fails"]) for one in line.values() if one.get("fails"))
            texts = [str(line[column]["text"]) if column in line else "—" for column in columns]
            lines.append((row, *texts, "; ".join(fails) or "none"))
        tables.append(PageTable(name, title, ("", *columns, "Fails"), tuple(lines)))
    return tables


# --- cells ------------------------------------------------------------------------------------------------


def cell(source: Source, table: tuple[str, str], row: str, column: str, point: Row | None, metric: Metric) -> Row:
    """One number with interval, runs and failed gates; where it does not exist, the text says why."""
    base: Row = {"table": table[0], "title": table[1], "row": row, "column": column}
    if point is None:
        return base | {"text": "not in this study"}
    value, low, high = (point.get(f"{metric.column}{suffix}") for suffix in ("", "_low", "_high"))
    if value is None:
        found = [run[metric.column] for run in source.ok_runs_of(point) if run.get(metric.column) is not None]
        value = sum(found) / len(found) if found and all(isinstance(one, (int, float)) for one in found) else None
    base |= {"runs": f"{point['seeds']} of {point['runs']}", "fails": source.fails(point) or None}
    if value is None:
        return base | {"text": point["reason"] or "not measured"}
    scaled = [None if one is None else one * metric.factor for one in (value, low, high)]
    return base | {"value": scaled[0], "low": scaled[1], "high": scaled[2], "text": _text(scaled, metric.digits)}


def _text(values: list[float | None], digits: int) -> str:
    value, low, high = values
    text = f"{value:,.{digits}f}"
    return text if low is None or low == high else f"{text} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratio_cell(source: Source, table: tuple[str, str], row: str, column: str, point: Row | None, measure: str) -> Row:
    """A ratio to the experiment's baseline; where the comparison was refused, the raw ratio stands with the reason."""
    base: Row = {"table": table[0], "title": table[1], "row": row, "column": column}
    compared = None if point is None else source.comparison(point)
    if point is None or compared is None:
        return base | {"text": "not in this study" if point is None else "baseline"}
    base |= {"runs": f"{point['seeds']} of {point['runs']}", "fails": source.fails(point) or None}
    if compared.get("refused"):
        raw = raw_ratio(source, point, measure)
        stated = "" if raw is None else f"{raw:.2f}×, refused: "
        return base | {"value": raw, "text": f"{stated}{compared['refused']}"}
    value = compared[f"{measure}_ratio"]
    if value is None or math.isnan(value):
        return base | {"text": "not measured"}
    low, high = (compared[f"{measure}_ratio_{end}"] for end in ("low", "high"))
    if low is None or math.isnan(low):
        low = high = None
    return base | {"value": value, "low": low, "high": high, "text": f"{_text([value, low, high], 2)}×"}


def raw_ratio(source: Source, point: Row, measure: str) -> float | None:
    """What dividing the two numbers gives, whether they may be compared or not."""
    compared = source.comparison(point)
    name = compared["baseline"] if compared else None
    column = {"throughput": "tokens_per_second", "memory": "peak_allocated_bytes"}[measure]
    baseline = source.first(wanted=lambda one: (one["experiment"], one["point"]) == (point["experiment"], name))
    if baseline is None or not point[column] or not baseline[column]:
        return None
    return float(point[column]) / float(baseline[column])


def _table(source: Source, table: tuple[str, str], rows: dict[str, Row | None], metrics: list[Metric]) -> Iterator[Row]:
    for name, point in rows.items():
        for metric in metrics:
            yield cell(source, table, name, metric.title, point, metric)


def is_on(value: Any) -> bool:
    """Whether a switch of a point is on, as memory or a file has it."""
    return str(value) == "True"


def _kind(kind: str, *, checkpointing: bool = False, **factors: Any) -> Callable[[Row], bool]:
    def wanted(point: Row) -> bool:
        same = point["method_kind"] == kind and is_on(point["gradient_checkpointing"]) == checkpointing
        return same and all(str(point.get(key)).removesuffix(".0") == str(value) for key, value in factors.items())

    return wanted


# --- NYU --------------------------------------------------------------------------------------------------


def single_device_methods(source: Source) -> dict[str, Row | None]:
    """The four methods of the study on one device, and the two rows that it left out."""
    one: Row = {"strategy": "single"}
    return {
        "Full": source.first(wanted=_kind("full", **one)),
        "LoRA": source.first(wanted=_kind("lora", **one)),
        "GoRA": source.first(wanted=_kind("gora", **one)),
        "QLoRA": source.first(wanted=_kind("qlora", **one)),
        "LoRA, checkpointing": source.first(wanted=_kind("lora", checkpointing=True, **one)),
        "QLoRA, checkpointing": source.first(wanted=_kind("qlora", checkpointing=True, **one)),
    }


def _nyu_1(source: Source) -> Iterator[Row]:
    table = ("NYU I", "Methods on one device; ratios to the baseline of their experiment")
    rows = single_device_methods(source)
    if not any(rows.values()):
        return
    for name, point in rows.items():
        yield cell(source, table, name, "Accuracy, %", point, ACCURACY)
        yield ratio_cell(source, table, name, "Throughput, ratio", point, "throughput")
        yield ratio_cell(source, table, name, "Peak memory, ratio", point, "memory")


def _nyu_2(source: Source) -> Iterator[Row]:
    table = ("NYU II", "LoRA against GoRA")
    rows = {name: point for name, point in single_device_methods(source).items() if name in ("LoRA", "GoRA")}
    if not any(rows.values()):
        return
    yield from _table(source, table, rows, [STEP_TIME, CV, THROUGHPUT, MEMORY, TRAINABLE, LOSS, ACCURACY])


def _nyu_3(source: Source) -> Iterator[Row]:
    table = ("NYU III", "DDP against FSDP; peak memory of the largest rank")
    spread = [point for point in source.points if point["strategy"] in ("ddp", "fsdp", "hybrid")]
    for kind, regime in (("full", "Full FT"), ("lora", "PEFT")):
        for gpus in sorted({int(point["gpus"]) for point in spread}):
            for metric in (MEMORY, STEP_TIME, THROUGHPUT, LOSS):
                row = f"{regime} {metric.title}, {gpus} device{'s' if gpus > 1 else ''}"
                for strategy in ("ddp", "fsdp", "hybrid"):
                    point = source.first(wanted=_kind(kind, strategy=strategy, gpus=gpus))
                    if point is not None:
                        yield cell(source, table, row, strategy.upper(), point, metric)


# --- Columbia ---------------------------------------------------------------------------------------------


def ranks_of(source: Source, kind: str) -> dict[str, Row | None]:
    """The points of a kind by rank, of the experiment with most ranks."""
    groups: dict[str, dict[int, Row]] = {}
    for point in source.points:
        if point["method_kind"] == kind and point["rank"] is not None:
            groups.setdefault(point["experiment"], {}).setdefault(int(point["rank"]), point)
    ranks = max(groups.values(), key=len, default={})
    return {f"{kind} rank {rank}": ranks[rank] for rank in sorted(ranks)}


def _by_rank(source: Source, table: tuple[str, str], kind: str) -> Iterator[Row]:
    ranks = ranks_of(source, kind)
    if not ranks:
        return
    experiment = next(point["experiment"] for point in ranks.values() if point is not None)
    full = source.first(wanted=lambda one: one["method_kind"] == "full" and one["experiment"] == experiment)
    rows: dict[str, Row | None] = {"full": full} if full is not None else {}
    rows |= ranks
    yield from _table(source, table, rows, [ACCURACY, TRAINABLE, MEMORY, SAMPLES, TRAIN_TIME])
    for name, point in rows.items():
        yield ratio_cell(source, table, name, "Throughput, ratio to full", point, "throughput")


def _columbia_1(source: Source) -> Iterator[Row]:
    yield from _by_rank(source, ("Columbia I", "LoRA by rank; the batch is part of the point"), "lora")


def _columbia_2(source: Source) -> Iterator[Row]:
    yield from _by_rank(source, ("Columbia II", "QLoRA by rank; the batch is part of the point"), "qlora")


def _columbia_3(source: Source) -> Iterator[Row]:
    table = ("Columbia III", "Speed and memory of timed runs, eager and compiled; none is under a profiler")
    for kind in ("full", "lora", "qlora"):
        for compiled in (False, True):
            name = f"{kind}, {'compiled' if compiled else 'eager'}"
            point = source.first(wanted=_compiled(kind, compiled))
            if point is not None:
                yield from _table(source, table, {name: point}, [STEP_TIME, MEMORY, TRAINABLE])


def _compiled(kind: str, compiled: bool) -> Callable[[Row], bool]:
    return lambda point: point["method_kind"] == kind and is_on(point["compile"]) == compiled


# --- RTX --------------------------------------------------------------------------------------------------


def _rtx(source: Source) -> Iterator[Row]:
    table = ("RTX", "Throughput, time, memory and energy; the power limit times the time is no measurement")
    metrics = [THROUGHPUT, SECONDS_10K, MEMORY, RESERVED, ENERGY, POWER_LIMIT]
    rows = {f"{point['experiment']}: {point['point']}": point for point in source.points}
    yield from _table(source, table, dict(rows), metrics)
