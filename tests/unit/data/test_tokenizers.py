"""Tokenizer folders that load, whatever they were given as."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tunemap.data import tokenizers
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


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", gzip.compress(b"{}" * 1000)[:-20], gzip.compress(b"{}" * 1000)[:12] + b"\xff" * 30],
    ids=["empty", "garbage", "cut", "damaged"],
)
def test_a_damaged_gzip_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json.gz: damaged, or no gzip file|no tokenizer could be loaded"):
        load_tokenizer(resolve_tokenizer(tmp_path, tmp_path / "copy"))


def test_a_gzip_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizers, "LARGEST_UNPACKED_BYTES", 10_000)
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(bytes(20_000)))
    with pytest.raises(UserError, match=r"tokenizer.json.gz: unpacks to more than 0 MiB"):
        resolve_tokenizer(tmp_path, tmp_path / "copy")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b"null"])
def test_damaged_settings_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config.json: (not valid JSON|holds no JSON object)"):
        load_tokenizer(tmp_path)


def with_code(folder: Path, **settings: Any) -> Path:
    """A tokenizer folder that would leave a file behind if its code ran."""
    folder.mkdir()
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}} | settings)
    )
    return folder


def test_code_of_a_folder_is_never_run(tmp_path: Path, arithmetic_folder: Path) -> None:
    folder = with_code(tmp_path / "code", tokenizer_class="Mine")
    (folder / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match="its tokenizer is code of its own, which is never run"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_bytes((arithmetic_folder / "tokenizer.json").read_bytes())
    assert len(load_tokenizer(folder)) == len(load_tokenizer(arithmetic_folder))  # its file alone is enough
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "pipeline", "logging", "__name__", "Trainer"])
def test_a_tokenizer_class_that_is_none_is_not_taken(arithmetic_folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (tmp_path / "tokenizer.json").write_bytes((arithmetic_folder / "tokenizer.json").read_bytes())
    assert type(load_tokenizer(tmp_path)).__name__ != name
