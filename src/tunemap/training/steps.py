"""The record of each step: written per rank while training goes on, merged and summarised when it ended.

Imports no torch: the launcher reads these files after a crash of everything else.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tunemap.files import write_atomic
from tunemap.measure.clock import summarise


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one rank. Counts are this rank's; the loss is the global one, per label token.

    elapsed_s: since training began, at the end of the step. measured: whether the step counts in timings; the
    first steps, the step that the memory tracker watched, and the first step after a resumption do not.
    """

    rank: int
    step: int
    epoch: float
    learning_rate: float
    loss: float
    gradient_norm: float
    samples: int
    real_tokens: int
    label_tokens: int
    padded_tokens: int
    step_time_s: float
    data_time_s: float
    forward_time_s: float
    backward_time_s: float
    optimizer_time_s: float
    cpu_time_s: float
    elapsed_s: float
    measured: int


COLUMNS = tuple(field.name for field in fields(StepRecord))
_TYPES = {"rank": int, "step": int, "samples": int, "real_tokens": int, "label_tokens": int, "padded_tokens": int}


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank appends its records."""
    return folder / f"steps.rank{rank}.csv"


def append_records(path: Path, records: Sequence[StepRecord]) -> None:
    """Append records and flush them to the system, so that a killed process keeps what it had."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows([tuple(asdict(record).values()) for record in records])


def read_records(path: Path) -> list[StepRecord]:
    """Read a rank's file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if None in row.values() or None in row:
                break
            try:
                values: dict[str, Any] = {name: _TYPES.get(name, float)(row[name]) for name in COLUMNS[:-1]}
                records.append(StepRecord(**values, measured=int(row["measured"])))
            except ValueError:
                break
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop the records from `step` on: a resumed run writes them again."""
    if path.exists():
        kept = [record for record in read_records(path) if record.step < step]
        write_atomic(path, to_csv(kept))


def leave_unmeasured(path: Path) -> None:
    """Let the records so far count in no timing: those of another machine and this one's have no common mean."""
    if path.exists():
        write_atomic(path, to_csv(replace(record, measured=0) for record in read_records(path)))


def to_csv(records: Iterable[StepRecord]) -> str:
    """CSV text with a header."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([tuple(asdict(record).values()) for record in records])
    return text.getvalue()


def merge(folder: Path) -> list[StepRecord]:
    """The records of all ranks by step and rank, of the steps that every rank has finished."""
    ranks = [read_records(path) for path in sorted(folder.glob("steps.rank*.csv"))]
    finished = min((len(records) for records in ranks), default=0)
    return sorted((record for records in ranks for record in records[:finished]), key=lambda r: (r.step, r.rank))


def measured_steps(records: Sequence[StepRecord]) -> list[int]:
    """The steps that count in timings: those that every rank measured."""
    unmeasured = {record.step for record in records if not record.measured}
    return sorted({record.step for record in records} - unmeasured)


def summarise_steps(records: Sequence[StepRecord]) -> dict[str, float | int | None]:
    """Step times and throughputs over the measured steps.

    A step lasts as long as its slowest rank; tokens are summed over ranks. Throughput divides by the period of a
    step, which includes the wait for data. Without a measured step the values are None.
    """
    by_step: dict[int, list[StepRecord]] = {}
    for record in records:
        by_step.setdefault(record.step, []).append(record)
    steps = [ranks for _, ranks in sorted(by_step.items())]
    measured = [ranks for ranks in steps if all(record.measured for record in ranks)]
    last = [ranks[0].loss for ranks in steps[-LOSS_WINDOW_STEPS:]]
    summary: dict[str, float | int | None] = {
        "steps": len(steps),
        "measured_steps": len(measured),
        "train_loss": sum(last) / len(last) if last else None,
        "samples": sum(record.samples for ranks in steps for record in ranks),
        "tokens": sum(record.real_tokens for ranks in steps for record in ranks),
        "label_tokens": sum(record.label_tokens for ranks in steps for record in ranks),
        "padded_tokens": sum(record.padded_tokens for ranks in steps for record in ranks),
    }
    padded = summary["padded_tokens"]
    summary["padding_waste_share"] = 1 - (summary["tokens"] or 0) / padded if padded else None
    return summary | _timings(measured)


LOSS_WINDOW_STEPS = 10  # train_loss is the mean over so many last steps: one step's loss is one batch's


def _timings(measured: Sequence[Sequence[StepRecord]]) -> dict[str, float | int | None]:
    names = ("step", "data", "forward", "backward", "optimizer")
    if not measured:
        keys = ["step_time_mean_s", "step_time_sd_s", "step_time_cv", "step_time_median_s", "step_time_p95_s"]
        keys += ["step_period_mean_s", "tokens_per_step_mean"]
        keys += [f"{name}_time_mean_s" for name in names[1:]]
        keys += ["rank_tokens_imbalance", "rank_forward_imbalance"]
        return dict.fromkeys([*keys, *THROUGHPUTS, "cpu_time_mean_s", "seconds_per_10k_tokens"])
    times = summarise([max(record.step_time_s for record in ranks) for ranks in measured])
    seconds = sum(max(record.step_time_s + record.data_time_s for record in ranks) for ranks in measured)

    def total(column: str) -> int:
        return sum(getattr(record, column) for ranks in measured for record in ranks)

    def mean(column: str) -> float:
        return sum(max(getattr(record, column) for record in ranks) for ranks in measured) / len(measured)

    return {
        "step_time_mean_s": times.mean,
        "step_time_sd_s": times.sd,
        "step_time_cv": times.cv,
        "step_time_median_s": times.median,
        "step_time_p95_s": times.p95,
        "step_period_mean_s": seconds / len(measured),
        "tokens_per_step_mean": total("real_tokens") / len(measured),
        **{f"{name}_time_mean_s": mean(f"{name}_time_s") for name in names[1:]},
        "rank_tokens_imbalance": imbalance(measured, "padded_tokens"),
        "rank_forward_imbalance": imbalance(measured, "forward_time_s"),
        "cpu_time_mean_s": mean("cpu_time_s"),
        **{name: total(column) / seconds for name, column in THROUGHPUTS.items()},
        "seconds_per_10k_tokens": 10_000 * seconds / total("real_tokens"),
    }


THROUGHPUTS = {
    "tokens_per_second": "real_tokens",
    "label_tokens_per_second": "label_tokens",
    "padded_tokens_per_second": "padded_tokens",
    "samples_per_second": "samples",
}


def imbalance(steps: Sequence[Sequence[StepRecord]], column: str) -> float | None:
    """By what share the rank with most exceeds the mean of all ranks, averaged over steps: 0 if all are equal.

    Of the token slots it is the cause, of the forward pass the effect: there DDP does not wait for other ranks yet,
    while the whole step lasts equally long on all of them. FSDP gathers weights in it and hides part of the effect.
    """
    shares = []
    for ranks in steps:
        values = [getattr(record, column) for record in ranks]
        if sum(values) > 0:
            shares.append(max(values) * len(values) / sum(values) - 1)
    return sum(shares) / len(shares) if shares else None
