"""What a model answered to the test examples: how they are dealt out to processes, put together again and summarised.

Examples of like length share a batch, of equal length where a method bears no padding. Batches are cut from all
examples first and dealt out whole afterwards: padding is then the same whatever the number of processes, and so is each
answer. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tunemap.data.tokens import Tokens
from tunemap.gates import GateResult
from tunemap.statistics import wilson

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prediction:
    """One test example with what the model made of it. For a classification only `output` and `correct` count."""

    id: str
    prompt: str
    reference: str
    output: str
    extracted_strict: str | None
    extracted_flexible: str | None
    correct: bool
    correct_flexible: bool | None
    malformed: bool | None  # no answer in the strict form
    truncated: bool | None  # the generation limit ended it


@dataclass(frozen=True)
class Share:
    """What one process made of its batches; predictions by the place of their examples in the test split."""

    predictions: dict[int, Prediction]
    max_new_tokens: int | None  # generation only
    gates: list[GateResult]
    seconds: float  # from the loaded model to the last answer

    def to_json(self) -> dict[str, Any]:
        """JSON values that `share_from_json` reads."""
        rows = [[place, asdict(prediction)] for place, prediction in self.predictions.items()]
        return vars(self) | {"predictions": rows, "gates": [asdict(gate) for gate in self.gates]}


def share_from_json(values: dict[str, Any]) -> Share:
    """The share that `Share.to_json` wrote."""
    predictions = {place: Prediction(**row) for place, row in values["predictions"]}
    gates = [GateResult(**gate) for gate in values["gates"]]
    return Share(predictions, values["max_new_tokens"], gates, values["seconds"])


def batches_of(
    lengths: npt.ArrayLike, batch_size: int, *, rank: int, world_size: int, unpadded: bool = False
) -> list[Indices]:
    """The batches of one process: every `world_size`-th of all, so that long and short ones are dealt out evenly.

    `lengths`: tokens of each test example. A batch holds places of examples in the test split, shortest first; with
    `unpadded`, only examples of one length.
    """
    known = np.asarray(lengths)
    order = np.argsort(known, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(known[order])) + 1) if unpadded else [order]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    return batches[rank::world_size]


def combine(
    shares: Sequence[Share], tokens: Tokens, *, extraction: str = "lm_eval"
) -> tuple[dict[str, Any], list[Prediction]]:
    """The summary over all processes, and all predictions in the order of the test split.

    Raises RuntimeError unless each test example has exactly one prediction.
    """
    places = sorted(place for share in shares for place in share.predictions)
    if places != list(range(len(tokens.test_rows))):
        raise RuntimeError(
            f"{len(places)} predictions of {len(set(places))} examples for {len(tokens.test_rows)} test examples"
        )
    made = {place: prediction for share in shares for place, prediction in share.predictions.items()}
    predictions = [made[place] for place in places]
    summary = summarise(predictions, tokens, extraction=extraction)
    return summary | {
        "processes": len(shares),
        "max_new_tokens": shares[0].max_new_tokens,
        "evaluation_time_s": max(share.seconds for share in shares),
        "gates": [asdict(gate) for gate in shares[0].gates],
    }, predictions


METRICS = {"lm_eval": "exact_match_strict", "hpml": "exact_match_hpml"}  # of generation, by its extraction


def summarise(predictions: Sequence[Prediction], tokens: Tokens, *, extraction: str) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, and the shares that explain it."""
    count, correct = len(predictions), sum(prediction.correct for prediction in predictions)
    interval = wilson(correct, count)
    generation = tokens.task_kind == "generation"
    return {
        "task": tokens.task,
        "task_kind": tokens.task_kind,
        "split": tokens.test_split,
        "metric": METRICS[extraction] if generation else "accuracy",
        "n": count,
        "correct": correct,
        "accuracy": correct / count,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "accuracy_flexible": _fraction(predictions, "correct_flexible") if generation else None,
        "malformed_share": _fraction(predictions, "malformed") if generation else None,
        "truncated_share": _fraction(predictions, "truncated") if generation else None,
    }


def _fraction(predictions: Sequence[Prediction], name: str) -> float:
    return sum(bool(getattr(prediction, name)) for prediction in predictions) / len(predictions)
