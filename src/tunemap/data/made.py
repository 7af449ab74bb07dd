"""Data made here, family B of the corpora: word problems and reviews, with no test row among the training rows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tunemap.corpora import review, word_problem
from tunemap.data.rows import normalised
from tunemap.errors import UserError

TRAIN_ROWS, TEST_ROWS = 2000, 200  # where the study does not say
ATTEMPTS_PER_ROW = 100


def made_records(task: str, *, train_rows: int | None, test_rows: int | None, seed: int) -> dict[str, list[Any]]:
    """Records of both splits under the task's own column names; test prompts are unique and not in training.

    The test rows do not depend on `train_rows`, so a study may vary the one and compare on the other.
    """
    makers: dict[str, Callable[[random.Random], dict[str, Any]]] = {"arithmetic": _problem, "sst2": _review}
    if task not in makers:
        raise UserError(f"source made: task {task} is not made here; allowed: {', '.join(makers)}")
    field = "question" if task == "arithmetic" else "sentence"
    test = _distinct(makers[task], field, test_rows or TEST_ROWS, random.Random(f"{task} test {seed}"))
    held_out = {normalised(record[field]) for record in test}
    train: list[dict[str, Any]] = []
    rng = random.Random(f"{task} train {seed}")
    while len(train) < (train_rows or TRAIN_ROWS):
        record = makers[task](rng)
        if normalised(record[field]) not in held_out:
            train.append(record)
    return {"train": train, "test": test}


def _problem(rng: random.Random) -> dict[str, Any]:
    problem = word_problem(rng)
    return {"question": problem["question"], "answer": problem["answer"]}


def _review(rng: random.Random) -> dict[str, Any]:
    made = review(rng)
    return {"sentence": made["text"], "label": made["label"]}


def _distinct(
    make: Callable[[random.Random], dict[str, Any]], field: str, count: int, rng: random.Random
) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for _ in range(count * ATTEMPTS_PER_ROW):
        record = make(rng)
        found.setdefault(normalised(record[field]), record)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"test_rows: {count} different rows cannot be made; at most about {len(found)}")
