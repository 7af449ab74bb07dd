"""Tokenizer folders that load, whatever they were given as."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunemap.data.tokenizers import load_tokenizer, resolve_tokenizer, tokenizer_files
from tunemap.errors import UserError


def test_a_gzipped_tokenizer_equals_the_one_built_from_its_vocabulary(shared_data: Path, qwen_tokenizer: Any) -> None:
    text = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72<|im_end|>"
    plain = load_tokenizer(shared_data / "qwen2.5-tokenizer")  # vocab.json and merges.txt
    assert qwen_tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert qwen_tokenizer.eos_token == "<|im_end|>"
    assert qwen_tokenizer("48")["input_ids"] == [19, 23]


def test_a_lone_vocabulary_is_taken_for_word_pieces(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_tokenizer(shared_data / "bert-base-uncased", tmp_path))
    assert tokenizer("Hello WORLD")["input_ids"] == [101, 7592, 2088, 102]
    assert tokenizer.pad_token_id == 0


def test_a_hub_folder_is_copied_as_it_is(arithmetic_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    folder = resolve_tokenizer(arithmetic_folder, tmp_path / "copy")
    text = "3 + 4 = <<3+4=7>>7 apples."
    assert load_tokenizer(folder)(text)["input_ids"] == load_tokenizer(arithmetic_folder)(text)["input_ids"]
    assert [path.name for path in tokenizer_files(folder)] == [path.name for path in tokenizer_files(arithmetic_folder)]


def test_settings_beside_a_vocabulary_are_kept(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nHello\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    folder = resolve_tokenizer(tmp_path, tmp_path / "copy")
    assert json.loads((folder / "tokenizer_config.json").read_text())["do_lower_case"] is False
    assert load_tokenizer(folder)("Hello")["input_ids"] == [2, 5, 3]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer here; expected one of tokenizer.json"):
        resolve_tokenizer(tmp_path, tmp_path / "copy")


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
