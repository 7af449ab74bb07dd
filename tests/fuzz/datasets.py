"""Mutated dataset files: damaged lines, odd values and missing columns in jsonl, csv and tsv."""

import csv
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from tunemap.config import DatasetConfig
from tunemap.data.rows import normalised
from tunemap.data.sources import prepare
from tunemap.run import TASK_KINDS

from .judge import FaultError, Verdict, judge

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\t",
    "\x00",
    "\ud800",
    "\u2028",
    "\ufeff",
    "a" * 200_000,
    "nan",
    "-1",
    "2",
    "#### 5",
    '"',
    "x",
]
ODD_JSON: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), [], ["x"], {}, {"a": 1}, [[[]]], *ODD_TEXTS,
]  # fmt: skip
SIGNS = [
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b",",
    b"\n",
    b"\r",
    b"\t",
    b"[" * 5000,
    b"1" * 5000,
]
FORMATS = ("jsonl", "csv", "tsv")
ROWS = 12


def attempt(seed: int, folder: Path) -> Verdict:
    """Prepare a dataset of which one file is mutated, and judge what happened."""
    rng = random.Random(seed)
    task, form = rng.choice(["generation", "classification", "gsm8k", "sst2"]), rng.choice(FORMATS)
    prompt, answer = {"gsm8k": ("question", "answer"), "sst2": ("sentence", "label")}.get(task, ("prompt", "answer"))
    classifies = TASK_KINDS[task] == "classification"
    splits = {
        split: [_record(split, index, prompt, answer, classifies, rng) for index in range(ROWS)]
        for split in ("train", "test")
    }
    broken, nonsense = rng.choice(["train", "test"]), None
    paths = {split: folder / f"{split}.{form}" for split in splits}
    for split, records in splits.items():
        if split == broken and rng.random() < 0.4:
            nonsense = _odd_values(records, (prompt, answer), form, rng)
        data = _written(records, form)
        if split == broken and nonsense is None:
            data = _damaged(data, rng)
        paths[split].write_bytes(data)
    dataset = DatasetConfig(
        task=task,
        source="file",
        train_file=paths["train"].name,
        test_file=paths["test"].name,
        prompt_field=prompt if task in ("generation", "classification") else None,
        answer_field=answer if task in ("generation", "classification") else None,
    )
    return judge(lambda: _prepare(dataset, folder), paths[broken], nonsense=nonsense)


def _prepare(dataset: DatasetConfig, folder: Path) -> None:
    """Prepare and look at every row that came out."""
    destination = folder / "prepared"
    shutil.rmtree(destination, ignore_errors=True)
    prepare(dataset, destination, data_root=folder)
    rows = {}
    for split in ("train", "test"):
        lines = (destination / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[split] = [json.loads(line) for line in lines]
        if not rows[split]:
            raise FaultError(f"a split {split} without rows")
        if len({row["id"] for row in rows[split]}) < len(rows[split]):
            raise FaultError("an id occurs twice")
        for row in rows[split]:
            if not row["prompt"].strip():
                raise FaultError("an empty prompt")
            if "label" in row and not (isinstance(row["label"], int) and row["label"] >= 0):
                raise FaultError(f"label {row['label']!r}")
            if "label" not in row and not row["answer"].strip():
                raise FaultError("an empty answer")
    tested = {normalised(row["prompt"]) for row in rows["test"]}
    if any(normalised(row["prompt"]) in tested for row in rows["train"]):
        raise FaultError("a test row among the training rows")


def _record(split: str, index: int, prompt: str, answer: str, classifies: bool, rng: random.Random) -> dict[str, Any]:
    text = f"What is {split} {index} and {rng.randrange(1000)}?"
    return {prompt: text, answer: str(index % 2) if classifies else f"It is {index}. #### {index}"}


def _written(records: list[dict[str, Any]], form: str) -> bytes:
    if form == "jsonl":
        text = "".join(json.dumps(record) + "\n" for record in records)
        return text.encode("utf-8", "surrogatepass")
    buffer = io.StringIO(newline="")
    columns = list(dict.fromkeys(key for record in records for key in record))
    quoting = csv.QUOTE_NONE if form == "tsv" else csv.QUOTE_MINIMAL
    writer = csv.writer(
        buffer,
        delimiter="\t" if form == "tsv" else ",",
        quoting=quoting,
        quotechar=None if form == "tsv" else '"',
        escapechar="\\",
    )
    writer.writerow(columns)
    writer.writerows([[record.get(column, "") for column in columns] for record in records])
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def _odd_values(records: list[dict[str, Any]], fields: tuple[str, str], form: str, rng: random.Random) -> str | None:
    """Put an odd value into one cell, or take a column away; returns why the file must be refused, if it must."""
    record, field = rng.choice(records), rng.choice(fields)
    change = rng.randrange(4)
    if change == 0:
        for one in records:
            del one[field]
        return f"it has no column {field}"
    if change == 1 and form == "jsonl":
        value = record[field] = rng.choice(ODD_JSON)
        empty = value is None or isinstance(value, (list, dict)) or not str(value).strip()
        return f"{field} is {value!r}" if empty or value != value or value in (float("inf"),) else None
    if change == 2:
        record[field] = ""
        return f"{field} is empty"
    record[field] = rng.choice(ODD_TEXTS)
    return None


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, with some bytes replaced, or with signs put in that mean something."""
    how = rng.randrange(4)
    if how == 0:
        return data[: rng.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 2, 10, 100])):
        place = rng.randrange(len(damaged))
        if how == 1:
            damaged[place] = rng.randrange(256)
        elif how == 2:
            damaged[place:place] = rng.choice(SIGNS)
        else:
            del damaged[place : place + rng.randrange(20)]
            if not damaged:
                break
    return bytes(damaged)
