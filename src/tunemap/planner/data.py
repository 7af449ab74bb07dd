"""The batches that a run will see: of its tokenised rows where they exist, else of its factors. Imports no torch."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunemap.config import Factors
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.planner.prediction import BatchShape, Data
from tunemap.run import Run

if TYPE_CHECKING:  # a workflow is parsed without arrays, unless there are lengths to read
    import numpy as np
    import numpy.typing as npt

MADE_ROWS = 2000  # training rows of made data unless a study says otherwise
SAMPLED_BATCHES = 512  # for the mean width of padded batches
TRAIN, MANIFEST = "train.npz", "tokens.json"  # of a folder of tokens


def data_of(run: Run, results: Path) -> Data:
    """Widths, steps and classes of a run; `results` is the folder of results, where prepared data lie."""
    folder = results / "shared" / "tokens" / run.tokens_key
    file = folder / TRAIN
    labels = _num_labels(run, folder, results)
    if not file.is_file():
        return _without_tokens(run, labels, _rows(run, results))
    lengths = _lengths(file, file.stat().st_mtime_ns)
    factors = run.factors
    try:
        widest, mean, rows, shortest, packed_tokens = _widths(_Lengths(lengths), *_grouping(factors))
    except UserError:  # fewer rows than a batch: the run will say so
        return _without_tokens(run, labels, len(lengths))
    batch = _shape(factors, widest, padded=shortest < widest)
    if labels is None:
        share = _label_share(file, file.stat().st_mtime_ns)
        mean_row = packed_tokens if factors.batching == "packed" else float(lengths.mean())
        batch = replace(batch, label_tokens=round(share * mean_row * factors.per_device_batch_size))
    step_rows = factors.per_device_batch_size * factors.gradient_accumulation * factors.gpus
    per_row = packed_tokens if factors.batching == "packed" else float(lengths.mean())
    if batch.rows < factors.per_device_batch_size:  # all of them in one
        mean = per_row * factors.per_device_batch_size
    return Data(batch, mean, _steps(factors, rows), per_row * step_rows, labels, True)


def _without_tokens(run: Run, num_labels: int | None, rows: int | None) -> Data:
    factors = run.factors
    packed = factors.batching == "packed"
    batch = _shape(factors, factors.max_length, padded=not packed)
    steps = _steps(factors, None if packed else rows)
    return Data(batch, float(batch.width), steps, None, num_labels, False)


def _shape(factors: Factors, width: int, *, padded: bool) -> BatchShape:
    rows, packed = factors.per_device_batch_size, factors.batching == "packed"
    if packed and factors.attention == "flash_attention_2":  # which takes all documents in one row
        return BatchShape(1, rows * width, padded=False, packed=True)
    fused = factors.attention == "flash_attention_2"  # takes padding out by itself
    padded = padded and not fused and not packed and (rows > 1 or factors.batching == "fixed_length")
    return BatchShape(rows, width, padded, packed)


def _steps(factors: Factors, rows: int | None) -> int | None:
    batch = factors.per_device_batch_size * factors.gradient_accumulation * factors.gpus
    by_epochs = None
    if factors.epochs is not None and rows is not None and rows >= batch:
        by_epochs = max(1, math.ceil(factors.epochs * (rows // batch) - 1e-9))
    known = [steps for steps in (by_epochs, factors.max_steps) if steps is not None]
    return min(known) if known and (factors.epochs is None or rows is not None or factors.max_steps) else None


def _rows(run: Run, results: Path) -> int | None:
    """Training rows: of the prepared dataset, else of the study file; None where only the data tell."""
    manifest = results / "shared" / "datasets" / run.dataset_key / "dataset.json"
    if manifest.is_file():
        return int(read_json(manifest)["rows"]["train"])
    if run.dataset.train_rows is not None:
        return run.dataset.train_rows
    return MADE_ROWS if run.dataset.source == "made" else None


def _num_labels(run: Run, tokens: Path, results: Path) -> int | None:
    if run.task_kind == "generation":
        return None
    if (tokens / MANIFEST).is_file():
        return len(read_json(tokens / MANIFEST)["label_names"]) or 2
    manifest = results / "shared" / "datasets" / run.dataset_key / "dataset.json"
    return (read_json(manifest)["num_labels"] if manifest.is_file() else None) or 2


@functools.lru_cache(maxsize=64)
def _lengths(file: Path, changed_ns: int) -> npt.NDArray[np.int64]:
    import numpy as np

    with np.load(file) as arrays:
        return np.diff(arrays["offsets"])


@functools.lru_cache(maxsize=64)
def _label_share(file: Path, changed_ns: int) -> float:
    """Share of all real tokens that are learned."""
    import numpy as np

    with np.load(file) as arrays:
        lengths = np.diff(arrays["offsets"])
        return float(np.maximum(lengths - np.maximum(arrays["prompt_tokens"], 1), 0).sum() / lengths.sum())


class _Lengths:
    """Lengths that a cache can hold: equal if they are the same array."""

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.values = values

    def __hash__(self) -> int:
        return id(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lengths) and other.values is self.values


def _grouping(factors: Factors) -> tuple[str, int, int]:
    return factors.batching, factors.per_device_batch_size, factors.max_length


@functools.lru_cache(maxsize=1024)
def _widths(lengths: _Lengths, batching: str, rows: int, max_length: int) -> tuple[int, float, int, int, float]:
    """Widest and mean columns of a micro-batch, rows of the data, shortest row, mean real tokens of a row."""
    import numpy as np

    from tunemap.data.batches import batch_schedule

    values = lengths.values
    longest, shortest, mean = int(values.max()), int(values.min()), float(values.mean())
    if batching == "fixed_length":
        return max_length, float(max_length), len(values), shortest, mean
    if batching == "packed":
        packed = batch_schedule(
            values,
            per_device_batch_size=1,
            gradient_accumulation=1,
            world_size=1,
            batching="packed",
            max_length=max_length,
            seed=0,
            epochs=1.0,
            max_steps=None,
        ).row_lengths
        sampled = np.random.default_rng(0).choice(packed, (SAMPLED_BATCHES, rows)).max(axis=1)
        return int(packed.max()), float(sampled.mean()), len(packed), int(packed.min()), float(packed.mean())
    if batching == "length_grouped":
        return longest, mean, len(values), shortest, mean
    sampled = np.random.default_rng(0).choice(values, (SAMPLED_BATCHES, rows)).max(axis=1)
    return longest, float(sampled.mean()), len(values), shortest, mean
