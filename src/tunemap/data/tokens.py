"""Turn the rows of a dataset into token ids: ragged arrays on disk, so that training opens them without parsing.

The folder that `tokenize` writes:

    train.npz, test.npz   ragged arrays: input_ids, offsets, prompt_tokens, answer_tokens, class_labels
    test.jsonl            {"id", "prompt" (as the model reads it), "reference"} for each test row
    tokens.json           task, maximum length, special token ids, label names
    statistics.json       lengths, truncation, padding and packing (tunemap.data.statistics)

A generation example is prompt + answer + end-of-sequence, tokenised apart and joined, so the border between what
is given and what is learned never falls inside a token. What is longer than `max_length` is cut on the right, as
the published studies did: answers lose their end first. Every cut is counted, and the label gate refuses to train
on many of them. Test prompts are never cut; texts to classify are, because an encoder has no more positions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tunemap.data.prompts import render_prompts, rows_in_template
from tunemap.data.rows import read_rows, write_rows
from tunemap.data.statistics import dataset_statistics
from tunemap.data.tokenizers import load_tokenizer
from tunemap.errors import UserError
from tunemap.files import damaged, read_json, read_sealed, sha256_of, write_atomic, write_json, write_sealed

TRAIN, TEST, TEST_ROWS = "train.npz", "test.npz", "test.jsonl"
MANIFEST, STATISTICS = "tokens.json", "statistics.json"

TEXTS_AT_ONCE = 1000

TaskKind = Literal["generation", "classification"]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Token sequences of one split, one after the other: example i is input_ids[offsets[i]:offsets[i + 1]]."""

    input_ids: npt.NDArray[np.int32]
    offsets: Integers
    prompt_tokens: Integers  # tokens of the prompt (or text) before any cut
    answer_tokens: Integers  # tokens of the answer with its end-of-sequence before any cut; 0 for classification
    class_labels: Integers  # label of a text to classify; -1 for generation

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sequence(self, index: int) -> npt.NDArray[np.int32]:
        """The token ids of one example."""
        return self.input_ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Integers:
        """Tokens of each example after the cut."""
        return np.diff(self.offsets)

    @property
    def label_tokens(self) -> Integers:
        """Targets of each example that count in the loss: answer tokens that are left, or the one class label."""
        if len(self) and self.class_labels[0] >= 0:
            return np.ones(len(self), np.int64)
        # Nothing predicts a sequence's first token, so an empty prompt costs one label.
        return np.maximum(self.lengths - np.maximum(self.prompt_tokens, 1), 0)


@dataclass(frozen=True)
class Tokens:
    """A tokenised dataset; `test_rows` are the texts beside `test`, whose sequences are uncut prompts (or texts)."""

    task: str
    task_kind: TaskKind
    max_length: int
    pad_token_id: int
    eos_token_id: int | None
    label_names: tuple[str, ...]
    train: Examples
    test: Examples
    test_rows: tuple[dict[str, str], ...]
    statistics: dict[str, Any]
    test_split: str = "test"  # what the source calls the rows that answers are counted on


def tokenize(
    dataset_folder: Path,
    tokenizer_folder: Path,
    destination: Path,
    *,
    max_length: int,
    prompt_template: str | None,
    system_prompt: str | None,
) -> None:
    """Tokenise a prepared dataset with a model's tokenizer; writes the files named above to `destination`."""
    dataset = _checked(dataset_folder, "dataset.json", lambda split: f"{split}.jsonl")
    tokenizer = load_tokenizer(tokenizer_folder)
    splits = {split: read_rows(dataset_folder / f"{split}.jsonl") for split in ("train", "test")}
    options: dict[str, Any] = {"prompt_template": prompt_template, "system_prompt": system_prompt}
    kind: TaskKind = dataset["task_kind"]
    if kind == "classification":
        train, test = (encode_texts(splits[split], tokenizer, max_length, **options) for split in ("train", "test"))
        texts = [(row["prompt"], row["label_name"]) for row in splits["test"]]
    else:
        train = encode_answers(splits["train"], tokenizer, max_length, **options)
        test = encode_prompts(splits["test"], tokenizer, **options)
        prompts = render_prompts([row["prompt"] for row in splits["test"]], tokenizer, **options)
        texts = list(zip(prompts, (row["answer"] for row in splits["test"]), strict=True))
    _write_examples(destination / TRAIN, train)
    _write_examples(destination / TEST, test)
    test_rows = (
        {"id": row["id"], "prompt": prompt, "reference": reference}
        for row, (prompt, reference) in zip(splits["test"], texts, strict=True)
    )
    write_rows(destination / TEST_ROWS, test_rows)
    manifest = {
        "task": dataset["task"],
        "task_kind": kind,
        "max_length": max_length,
        "pad_token_id": _pad_token_id(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "label_names": dataset.get("label_names") or [],
        "test_split": dataset["splits"]["test"],
    }
    statistics = dataset_statistics(train, test, max_length=max_length)
    statistics["rows_in_template"] = {
        split: rows_in_template([row["prompt"] for row in rows], prompt_template) for split, rows in splits.items()
    }
    write_json(destination / STATISTICS, statistics)
    sums = {name: sha256_of(destination / name) for name in (TRAIN, TEST, TEST_ROWS, STATISTICS)}
    write_sealed(destination / MANIFEST, manifest | {"sha256": sums})


def load_tokens(folder: Path) -> Tokens:
    """Read what `tokenize` wrote."""
    manifest = _checked(folder, MANIFEST)
    return Tokens(
        task=manifest["task"],
        task_kind=manifest["task_kind"],
        max_length=manifest["max_length"],
        pad_token_id=manifest["pad_token_id"],
        eos_token_id=manifest["eos_token_id"],
        label_names=tuple(manifest["label_names"]),
        train=_read_examples(folder / TRAIN),
        test=_read_examples(folder / TEST),
        test_rows=tuple(read_rows(folder / TEST_ROWS)),
        statistics=read_json(folder / STATISTICS),
        test_split=manifest["test_split"],
    )


def _checked(folder: Path, manifest_name: str, file_of: Callable[[str], str] = str) -> dict[str, Any]:
    """The manifest of a folder whose files are as they were written; otherwise the folder is set aside."""
    if not (folder / manifest_name).is_file():
        raise UserError(f"{folder / manifest_name}: no such file; run the workflow to make it")
    try:
        manifest = read_sealed(folder / manifest_name)
    except UserError as error:
        raise damaged(folder, str(error).partition(";")[0]) from None
    for name, expected in manifest.get("sha256", {}).items():
        path = folder / file_of(name)
        if not path.is_file() or sha256_of(path) != expected:
            raise damaged(folder, f"{path}: {'changed after it was written' if path.is_file() else 'is gone'}")
    return manifest


def encode_answers(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    *,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> Examples:
    """Training examples: prompt + answer + end-of-sequence, cut on the right to `max_length`."""
    prompts = _prompt_ids(rows, tokenizer, prompt_template, system_prompt)
    answers = _answer_ids(rows, tokenizer)
    sequences = [(prompt + answer)[:max_length] for prompt, answer in zip(prompts, answers, strict=True)]
    return _examples(sequences, prompts, answers)


def encode_prompts(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> Examples:
    """Prompts to generate from, uncut; `answer_tokens` are the lengths of the references."""
    prompts = _prompt_ids(rows, tokenizer, prompt_template, system_prompt)
    return _examples(prompts, prompts, _answer_ids(rows, tokenizer))


def encode_texts(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    *,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> Examples:
    """Texts to classify, with the tokenizer's special tokens around them, cut to `max_length` (no chat template)."""
    if prompt_template is not None or system_prompt is not None:
        raise UserError("prompt_template and system_prompt are for generation; a text to classify is taken as it is")
    texts = [row["prompt"] for row in rows]
    whole = _ids(tokenizer, texts)
    too_long = [index for index, ids in enumerate(whole) if len(ids) > max_length]
    cut = list(whole)
    shortened = _ids(tokenizer, [texts[index] for index in too_long], truncation=True, max_length=max_length)
    for index, ids in zip(too_long, shortened, strict=True):
        cut[index] = ids
    return _examples(cut, whole, [[] for _ in rows], [row["label"] for row in rows])


def _prompt_ids(
    rows: Sequence[dict[str, Any]], tokenizer: Any, prompt_template: str | None, system_prompt: str | None
) -> list[list[int]]:
    texts = render_prompts(
        [row["prompt"] for row in rows], tokenizer, prompt_template=prompt_template, system_prompt=system_prompt
    )
    start = [] if tokenizer.chat_template and prompt_template is None else _start_ids(tokenizer)
    return [start + ids for ids in _ids(tokenizer, texts, add_special_tokens=False)]


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    """Some texts at a time, because a tokenizer also returns where each token stood, many times the size of its id."""
    batches = (texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))
    return [ids for batch in batches for ids in tokenizer(batch, **options)["input_ids"]]


def _start_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that put one in front of a text (chat templates write it)."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _answer_ids(rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token, so answers could never end")
    answers = _ids(tokenizer, [row["answer"] for row in rows], add_special_tokens=False)
    return [[*ids, tokenizer.eos_token_id] for ids in answers]


def _pad_token_id(tokenizer: Any) -> int:
    """Padding never counts in the loss nor is it attended to, so any id does where the tokenizer names none."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((token for token in known if token is not None), 0))


def _examples(
    sequences: Sequence[list[int]],
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    class_labels: Sequence[int] | None = None,
) -> Examples:
    return Examples(
        input_ids=np.fromiter(chain.from_iterable(sequences), np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64),
        prompt_tokens=np.array([len(ids) for ids in prompts], np.int64),
        answer_tokens=np.array([len(ids) for ids in answers], np.int64),
        class_labels=np.array([-1] * len(sequences) if class_labels is None else class_labels, np.int64),
    )


def _write_examples(path: Path, examples: Examples) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **vars(examples))
    write_atomic(path, buffer.getvalue())


def _read_examples(path: Path) -> Examples:
    try:
        with np.load(path) as arrays:
            return Examples(**{name: arrays[name] for name in Examples.__dataclass_fields__})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
