"""Small models with the made tokenizers, so that most tests of `tunemap.models` need no data from outside."""

import json
from pathlib import Path

import pytest
import torch

from tunemap import corpora
from tunemap.config import RandomModel
from tunemap.models import prepare

QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
DISTILBERT = {
    "model_type": "distilbert",
    "architectures": ["DistilBertForMaskedLM"],
    "vocab_size": 64,
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A data root: configs of a Qwen2 and a DistilBERT, and the tokenizers of the made corpora."""
    root = tmp_path_factory.mktemp("sources")
    for name, config in (("qwen2", QWEN2), ("distilbert", DISTILBERT)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    corpora.build_sentiment_tokenizer().save_pretrained(root / "sentiment")
    return root


@pytest.fixture(scope="session")
def qwen2(sources, tmp_path_factory) -> Path:
    """A prepared random Qwen2 of 2 layers; do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    prepare(RandomModel(source="random", config="qwen2", tokenizer="arithmetic"), folder, data_root=sources)
    return folder


@pytest.fixture(scope="session")
def distilbert(sources, tmp_path_factory) -> Path:
    """A prepared random DistilBERT of 2 layers, saved as a masked language model; do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "distilbert"
    prepare(RandomModel(source="random", config="distilbert", tokenizer="sentiment"), folder, data_root=sources)
    return folder
