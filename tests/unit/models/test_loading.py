"""A loaded model has the dtype, 4-bit layers, head, attention and padding asked for, or an error says why not."""

import json
import logging
import math
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from transformers import ModernBertConfig, ModernBertModel

from tunemap.config import LocalModel
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models import prepare
from tunemap.models.loading import (
    Quantization,
    assert_quantised,
    empty_model,
    load_model,
    load_tokenizer,
    transformer_blocks,
)

NF4 = Quantization("nf4", double_quantization=True, compute_dtype=torch.float32)
FP4 = Quantization("fp4", double_quantization=False, compute_dtype=torch.bfloat16)


def _load(folder, kind="generation", **settings):
    labels = 2 if kind == "classification" else None
    defaults = {"dtype": torch.float32, "quantization": None, "attention": "sdpa", "seed": 0, "device": "cpu"}
    return load_model(folder, task_kind=kind, num_labels=labels, **(defaults | settings))


def _copy(source, destination):
    """A folder that may be changed: the files of a prepared one without its manifest."""
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("model.json"))
    return destination


# --- dtype, attention, padding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_has_the_dtype_asked_for(qwen2, dtype):
    model = _load(qwen2, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = load_file(qwen2 / "model.safetensors")
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"].to(dtype))


def test_cache_is_off_for_training_and_on_for_generation(qwen2):
    model = _load(qwen2)
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is True


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(qwen2, attention):
    assert _load(qwen2, attention=attention).config._attn_implementation == attention


def test_attention_that_is_not_installed_is_refused(qwen2):
    with pytest.raises(UserError, match="FlashAttention2"):
        _load(qwen2, attention="flash_attention_2")


def test_generation_settings_of_the_folder_do_not_change_greedy_decoding(qwen2, tmp_path):
    folder = _copy(qwen2, tmp_path / "m")
    settings = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 9.0, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded = _load(folder).generation_config
    assert (loaded.do_sample, loaded.repetition_penalty, loaded.eos_token_id) == (False, None, [2, 0])


def test_decoder_classifies_a_padded_text_as_it_does_alone(qwen2):
    model, tokenizer = _load(qwen2, "classification"), load_tokenizer(qwen2)
    texts = ["Tom has 3 apples.", "Ann has 12 books and 4 pens."]
    padded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        together = model(**padded).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone)


def test_tokenizer_without_pad_token_pads_with_its_end_token(distilbert, tmp_path):
    folder = _copy(distilbert, tmp_path / "m")
    settings = read_json(folder / "tokenizer_config.json")
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "[SEP]"}))
    assert load_tokenizer(folder).pad_token == "[SEP]"
    assert _load(folder, "classification").config.pad_token_id == load_tokenizer(folder).sep_token_id
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer_config.json: names neither a pad_token nor an eos_token"):
        load_tokenizer(folder)


def test_fine_tuned_model_saved_without_tokenizer_keeps_its_padding(qwen2, tmp_path):
    model = _load(qwen2, "classification")
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path / "m")
    again = _load(tmp_path / "m", "classification", seed=5)
    assert again.config.pad_token_id == 7
    torch.testing.assert_close(again.score.weight, model.score.weight)  # the trained head, not a new one


def test_loading_says_nothing(distilbert, capfd, caplog):
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _load(distilbert, "classification", quantization=NF4)
    assert not caught
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


# --- heads ---


@pytest.mark.parametrize(
    "settings",
    [{}, {"quantization": NF4}, {"dtype": torch.bfloat16}, {"attention": "eager"}],
    ids=["float32", "nf4", "bfloat16", "eager"],
)
@pytest.mark.parametrize("name", ["qwen2", "distilbert"])
def test_new_head_depends_on_the_seed_alone(name, settings, request):
    folder = request.getfixturevalue(name)
    torch.randn(3)
    head, expected = (_head(_load(folder, "classification", seed=4, **s)) for s in (settings, {}))
    for key in expected:
        torch.testing.assert_close(head[key].float(), expected[key], rtol=2**-8, atol=0)
    other = _head(_load(folder, "classification", seed=5))
    assert not any(torch.equal(other[key], value) for key, value in expected.items() if value.dim() == 2)


def _head(model) -> dict[str, torch.Tensor]:
    prefix = f"{model.base_model_prefix}."
    return {name: p.detach() for name, p in model.named_parameters() if not name.startswith(prefix)}


def test_new_head_is_normal_with_zero_bias(distilbert):
    head = _head(_load(distilbert, "classification"))
    weight = head["pre_classifier.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(weight.mean().item()) < 5 * 0.02 / math.sqrt(weight.numel())
    assert not head["pre_classifier.bias"].any()


def test_new_norm_of_a_head_lets_the_text_through(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=64, max_position_embeddings=32, pad_token_id=0, **sizes)
    ModernBertModel(config).save_pretrained(tmp_path)
    model = _load(tmp_path, "classification")
    assert torch.equal(model.head.norm.weight, torch.ones(32))
    model(input_ids=torch.arange(1, 9)[None]).logits.square().sum().backward()
    assert model.head.dense.weight.grad.abs().max() > 0


# --- weights that do not fit ---


def _edited(qwen2, destination, edit):
    folder = _copy(qwen2, destination)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _lack(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def _add(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.norm.weight"].clone()


def _shrink(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_lack, "they lack: model.layers.1.mlp.up_proj.weight"),
        (_add, "they hold besides: model.layers.2.mlp.up_proj.weight"),
        (_shrink, r"they have other shapes: model.norm.weight \(5,\) instead of \(32,\)"),
    ],
)
@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_weights_that_do_not_fit_the_config_are_refused(qwen2, tmp_path, edit, message, kind):
    folder = _edited(qwen2, tmp_path / "m", edit)
    with pytest.raises(UserError, match=f"the weights do not fit config.json; {message}"):
        _load(folder, kind)


def test_head_of_another_task_is_replaced(distilbert, tmp_path):
    load_model(
        distilbert,
        task_kind="classification",
        num_labels=3,
        dtype=torch.float32,
        quantization=None,
        attention="sdpa",
        seed=0,
        device="cpu",
    ).save_pretrained(tmp_path / "three")
    assert _load(tmp_path / "three", "classification").classifier.weight.shape == (2, 32)


def test_truncated_weights_are_refused(qwen2, tmp_path):
    folder = _copy(qwen2, tmp_path / "m")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UserError, match=f"{folder}: transformers .* cannot load it"):
        _load(folder)


def test_missing_weights_are_refused(qwen2, tmp_path):
    folder = _copy(qwen2, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights; expected model"):
        _load(folder)


class _Runs:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_and_not_opened(qwen2, tmp_path, name):
    folder = _copy(qwen2, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weights": _Runs(tmp_path / "ran")}))
    with pytest.raises(UserError, match=r"no weights; expected model.safetensors|cannot load it"):
        _load(folder)
    with pytest.raises(UserError, match=r"pytorch_model.bin must be converted|damaged"):
        prepare(LocalModel(source="local", path=str(folder)), tmp_path / "taken")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_folder_is_never_run(qwen2, tmp_path):
    folder = _copy(qwen2, tmp_path / "m")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = read_json(folder / "config.json")
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    assert type(_load(folder)).__name__ == "Qwen2ForCausalLM"
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "mine"}))
    with pytest.raises(UserError, match="model_type mine is not an architecture of transformers"):
        _load(folder)
    assert not (tmp_path / "ran").exists()


def test_encoder_is_refused_for_generation(distilbert):
    with pytest.raises(UserError, match="a distilbert reads text in both directions and cannot generate"):
        _load(distilbert)


# --- 4 bits ---


@pytest.mark.parametrize("quantization", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize(("name", "kind", "linears"), [
    ("qwen2", "generation", 14), ("qwen2", "classification", 14), ("distilbert", "classification", 12),
])  # fmt: skip
def test_linear_layers_of_the_blocks_are_in_4_bits_and_nothing_else(name, kind, linears, quantization, request):
    model = _load(request.getfixturevalue(name), kind, quantization=quantization, dtype=torch.bfloat16)
    assert assert_quantised(model) == linears
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == linears
    assert {p.dtype for name, p in model.named_parameters() if name not in packed} == {torch.bfloat16}


def test_output_layer_of_its_own_is_not_packed(sources, tmp_path):
    from tunemap.config import RandomModel

    untied = RandomModel(
        source="random", config="qwen2", tokenizer="arithmetic", overrides={"tie_word_embeddings": False}
    )
    prepare(untied, tmp_path / "m", data_root=sources)
    assert _load(tmp_path / "m", quantization=NF4).lm_head.weight.dtype == torch.float32


def test_double_quantisation_and_type_reach_every_layer(qwen2):
    from bitsandbytes.nn import Linear4bit

    for quantization in (NF4, FP4):
        for module in _load(qwen2, quantization=quantization).modules():
            if isinstance(module, Linear4bit):
                assert module.weight.quant_state.nested is quantization.double_quantization
                assert module.weight.quant_state.quant_type == quantization.quantization_type
                assert module.compute_dtype == quantization.compute_dtype


@pytest.mark.parametrize("columns", [64, 128, 32, 96, 172, 6], ids=lambda columns: f"{columns} columns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_weights_are_the_nearest_of_the_published_levels(qwen2, columns, dtype):
    """Levels from normal quantiles, scaled by the absolute maximum of blocks of 64 elements of the flattened matrix.

    Source: Dettmers et al. 2023, appendix E. 32 and 96 columns fail without the repair on CPUs with AVX512.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    _load(qwen2, quantization=NF4)
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    weight = torch.randn(11, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", blocksize=64)).float().numpy()
    flat = weight.float().numpy().ravel()
    expected = np.empty_like(flat)
    for block in (slice(begin, begin + 64) for begin in range(0, flat.size, 64)):
        scale = np.abs(flat[block]).max()
        expected[block] = levels[np.abs(flat[block, None] / scale - levels).argmin(-1)] * scale
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", ["qwen2", "distilbert"])
def test_evaluation_does_not_change_the_next_gradient(name, request):
    """Fails without the repair on CPUs with AVX512-BF16, where bitsandbytes repacks weights in eval mode."""
    model = _load(request.getfixturevalue(name), "classification", quantization=NF4)
    ids = torch.arange(5, 15)[None]
    embedding = model.get_input_embeddings().weight

    def gradient() -> torch.Tensor:
        embedding.grad = None
        torch.manual_seed(0)
        model.train()(input_ids=ids, labels=torch.tensor([1])).loss.backward()
        return embedding.grad.clone()

    before = gradient()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids, labels=torch.tensor([1])).logits
        again = model(input_ids=ids, labels=torch.tensor([1])).logits
    assert before.abs().sum() > 0
    assert torch.equal(evaluated, again)
    assert torch.equal(gradient(), before)


def test_plain_model_is_not_taken_for_a_quantised_one(qwen2):
    with pytest.raises(RuntimeError, match="0 of 14 linear layers of the transformer blocks are in 4 bits"):
        assert_quantised(_load(qwen2))


def test_adapters_do_not_hide_4_bit_layers(qwen2):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_load(qwen2, quantization=NF4), LoraConfig(r=2, target_modules="all-linear"))
    assert assert_quantised(model) == 14
    assert {type(block).__name__ for block in transformer_blocks(model)} == {"Qwen2DecoderLayer"}


# --- blocks and empty models ---


def block_classes(model):
    return {type(block).__name__ for block in transformer_blocks(model)}


def test_blocks_are_found_in_every_architecture(qwen2, distilbert, shared_data):
    assert block_classes(_load(qwen2)) == {"Qwen2DecoderLayer"}
    assert block_classes(_load(distilbert, "classification")) == {"TransformerBlock"}
    bert = empty_model(shared_data / "bert-base-uncased", task_kind="classification", num_labels=2)
    assert block_classes(bert) == {"BertLayer"}
    assert len(transformer_blocks(bert)) == 12
    llama = empty_model(shared_data / "stories260K" / "hf", task_kind="generation")
    assert block_classes(llama) == {"LlamaDecoderLayer"}


@pytest.mark.parametrize(("name", "kind"), [("qwen2", "generation"), ("distilbert", "classification")])
def test_empty_model_is_the_loaded_one_without_memory(name, kind, request):
    folder = request.getfixturevalue(name)
    labels = 2 if kind == "classification" else None
    empty = empty_model(folder, task_kind=kind, num_labels=labels, dtype=torch.bfloat16)
    loaded = _load(folder, kind, dtype=torch.bfloat16)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in loaded.named_parameters()
    ]


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512)],
)
def test_empty_models_have_the_published_parameter_counts(shared_data, size, parameters):
    model = empty_model(shared_data / "qwen2.5-configs" / f"Qwen2.5-{size}-Instruct", task_kind="generation")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# --- a genuine pretrained model ---


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "stories"
    prepare(LocalModel(source="local", path="stories260K/hf"), folder, data_root=shared_data)
    return folder


@pytest.mark.parametrize(
    ("quantization", "measured_loss"), [(None, 0.386), (NF4, 0.457), (FP4, 0.472)], ids=["float32", "nf4", "fp4"]
)
def test_genuine_llama_predicts_its_own_kind_of_text(stories, quantization, measured_loss):
    """A model that knows nothing scores log(512) = 6.24 nats a token; a wrong rotary base or tying, several."""
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high."
    )
    ids = load_tokenizer(stories)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = _load(stories, quantization=quantization)(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(measured_loss, abs=0.02)
