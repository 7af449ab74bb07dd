"""Tokenizers and rows that several tests of the data package share; each is made once."""

from pathlib import Path
from typing import Any

import pytest

from tunemap.corpora import build_arithmetic_tokenizer, build_sentiment_tokenizer
from tunemap.data.rows import read_rows
from tunemap.data.tokenizers import load_tokenizer, resolve_tokenizer


@pytest.fixture(scope="session")
def qwen_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_tokenizer(shared_data / "qwen2.5-tokenizer", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen_folder: Path) -> Any:
    return load_tokenizer(qwen_folder)


@pytest.fixture(scope="session")
def gsm8k_rows(shared_data: Path) -> list[dict[str, Any]]:
    records = read_rows(shared_data / "gsm8k" / "train.jsonl")
    return [{"id": str(i), "prompt": r["question"], "answer": r["answer"]} for i, r in enumerate(records)]


@pytest.fixture(scope="session")
def arithmetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    build_arithmetic_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentiment_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentiment")
    build_sentiment_tokenizer().save_pretrained(folder)
    return folder
