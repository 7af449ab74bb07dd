"""The tasks that can be learned: their kind, the columns of their data, and the split that is held out for testing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunemap.config import DatasetConfig
from tunemap.data.rows import PlacedRecord
from tunemap.errors import UserError

LONGEST_NUMBER = 18  # digits of a label that is a number; Python itself refuses those of thousands of digits
MOST_SHOWN = 200  # characters of a row that a message repeats
TEST_SPLITS = ("test", "validation", "dev")


@dataclass(frozen=True)
class Task:
    """What is fixed about a task; None where the study's `prompt_field` and `answer_field` decide."""

    kind: str  # generation or classification
    prompt_field: str | None = None
    answer_field: str | None = None
    label_names: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = TEST_SPLITS  # the first that exists is the test split


@dataclass(frozen=True)
class Labels:
    """The classes of a classification task; no names for generation.

    numbered: rows may hold the index of a name in its place, because the task or the source names the classes. Of names
              that were found in training rows, another number is another class.
    """

    names: tuple[str, ...] = ()
    numbered: bool = False


TASKS = {
    "arithmetic": Task("generation", "question", "answer"),
    "gsm8k": Task("generation", "question", "answer"),
    # GLUE keeps the labels of SST-2's test split to itself, so its validation split is everybody's test split.
    "sst2": Task("classification", "sentence", "label", ("negative", "positive"), ("validation", "dev", "test")),
    "generation": Task("generation"),
    "classification": Task("classification"),
}


def columns(dataset: DatasetConfig) -> tuple[str, str]:
    """The columns that hold the prompt (or text) and the answer (or label)."""
    task = TASKS[dataset.task]
    prompt, answer = dataset.prompt_field or task.prompt_field, dataset.answer_field or task.answer_field
    if prompt is None or answer is None:
        key = "prompt_field" if prompt is None else "answer_field"
        raise UserError(f"task {dataset.task}: {key} is missing; name the column that holds it")
    return prompt, answer


def generation_row(row_id: str, record: dict[str, Any], prompt_field: str, answer_field: str) -> dict[str, Any]:
    """A row to generate from: {"id", "prompt", "answer"}."""
    return {
        "id": row_id,
        "prompt": text_of(record, prompt_field, row_id),
        "answer": text_of(record, answer_field, row_id),
    }


def classification_row(
    row_id: str, record: dict[str, Any], prompt_field: str, answer_field: str, labels: Labels
) -> dict[str, Any]:
    """A text with its class: {"id", "prompt", "label", "label_name"}; labels are names, or indices of given names."""
    written, names = text_of(record, answer_field, row_id), labels.names
    is_index = labels.numbered and written.isdecimal() and len(written) <= LONGEST_NUMBER and int(written) < len(names)
    if written in names:
        label = names.index(written)
    elif is_index:
        label = int(written)
    else:
        numbered = (name if name == str(index) else f"{index} or {name}" for index, name in enumerate(names))
        allowed = ", ".join(numbered) if labels.numbered else f"a label of the training rows: {', '.join(names)}"
        raise UserError(f"{_place(record, row_id)}: {answer_field} is {_shown(written)}; expected {allowed}")
    return {
        "id": row_id,
        "prompt": text_of(record, prompt_field, row_id).strip(),
        "label": label,
        "label_name": names[label],
    }


def found_label_names(records: list[dict[str, Any]], answer_field: str) -> tuple[str, ...]:
    """The labels that training rows have, sorted as numbers where all of them are numbers, else as text."""
    names = {text_of(record, answer_field, f"train row {index}") for index, record in enumerate(records)}
    if all(name.removeprefix("-").isdecimal() and len(name) <= LONGEST_NUMBER for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def text_of(record: dict[str, Any], field: str, row_id: str) -> str:
    """The text of a field; a missing or empty one is a `UserError` that names the row and the fields it has."""
    if field not in record:
        known = ", ".join(map(str, record))[:MOST_SHOWN]
        advice = "repair it, or name the columns with prompt_field and answer_field"
        raise UserError(f"{_place(record, row_id)}: no field {field!r}; it has {known}; {advice}")
    value = record[field]
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise UserError(f"{_place(record, row_id)}: field {field!r} is {_shown(value)}; expected text or a number")
    return str(value)


def _place(record: dict[str, Any], row_id: str) -> str:
    return f"{record.place}: {row_id}" if isinstance(record, PlacedRecord) else row_id


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
