"""What tokenising did to a dataset: lengths, cuts, labels left, padding and packing; pure functions on lengths.

Definitions (shares are of training examples unless said otherwise):

    truncated_prompt_share          prompt alone longer than max_length
    truncated_answer_share          at least one answer token, or the end-of-sequence, lost
    examples_without_label_tokens   examples (a count) of which no answer token is left
    label_tokens_kept_share         label tokens after the cut / before, over all examples
    padding_waste_share             padding / token slots in one epoch of the named batching
    packing_efficiency              real tokens / token slots, whole examples in rows of max_length (best fit)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from tunemap.data.batches import Batching, batch_schedule, packed_row_count

if TYPE_CHECKING:
    from tunemap.data.tokens import Examples

PERCENTILES = {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


def length_summary(lengths: npt.NDArray[np.integer]) -> dict[str, float] | None:
    """Minimum, percentiles, mean and maximum in tokens; None without any."""
    if len(lengths) == 0:
        return None
    summary = {name: float(np.percentile(lengths, percent)) for name, percent in PERCENTILES.items()}
    return summary | {"mean": float(lengths.mean())}


def dataset_statistics(
    train: Examples,
    test: Examples | None = None,
    *,
    max_length: int,
    batching: Batching = "longest",
    per_device_batch_size: int = 8,
) -> dict[str, Any]:
    """The statistics of a tokenised dataset (keys above); the test split has no labels to lose, only lengths."""
    return (
        {"rows": len(train), "max_length": max_length}
        | label_statistics(train, max_length)
        | padding_statistics(train, max_length, batching, per_device_batch_size)
        | _test_statistics(test)
    )


def label_statistics(train: Examples, max_length: int) -> dict[str, Any]:
    """Lengths before the cut, and what the cut at `max_length` took away."""
    rows = max(len(train), 1)
    classification = len(train) > 0 and bool(train.class_labels[0] >= 0)
    answers = np.maximum(train.answer_tokens - 1, 0)  # the end-of-sequence is a label but no part of the answer
    whole = train.prompt_tokens + train.answer_tokens
    before = len(train) if classification else int((whole - np.maximum(train.prompt_tokens, 1)).sum())
    kept = int(train.label_tokens.sum())
    truncated_prompts = int((train.prompt_tokens > max_length).sum())
    truncated_answers = 0 if classification else int((whole > max_length).sum())
    without = int((train.label_tokens == 0).sum())
    return {
        "prompt_tokens": length_summary(train.prompt_tokens),
        "answer_tokens": None if classification else length_summary(answers),
        "tokens": length_summary(whole),
        "truncated_prompt_share": truncated_prompts / rows,
        "truncated_answer_share": truncated_answers / rows,
        "examples_without_label_tokens": without,
        "examples_without_label_tokens_share": without / rows,
        "label_tokens": kept,
        "label_tokens_kept_share": kept / before if before else 0.0,
        "label_tokens_of_real_tokens_share": kept / max(int(train.lengths.sum()), 1),
    }


def padding_statistics(
    train: Examples, max_length: int, batching: Batching, per_device_batch_size: int
) -> dict[str, Any]:
    """Padding of one epoch on one device, for each batching; texts to classify cannot be packed."""
    classification = len(train) > 0 and bool(train.class_labels[0] >= 0)
    packed_rows = 0 if classification else packed_row_count(train.lengths, max_length)
    waste: dict[str, float | None] = {}
    for name in get_args(Batching):
        batch = min(per_device_batch_size, packed_rows if name == "packed" else len(train))
        waste[name] = _padding_waste(train, max_length, name, batch) if batch else None
    return {
        "batching": batching,
        "per_device_batch_size": per_device_batch_size,
        "padding_waste_share": waste[batching],
        "padding_waste_share_by_batching": waste,
        "packed_rows": packed_rows or None,
        "packing_efficiency": int(train.lengths.sum()) / (packed_rows * max_length) if packed_rows else None,
    }


def _padding_waste(train: Examples, max_length: int, batching: Batching, batch: int) -> float:
    return batch_schedule(
        train.lengths,
        per_device_batch_size=batch,
        gradient_accumulation=1,
        world_size=1,
        batching=batching,
        max_length=max_length,
        seed=0,
        epochs=1,
        max_steps=None,
    ).padding_waste_share


def _test_statistics(test: Examples | None) -> dict[str, Any]:
    if test is None:
        return {}
    references = test.answer_tokens if len(test) and test.class_labels[0] < 0 else test.answer_tokens[:0]
    return {
        "test": {
            "rows": len(test),
            "prompt_tokens": length_summary(test.prompt_tokens),
            "answer_tokens": length_summary(np.maximum(references - 1, 0)),
        },
        "longest_reference_tokens": int(references.max()) if len(references) else None,
    }
