"""Tokenising: what the arrays on disk hold, what is cut, and that texts come back from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunemap.config import DatasetConfig
from tunemap.data import tokens as tokens_module
from tunemap.data.rows import read_rows, write_rows
from tunemap.data.sources import prepare
from tunemap.data.tokenizers import load_tokenizer
from tunemap.data.tokens import Tokens, encode_answers, encode_prompts, encode_texts, load_tokens, tokenize
from tunemap.errors import UserError


def tokenized(folder: Path, tokenizer: Path, task: str = "arithmetic", **changes: Any) -> Tokens:
    dataset = DatasetConfig(task=task, source="made", train_rows=40, test_rows=10)
    prepare(dataset, folder / "dataset", data_root=None)
    options: dict[str, Any] = {"max_length": 128, "prompt_template": None, "system_prompt": None}
    tokenize(folder / "dataset", tokenizer, folder / "tokens", **(options | changes))
    return load_tokens(folder / "tokens")


def test_a_training_example_is_prompt_answer_and_end(tmp_path: Path, arithmetic_folder: Path) -> None:
    tokens = tokenized(tmp_path, arithmetic_folder)
    tokenizer = load_tokenizer(arithmetic_folder)
    for index, row in enumerate(read_rows(tmp_path / "dataset" / "train.jsonl")):
        ids = tokens.train.sequence(index)
        border = tokens.train.prompt_tokens[index]
        prompt = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids[:border]) == prompt
        assert tokenizer.decode(ids[border:]) == row["answer"] + "<|im_end|>"
        assert tokens.train.label_tokens[index] == tokens.train.answer_tokens[index] == len(ids) - border
    assert (tokens.task, tokens.task_kind, tokens.max_length) == ("arithmetic", "generation", 128)
    assert (tokens.eos_token_id, tokens.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokens.statistics["rows"] == len(tokens.train) == 40


def test_test_prompts_are_uncut_and_go_with_their_references(tmp_path: Path, arithmetic_folder: Path) -> None:
    tokens = tokenized(tmp_path, arithmetic_folder, max_length=5)
    tokenizer = load_tokenizer(arithmetic_folder)
    assert tokens.train.lengths.max() == 5
    assert tokens.test.lengths.min() > 5
    rows = read_rows(tmp_path / "dataset" / "test.jsonl")
    for index, (row, source) in enumerate(zip(tokens.test_rows, rows, strict=True)):
        assert row["id"] == source["id"]
        assert row["reference"] == source["answer"]
        assert tokenizer.decode(tokens.test.sequence(index)) == row["prompt"]
    longest = max(len(tokenizer(row["answer"])["input_ids"]) for row in rows) + 1
    assert tokens.statistics["longest_reference_tokens"] == longest


def test_examples_are_cut_on_the_right(tmp_path: Path, arithmetic_folder: Path) -> None:
    whole, cut = (tokenized(tmp_path / str(n), arithmetic_folder, max_length=n) for n in (128, 50))
    for index in range(40):
        assert (whole.train.sequence(index)[:50] == cut.train.sequence(index)).all()
    assert (cut.train.answer_tokens == whole.train.answer_tokens).all()
    assert cut.statistics["truncated_answer_share"] == (whole.train.lengths > 50).mean() > 0


def test_classification_keeps_special_tokens_when_it_cuts(tmp_path: Path, sentiment_folder: Path) -> None:
    tokens = tokenized(tmp_path, sentiment_folder, task="sst2", max_length=8)
    tokenizer = load_tokenizer(sentiment_folder)
    rows = read_rows(tmp_path / "dataset" / "train.jsonl")
    assert tokens.task_kind == "classification"
    assert tokens.label_names == ("negative", "positive")
    assert tokens.train.class_labels.tolist() == [row["label"] for row in rows]
    assert tokens.train.lengths.max() == tokens.test.lengths.max() == 8
    for index in range(40):
        ids = tokens.train.sequence(index)
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    whole = np.array([len(tokenizer(row["prompt"])["input_ids"]) for row in rows])
    assert tokens.statistics["truncated_prompt_share"] == (whole > 8).mean() > 0
    assert tokens.statistics["examples_without_label_tokens"] == 0
    assert tokens.statistics["label_tokens_kept_share"] == 1
    assert tokens.statistics["padding_waste_share_by_batching"]["packed"] is None
    assert tokens.statistics["longest_reference_tokens"] is None
    assert tokens.test_rows[0]["reference"] in tokens.label_names


def test_a_bare_prompt_starts_with_the_tokenizers_first_token(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "stories260K" / "hf")
    rows = [{"prompt": "Once upon", "answer": "a time"}]
    examples = encode_answers(rows, tokenizer, 64)
    assert examples.sequence(0)[0] == tokenizer.bos_token_id
    assert examples.sequence(0)[-1] == tokenizer.eos_token_id
    assert list(examples.sequence(0)).count(tokenizer.bos_token_id) == 1
    assert (
        encode_prompts(rows, tokenizer).sequence(0).tolist()
        == examples.sequence(0)[: examples.prompt_tokens[0]].tolist()
    )


def test_tokenising_twice_gives_the_same_bytes(tmp_path: Path, arithmetic_folder: Path) -> None:
    tokenized(tmp_path / "a", arithmetic_folder)
    tokenized(tmp_path / "b", arithmetic_folder)
    for path in sorted((tmp_path / "a" / "tokens").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "tokens" / path.name).read_bytes()


@pytest.mark.parametrize(("task", "folder"), [("arithmetic", "arithmetic_folder"), ("sst2", "sentiment_folder")])
def test_how_many_texts_go_at_once_changes_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, task: str, folder: str
) -> None:
    tokenizer = request.getfixturevalue(folder)
    (tmp_path / "few").mkdir()
    whole = tokenized(tmp_path, tokenizer, task, max_length=20)
    monkeypatch.setattr(tokens_module, "TEXTS_AT_ONCE", 3)  # 40 rows: the last batch has one
    few = tokenized(tmp_path / "few", tokenizer, task, max_length=20)
    for name in ("input_ids", "offsets", "prompt_tokens", "answer_tokens"):
        for split in ("train", "test"):
            assert np.array_equal(getattr(getattr(whole, split), name), getattr(getattr(few, split), name))


def test_worked_examples_that_are_rows_are_counted(tmp_path: Path, arithmetic_folder: Path) -> None:
    tokenized(tmp_path, arithmetic_folder)
    row = read_rows(tmp_path / "dataset" / "test.jsonl")[3]
    template = f"Q: {row['prompt']}\nA: {row['answer']}\n\nQ: {{prompt}}\nA:"
    tokenize(
        tmp_path / "dataset", arithmetic_folder, tmp_path / "shown", max_length=256,
        prompt_template=template, system_prompt=None,
    )  # fmt: skip
    assert load_tokens(tmp_path / "shown").statistics["rows_in_template"] == {"train": 0, "test": 1}


def test_a_tokenizer_without_an_end_is_refused(sentiment_folder: Path) -> None:
    with pytest.raises(UserError, match="has no eos_token"):
        encode_answers([{"prompt": "the film", "answer": "good"}], load_tokenizer(sentiment_folder), 8)


def test_templates_are_refused_for_classification(sentiment_folder: Path) -> None:
    with pytest.raises(UserError, match="are for generation"):
        encode_texts([{"prompt": "x", "label": 0}], load_tokenizer(sentiment_folder), 8, prompt_template="{prompt}")


def test_missing_files_are_named(tmp_path: Path, arithmetic_folder: Path) -> None:
    with pytest.raises(UserError, match=r"tokens\.json: no such file"):
        load_tokens(tmp_path)
    tokenized(tmp_path, arithmetic_folder)
    (tmp_path / "tokens" / "train.npz").unlink()
    with pytest.raises(UserError, match=r"train\.npz: is gone; .* was set aside as tokens\.damaged"):
        load_tokens(tmp_path / "tokens")


def test_rows_survive_being_written(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "süß\u2028\nline"}, {"id": "b", "prompt": "  "}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "latin.jsonl").write_bytes('{"a": "ß"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl, line 1: not UTF-8"):
        read_rows(tmp_path / "latin.jsonl")
