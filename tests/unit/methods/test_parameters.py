"""Parameter counts against the published studies' numbers and against hand counts on small models."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tunemap.methods.parameters import (
    ParameterCounts,
    count_parameters,
    head_names,
    heads_to_save,
    linear_shapes,
    lora_closed_form,
)

torch.set_num_threads(1)


def tiny_qwen2(**changes) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes)))


@pytest.fixture(scope="module")
def qwen_1_5b(shared_data) -> nn.Module:
    config = AutoConfig.from_pretrained(shared_data / "qwen2.5-configs" / "Qwen2.5-1.5B-Instruct")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_qwen_1_5b_counts_tied_embeddings_once(qwen_1_5b):
    counts = count_parameters(qwen_1_5b)
    assert counts == ParameterCounts(trainable=1_543_714_304, total=1_543_714_304, adapter=0, head=0)


def test_qwen_1_5b_all_linear_rank_16_is_the_published_count(qwen_1_5b):
    shapes = linear_shapes(qwen_1_5b)
    assert len(shapes) == 196
    assert sum(rows * columns for rows, columns in shapes.values()) == 1_310_195_712
    assert lora_closed_form(shapes, 16) == 18_464_768


def test_qwen_1_5b_query_value_rank_16_equals_all_attention_rank_8(qwen_1_5b):
    shapes = linear_shapes(qwen_1_5b)
    query_value = {name: shape for name, shape in shapes.items() if name.endswith(("q_proj", "v_proj"))}
    attention = {name: shape for name, shape in shapes.items() if "self_attn" in name}
    assert lora_closed_form(query_value, 16) == 2_179_072
    assert lora_closed_form(attention, 8) == 2_179_072


def test_peft_on_the_meta_device_agrees_with_the_closed_form(qwen_1_5b):
    config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    counts = count_parameters(get_peft_model(qwen_1_5b, config, low_cpu_mem_usage=True))
    assert counts == ParameterCounts(trainable=2_179_072, total=1_543_714_304 + 2_179_072, adapter=2_179_072, head=0)


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_distilbert_splits_adapter_from_head(shared_data, rank):
    config = AutoConfig.from_pretrained(shared_data / "distilbert-base-uncased", num_labels=2)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    total = count_parameters(model).total
    heads = head_names(model)
    assert heads == ["pre_classifier", "classifier"]
    assert heads_to_save(model) == []  # PEFT finds both by their names
    lora = LoraConfig(r=rank, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")
    counts = count_parameters(get_peft_model(model, lora, low_cpu_mem_usage=True))
    assert counts.adapter == rank * 2 * (768 + 768) * 6
    assert counts.head == 592_130
    assert counts.trainable == {4: 665_858, 8: 739_586, 16: 887_042, 32: 1_181_954}[rank]
    assert counts.total == total + counts.adapter


def test_untied_output_layer_is_the_head_and_tied_is_not():
    tied, untied = count_parameters(tiny_qwen2()), count_parameters(tiny_qwen2(tie_word_embeddings=False))
    assert tied.head == 0
    assert untied.head == 48 * 32
    assert untied.total == tied.total + 48 * 32


def test_two_parameters_on_one_storage_count_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    assert model["a"].weight is not model["b"].weight
    assert count_parameters(model).total == 12


def test_slices_of_one_storage_count_each():
    flat = torch.zeros(8)
    model = nn.ParameterList([nn.Parameter(flat[:4]), nn.Parameter(flat[4:])])
    assert count_parameters(model).total == 8


def test_frozen_parameters_are_not_trainable():
    model = tiny_qwen2()
    model.get_input_embeddings().weight.requires_grad_(False)
    counts = count_parameters(model)
    assert counts.total - counts.trainable == 48 * 32


def test_four_bit_weights_count_by_their_logical_shape():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    full = nn.Sequential(nn.Linear(64, 32, bias=False))
    packed = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4"))
    packed.load_state_dict(full.state_dict())
    packed.to("cpu")
    assert packed[0].weight.numel() == 64 * 32 // 2
    assert count_parameters(packed).total == count_parameters(full).total == 64 * 32


def test_prompt_parameters_are_adapter_parameters():
    model = get_peft_model(tiny_qwen2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    counts = count_parameters(model)
    assert counts.trainable == counts.adapter == 5 * 32


def test_layers_of_gpt2_are_linear_though_their_weights_lie_transposed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    shapes = linear_shapes(model)
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=True))
    assert count_parameters(adapted).trainable == lora_closed_form(shapes, 3)


def test_closed_form_takes_one_rank_per_module():
    shapes = {"a": (3, 5), "b": (7, 2)}
    assert lora_closed_form(shapes, {"a": 2, "b": 4}) == 2 * 8 + 4 * 9
    assert lora_closed_form(shapes, 2) == lora_closed_form(shapes, {"a": 2, "b": 2})
