"""Random models: seeded, of the architecture asked for, and refused with the key at fault."""

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM

from tunemap.config import RandomModel
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models import prepare
from tunemap.models.loading import load_tokenizer, read_config


def _model(config="qwen2", tokenizer="arithmetic", **settings) -> RandomModel:
    return RandomModel(source="random", config=config, tokenizer=tokenizer, **settings)


def _weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_same_seed_gives_the_same_bytes_whatever_was_drawn_before(sources, qwen2, tmp_path):
    torch.randn(7)
    state = torch.random.get_rng_state()
    prepare(_model(), tmp_path / "again", data_root=sources)
    prepare(_model(seed=1), tmp_path / "other", data_root=sources)
    assert torch.equal(state, torch.random.get_rng_state())
    for path in qwen2.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert _weights(tmp_path / "other") != _weights(qwen2)


def test_manifest_says_what_the_model_is(qwen2):
    manifest = read_json(qwen2 / "model.json")
    hidden, key_value, inner = 32, 16, 64
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * key_value + key_value)  # query, output, key and value
    layer = attention + 3 * hidden * inner + 2 * hidden
    assert manifest["parameters"] == 512 * hidden + 2 * layer + hidden  # embeddings are tied: once
    assert manifest["architecture"] == "Qwen2ForCausalLM"
    assert manifest["source"]["config"] == "qwen2"
    assert manifest["dtype"] == "F32"
    assert manifest["chat_template"] is True
    assert set(manifest["files"]) == {path.name for path in qwen2.iterdir()} - {"model.json"}


def test_overrides_change_the_architecture_and_dtype(sources, tmp_path):
    prepare(_model(overrides={"num_hidden_layers": 1, "dtype": "bfloat16"}), tmp_path / "m", data_root=sources)
    assert read_config(tmp_path / "m").num_hidden_layers == 1
    assert len(read_config(tmp_path / "m").layer_types) == 1
    assert read_json(tmp_path / "m" / "model.json")["dtype"] == "BF16"


def test_overrides_know_both_names_of_a_distilbert_key(sources, tmp_path):
    for key in ("n_layers", "num_hidden_layers"):
        prepare(_model("distilbert", "sentiment", overrides={key: 1}), tmp_path / key, data_root=sources)
        assert read_json(tmp_path / key / "config.json")["n_layers"] == 1


def test_layer_list_of_the_config_follows_the_number_of_layers(sources, tmp_path):
    settings = read_json(sources / "qwen2" / "config.json") | {"layer_types": ["full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    prepare(
        _model(str(tmp_path / "config.json"), overrides={"num_hidden_layers": 3}), tmp_path / "m", data_root=sources
    )
    assert len(read_config(tmp_path / "m").layer_types) == 3


def test_generation_stops_at_the_tokenizers_own_token(sources, tmp_path):
    settings = read_json(sources / "qwen2" / "config.json") | {"bos_token_id": 151643, "eos_token_id": 151645}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    prepare(_model(str(tmp_path)), tmp_path / "m", data_root=sources)
    assert read_config(tmp_path / "m").eos_token_id == load_tokenizer(tmp_path / "m").eos_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overrides": {"num_hidden_layer": 1}}, "has no key num_hidden_layer; the nearest is num_hidden_layers"),
        ({"overrides": {"hidden_size": "32"}}, "config.json: no valid qwen2 architecture.*hidden_size"),
        ({"overrides": {"hidden_size": 36}}, "makes a model that cannot run"),
        ({"overrides": {"vocab_size": 100}}, r"arithmetic has \d+ entries, but .*config.json has vocab_size 100"),
        ({"config": "absent"}, "absent: no such file"),
        ({"tokenizer": "qwen2"}, "qwen2: no tokenizer here"),
    ],
)
def test_what_cannot_be_built_is_refused(sources, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prepare(_model(**settings), tmp_path / "m", data_root=sources)
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_is_refused(sources, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen17"}')
    with pytest.raises(UserError, match="model_type qwen17 is not an architecture of transformers"):
        prepare(_model(str(tmp_path)), tmp_path / "m", data_root=sources)


def test_real_distilbert_config_with_a_bert_vocabulary(shared_data, tmp_path):
    small = {"n_layers": 2, "dim": 32, "hidden_dim": 64, "n_heads": 4}
    prepare(
        _model("distilbert-base-uncased", "bert-base-uncased", overrides=small), tmp_path / "m", data_root=shared_data
    )
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.tokenize("A Lovely film") == ["a", "lovely", "film"]
    batch = tokenizer("a lovely film", return_tensors="pt", return_token_type_ids=False)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "m")(**batch).logits.shape == (1, 5, 30522)


def test_real_qwen_config_with_its_tokenizer(shared_data, tmp_path):
    small = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = _model("qwen2.5-configs/Qwen2.5-0.5B-Instruct", "qwen2.5-tokenizer", overrides=small)
    prepare(model, tmp_path / "m", data_root=shared_data)
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer("12").input_ids == [16, 17]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert read_json(tmp_path / "m" / "model.json")["tokenizer_entries"] == 151665
