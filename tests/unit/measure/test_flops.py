"""Closed-form FLOPs against torch's counter over families, ways to train, checkpointing and shapes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunemap.measure.flops import (
    StepFlops,
    Trained,
    flop_counter,
    hfu,
    mfu,
    model_shape,
    step_flops,
    trained_of,
)

torch.set_num_threads(1)

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DISTILBERT_LINEAR = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")
HEAD = frozenset({"pre_classifier", "classifier"})


def qwen2(**overrides):
    from transformers import Qwen2Config

    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "use_cache": False,
    }  # fmt: skip
    return Qwen2Config(**{**sizes, **overrides})


def llama(**overrides):
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 256, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 40, "tie_word_embeddings": False,
        "use_cache": False,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **overrides})


def distilbert(**overrides):
    from transformers import DistilBertConfig

    sizes = {
        "vocab_size": 128,
        "dim": 64,
        "hidden_dim": 256,
        "n_layers": 2,
        "n_heads": 4,
        "num_labels": 3,
        "attention_dropout": 0.0,
    }
    return DistilBertConfig(**{**sizes, **overrides})


def build(config):
    from transformers import DistilBertForSequenceClassification, LlamaForCausalLM, Qwen2ForCausalLM

    classes = {
        "qwen2": Qwen2ForCausalLM,
        "llama": LlamaForCausalLM,
        "distilbert": DistilBertForSequenceClassification,
    }
    torch.manual_seed(0)
    return classes[config.model_type](config)


def train(model, trained):
    """Give a model the trained weights that `trained` describes, adapters by PEFT."""
    if trained.everything:
        return model
    ranks = {name: rank for name, rank in trained.ranks.items() if rank}
    if ranks:
        from peft import LoraConfig, get_peft_model

        # Full names as patterns, so that each module gets its own rank.
        adapters = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, modules_to_save=sorted(trained.modules))
        return get_peft_model(model, adapters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in trained.modules)
    return model


def counted(config, trained, batches, gradient_checkpointing=False):
    model = train(build(config), trained).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    total = 0
    for sequences, width in batches:
        counter = flop_counter()
        ids = torch.randint(0, config.vocab_size, (sequences, width))
        labels = ids if config.model_type != "distilbert" else torch.zeros(sequences, dtype=torch.long)
        with counter:
            model(input_ids=ids, labels=labels).loss.backward()
        total += counter.get_total_flops()
    return total


def adapters(config, rank=4, targets=ALL_LINEAR, modules=frozenset()):
    """One rank on every module whose last name part is in `targets`, as peft's target_modules select them."""
    names = [layer.name for layer in model_shape(config).linears]
    return Trained(ranks={name: rank for name in names if name.rpartition(".")[2] in targets}, modules=modules)


def uneven(config):
    """Another rank on every module and none on some, as a rank allocation makes them."""
    shape = model_shape(config)
    names = [layer.name for layer in shape.linears if layer not in shape.head]
    return Trained(ranks={name: (3 * index) % 8 for index, name in enumerate(names)})


FULL = Trained(everything=True)
CONFIGURATIONS = {
    "qwen2 full": (qwen2(), FULL, [(4, 48)], {}),
    "qwen2 full, untied": (qwen2(tie_word_embeddings=False), FULL, [(4, 48)], {}),
    "qwen2 full, checkpointed": (qwen2(), FULL, [(4, 48)], {"gradient_checkpointing": True}),
    "qwen2 full, two micro-batches": (qwen2(), FULL, [(4, 48), (2, 80)], {}),
    "qwen2 full, long": (qwen2(num_hidden_layers=1), FULL, [(1, 512)], {}),
    "qwen2 full, eager": (qwen2(attn_implementation="eager"), FULL, [(4, 48)], {"fused_attention": False}),
    "qwen2 lora": (qwen2(), adapters(qwen2()), [(4, 48)], {}),
    "qwen2 lora, checkpointed": (qwen2(), adapters(qwen2()), [(4, 48)], {"gradient_checkpointing": True}),
    "qwen2 lora q v": (qwen2(), adapters(qwen2(), 16, ("q_proj", "v_proj")), [(4, 48)], {}),
    "qwen2 lora mlp": (qwen2(), adapters(qwen2(), 8, ("up_proj", "down_proj")), [(4, 48)], {}),
    "qwen2 lora v, eager": (
        qwen2(attn_implementation="eager"),
        adapters(qwen2(), 8, ("v_proj",)),
        [(4, 96)],
        {"fused_attention": False},
    ),
    "qwen2 uneven ranks": (qwen2(), uneven(qwen2()), [(3, 40)], {}),
    "qwen2 uneven ranks, checkpointed": (qwen2(), uneven(qwen2()), [(3, 40)], {"gradient_checkpointing": True}),
    "llama full": (llama(), FULL, [(2, 64)], {}),
    "llama full, checkpointed": (llama(), FULL, [(2, 64)], {"gradient_checkpointing": True}),
    "llama lora": (llama(), adapters(llama(), 32), [(2, 64)], {}),
    "llama lora, checkpointed": (llama(), adapters(llama(), 32), [(2, 64)], {"gradient_checkpointing": True}),
    "distilbert full": (distilbert(), FULL, [(8, 32)], {}),
    "distilbert full, checkpointed": (distilbert(), FULL, [(8, 32)], {"gradient_checkpointing": True}),
    "distilbert lora and head": (
        distilbert(), adapters(distilbert(), 8, ("q_lin", "v_lin"), HEAD), [(8, 32)], {},
    ),
    "distilbert all-linear, checkpointed": (
        distilbert(), adapters(distilbert(), 8, DISTILBERT_LINEAR, HEAD), [(8, 32)], {"gradient_checkpointing": True},
    ),
    "distilbert full, attention dropout": (
        distilbert(attention_dropout=0.1), FULL, [(8, 32)], {"fused_attention": False},
    ),
    "distilbert head only": (distilbert(), Trained(modules=HEAD), [(8, 32)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_closed_form_equals_the_counter(name):
    config, trained, batches, options = CONFIGURATIONS[name]
    expected = counted(config, trained, batches, options.get("gradient_checkpointing", False))
    predicted = step_flops(model_shape(config), trained, batches, **options).hardware_flops
    assert predicted == expected


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_is_trained_is_read_back_from_the_model(name):
    config, trained, _, _ = CONFIGURATIONS[name]
    found = trained_of(train(build(config), trained), model_shape(config))
    assert found.everything == trained.everything
    assert found.ranks == {module: rank for module, rank in trained.ranks.items() if rank}
    assert found.modules == trained.modules


def test_without_a_gradient_at_the_input_checkpointing_costs_less():
    config, shape = qwen2(), model_shape(qwen2())
    trained = adapters(config)
    asked = step_flops(shape, trained, [(2, 32)], gradient_checkpointing=True, input_requires_grad=False)
    usual = step_flops(shape, trained, [(2, 32)], gradient_checkpointing=True)
    first_block_inputs = sum(2 * 64 * layer.in_features * (layer.out_features + 4) for layer in shape.blocks[0].qkv)
    assert usual.backward_dx - asked.backward_dx == first_block_inputs


def test_four_bit_base_costs_what_a_plain_base_costs():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain, packed = torch.nn.Linear(64, 128, bias=False), bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(plain.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    packed = packed.to("cpu")
    totals = []
    for layer in (plain.requires_grad_(False), packed):
        x = torch.randn(4, 16, 64, requires_grad=True)
        counter = flop_counter()
        with counter:
            layer(x).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * 2 * 64 * 64 * 128


@given(st.integers(1, 4), st.integers(1, 64))
def test_full_fine_tuning_is_six_n_t_and_attention(sequences, width):
    shape = model_shape(qwen2())
    flops = step_flops(shape, FULL, [(sequences, width)])
    assert flops.forward == flops.backward_dx == flops.backward_dw
    assert 3 * flops.forward == 6 * shape.linear_parameters * sequences * width
    assert flops.attention_backward == 2 * flops.attention_forward == 2 * 2 * 4 * sequences * width**2 * 64
    assert flops.recomputed == 0


@given(st.integers(0, 64), st.booleans())
def test_more_rank_costs_more_and_rank_zero_costs_no_more_than_inference(rank, gradient_checkpointing):
    shape = model_shape(qwen2())
    cost = [
        step_flops(
            shape,
            adapters(qwen2(), r),
            [(2, 16)],
            gradient_checkpointing=gradient_checkpointing,
            input_requires_grad=False,
        )
        for r in (rank, rank + 1)
    ]
    assert cost[0].hardware_flops < cost[1].hardware_flops
    if rank == 0:
        assert cost[0].model_flops == cost[0].forward + cost[0].attention_forward
        assert cost[0].recomputed == 0


def test_published_numbers_of_a_real_shape(shared_data):
    """Qwen2.5-1.5B, 8 × 256 tokens: counted under fake tensors, full 1.928e13 and checkpointed 2.316e13."""
    from transformers import Qwen2Config

    config = Qwen2Config(**json.loads((shared_data / "qwen2.5-configs/Qwen2.5-1.5B-Instruct/config.json").read_text()))
    shape = model_shape(config)
    full = step_flops(shape, FULL, [(8, 256)])
    checkpointed = step_flops(shape, FULL, [(8, 256)], gradient_checkpointing=True)
    low_rank = step_flops(shape, adapters(config, 8), [(8, 256)])
    assert full.hardware_flops == pytest.approx(1.928e13, rel=1e-3)
    assert checkpointed.hardware_flops == pytest.approx(2.316e13, rel=1e-3)
    assert low_rank.hardware_flops == pytest.approx(1.306e13, rel=1e-3)
    assert checkpointed.model_flops == full.model_flops


def test_steps_add_up_by_column():
    total = StepFlops(forward=1, recomputed=2) + StepFlops(forward=10, attention_recomputed=5)
    assert total == StepFlops(forward=11, recomputed=2, attention_recomputed=5)
    assert (total.model_flops, total.hardware_flops) == (11, 18)


def test_utilisation_is_a_share_of_the_peak():
    assert mfu(5e12, 2.0, 1e13) == 0.25
    assert hfu(8e12, 2.0, 1e13) == 0.4


def test_logits_of_few_positions_cost_their_share_of_the_output_layer():
    shape = model_shape(qwen2())
    every, half, none = (step_flops(shape, FULL, [(2, 16)], logit_rows=rows) for rows in (None, 16, 0))
    head = 3 * 2 * 32 * shape.head[0].in_features * shape.head[0].out_features
    assert (every.hardware_flops - none.hardware_flops, half.hardware_flops - none.hardware_flops) == (head, head // 2)
    assert step_flops(shape, FULL, [(0, 0)], logit_rows=1).times(16).hardware_flops == head // 2


def test_an_unknown_family_is_refused():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"'gpt2'.*qwen2, llama, distilbert"):
        model_shape(GPT2Config())
