"""Prepare a dataset: read it from its source, choose rows by seed, keep test rows out of training, write jsonl files.

The folder that `prepare` writes:

    train.jsonl, test.jsonl   {"id": "gsm8k-train-17", "prompt", "answer"}, or {"id", "prompt", "label", "label_name"}
    dataset.json              task, splits and their names, rows, checksums, label names, what overlapped

An id ends in the row's number in its source, whatever rows were chosen.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunemap.config import DatasetConfig
from tunemap.data.locate import given_file, hub_files, local_folder, split_files
from tunemap.data.made import made_records
from tunemap.data.rows import PlacedRecord, normalised, not_utf8, read_rows, write_rows
from tunemap.data.tasks import TASKS, Labels, classification_row, columns, found_label_names, generation_row, text_of
from tunemap.errors import UserError
from tunemap.files import sha256_of, write_sealed

Record = dict[str, Any]
NAMED_OVERLAPS = 20  # overlapping rows that dataset.json names
LONGEST_CELL = 2**31 - 1  # characters; csv itself would stop at 131,072


@dataclass(frozen=True)
class RawData:
    """Records as their source has them, and what the source calls its test split."""

    train: list[Record]
    test: list[Record]
    test_split: str
    label_names: tuple[str, ...] = field(default=())


def prepare(dataset: DatasetConfig, destination: Path, *, data_root: Path | None) -> None:
    """Write train.jsonl, test.jsonl and dataset.json to `destination`.

    Training rows whose prompt equals a row of the whole test split (case, spaces and final punctuation aside) are left
    out, counted and named in dataset.json. Rows are chosen by `seed`; a larger choice contains a smaller one.
    """
    raw = read_source(dataset, data_root)
    if dataset.held_out_share is not None:
        raw = hold_out(raw, dataset.held_out_share, dataset.seed)
    prompt_field, _ = columns(dataset)
    held_out = {normalised(text_of(record, prompt_field, "test row")) for record in raw.test}
    train_prompts = [normalised(text_of(record, prompt_field, "train row")) for record in raw.train]
    clean = [index for index, prompt in enumerate(train_prompts) if prompt not in held_out]
    removed = sorted(set(range(len(raw.train))) - set(clean))
    if not clean:
        raise UserError(f"{_place(raw)}: no training row is left, each of {len(raw.train)} is a test row too")
    # Of made rows there are as many as were asked for, less those that are held out of them.
    made_and_held_out = dataset.source == "made" and dataset.held_out_share is not None
    train_rows = None if made_and_held_out else dataset.train_rows
    chosen = {
        "train": _choose(clean, train_rows, dataset.seed, "train_rows"),
        "test": _choose(range(len(raw.test)), dataset.test_rows, dataset.seed, "test_rows"),
    }
    labels = labels_of(dataset, raw)
    rows = {
        "train": rows_of(dataset, "train", raw.train, labels, chosen["train"]),
        "test": rows_of(dataset, raw.test_split, raw.test, labels, chosen["test"]),
    }
    for split, split_rows in rows.items():
        write_rows(destination / f"{split}.jsonl", split_rows)
    tested = {normalised(row["prompt"]) for row in rows["test"]}
    trained = [normalised(row["prompt"]) for row in rows["train"]]
    manifest = {
        "task": dataset.task,
        "task_kind": TASKS[dataset.task].kind,
        "source": dataset.model_dump(mode="json", include={"source", "id", "subset", "revision", "path"})
        | dataset.model_dump(mode="json", include={"train_file", "test_file"}),
        "splits": {"train": "train", "test": raw.test_split},
        "rows": {split: len(split_rows) for split, split_rows in rows.items()},
        "available_rows": {"train": len(raw.train), "test": len(raw.test)},
        "seed": dataset.seed,
        "num_labels": len(labels.names) or None,
        "label_names": list(labels.names) or None,
        "sha256": {split: sha256_of(destination / f"{split}.jsonl") for split in rows},
        "overlap": {
            "removed_rows": len(removed),
            "removed": [
                {"id": _row_id(dataset, "train", index), "prompt": text_of(raw.train[index], prompt_field, "train row")}
                for index in removed[:NAMED_OVERLAPS]
            ],
            "remaining_rows": sum(prompt in tested for prompt in trained),
            "repeated_train_rows": len(trained) - len(set(trained)),
        },
    }
    write_sealed(destination / "dataset.json", manifest)


def read_source(dataset: DatasetConfig, data_root: Path | None) -> RawData:
    """All records of both splits; nothing chosen, renamed or removed yet."""
    if dataset.source == "made":
        made = made_records(dataset.task, train_rows=dataset.train_rows, test_rows=dataset.test_rows, seed=dataset.seed)
        return RawData(made["train"], made["test"], "test")
    if dataset.source == "file":
        train, test = (read_records(given_file(dataset, key, data_root)) for key in ("train_file", "test_file"))
        return RawData(train, test, "test")
    if dataset.source == "hub":
        if dataset.id is None:
            raise UserError("source hub: id is missing; give the repository, such as openai/gsm8k")
        _check_hub_id(dataset.id)
        return _read_hub(dataset.id, dataset.subset, dataset.revision, dataset)
    folder = local_folder(dataset, data_root)
    files = split_files(folder, dataset.task)
    if not files:
        hub_files(folder)  # complains about an empty folder in our words rather than the library's
        return _read_hub(str(folder), dataset.subset, None, dataset)
    (_, train_file), (test_split, test_file) = files.items()
    return RawData(read_records(train_file), read_records(test_file), test_split)


def hold_out(raw: RawData, share: float, seed: int) -> RawData:
    """A share of the training rows in place of the test split, the rows that `datasets.train_test_split` would choose.

    Of GSM8K's 7,473 rows, a share of 0.05 and seed 42 leave 7,099 and hold out 374, as one published study did.
    """
    order = np.random.default_rng(seed).permutation(len(raw.train))
    held_out, kept = np.split(order, [math.ceil(share * len(raw.train))])
    train, test = ([raw.train[index] for index in np.sort(chosen)] for chosen in (kept, held_out))
    return RawData(train, test, "train-held-out", raw.label_names)


def read_records(path: Path) -> list[Record]:
    """The records of a .jsonl, .csv or .tsv file; tables need a header line, and quotes mean nothing in a .tsv."""
    if path.suffix == ".jsonl":
        records = read_rows(path)
    else:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                records = list(_table(file, path))
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not records:
        raise UserError(f"{path}: empty; expected at least one record")
    return records


def _table(file: Any, path: Path) -> Iterator[Record]:
    tabs = path.suffix == ".tsv"
    csv.field_size_limit(LONGEST_CELL)
    # strict: a quote that nobody closes would otherwise swallow the rows below it
    reader = csv.reader(
        file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
    )
    try:
        header = next(reader, None)
        if not header:
            raise UserError(f"{path}: empty; expected a header line with the names of the columns")
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(
                f"{path}, line 1: the column {twice[0]!r} occurs {header.count(twice[0])} times; rename one"
            )
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}")
            yield PlacedRecord(dict(zip(header, cells, strict=True)), path, reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a table ({error}); check the quotes") from None


def _check_hub_id(repository: str) -> None:
    """The datasets library would take the path of a folder for an id, and a folder of that name before the hub's."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"id: {repository}: no repository of the form owner/name ({error})") from None
    if Path(repository).exists():
        raise UserError(f"id: {repository}: a folder of this name lies here; use source local, or move it")


def _read_hub(path: str, subset: str | None, revision: str | None, dataset: DatasetConfig) -> RawData:
    """Read a repository of the hub, or a folder that looks like one, through the datasets library."""
    import datasets

    where = f"{path}, subset {subset}" if subset else path
    with tempfile.TemporaryDirectory() as scratch:
        # A folder's copy in the library's cache is of no further use; a download is worth keeping.
        cache = {"cache_dir": scratch} if revision is None else {}
        try:
            splits = datasets.load_dataset(path, name=subset, revision=revision, **cache)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"dataset {where}: cannot be read ({type(error).__name__}: {error})") from None
        test_split = next((name for name in TASKS[dataset.task].test_splits if name in splits), None)
        if "train" not in splits or test_split is None:
            raise UserError(
                f"dataset {where}: needs a split train and one of {', '.join(TASKS[dataset.task].test_splits)}; "
                f"it has {', '.join(splits)}"
            )
        answer_field = columns(dataset)[1]
        names = getattr(splits["train"].features.get(answer_field), "names", None) or ()
        return RawData(splits["train"].to_list(), splits[test_split].to_list(), test_split, tuple(names))


def labels_of(dataset: DatasetConfig, raw: RawData) -> Labels:
    """The classes of a classification task: the task's own, the source's, or those found; none for generation.

    Raises UserError where the rows have one class only.
    """
    task = TASKS[dataset.task]
    if task.kind != "classification":
        return Labels()
    if known := task.label_names or raw.label_names:
        return Labels(known, numbered=True)
    found = found_label_names(raw.train, columns(dataset)[1])
    if len(found) < 2:
        raise UserError(f"{_place(raw)}: every training row has the label {found[0]!r}; classes need two or more")
    return Labels(found)


def rows_of(
    dataset: DatasetConfig,
    split: str,
    records: Sequence[Record],
    labels: Labels,
    chosen: Sequence[int] | None = None,
) -> list[Record]:
    """The rows that records become, all of them or the chosen ones."""
    fields = columns(dataset)
    rows = []
    for index in range(len(records)) if chosen is None else chosen:
        row_id = _row_id(dataset, split, index)
        if TASKS[dataset.task].kind == "classification":
            rows.append(classification_row(row_id, records[index], *fields, labels))
        else:
            rows.append(generation_row(row_id, records[index], *fields))
    return rows


def _place(raw: RawData) -> str:
    """The file of the training rows, where they have one."""
    first = raw.train[0] if raw.train else None
    return str(first.path) if isinstance(first, PlacedRecord) else "train"


def _row_id(dataset: DatasetConfig, split: str, index: int) -> str:
    return f"{dataset.task}-{split}-{index}"


def _choose(indices: Sequence[int], count: int | None, seed: int, key: str) -> list[int]:
    """`count` of the indices in their order; the first of one shuffle, so that smaller choices nest in larger ones."""
    if count is None:
        return list(indices)
    if count > len(indices):
        raise UserError(f"{key}: {count} rows asked for, but only {len(indices)} can be used")
    order = np.random.default_rng(seed).permutation(len(indices))[:count]
    return [int(indices[index]) for index in np.sort(order)]
