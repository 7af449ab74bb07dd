"""The fused sum of LoRA layers, against PEFT's own: the same results and gradients, with less kept and written."""

import copy

import pytest
import torch
from four_bit import quantised
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.methods.lora_layers import fuse_low_rank_sums

IDS = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(1))


def made_model(dtype=torch.float32, adapter_dtype=torch.float32, rounded=None, **settings):
    """A tiny Qwen2 with LoRA layers, B not zero; `rounded`: base weights rounded to 4 bits, packed or not."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    if rounded:
        model = quantised(model, dequantised=rounded == "unpacked")
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": "all-linear"} | settings), autocast_adapter_dtype=False
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return adapted.train()


def fused(model):
    other = copy.deepcopy(model)
    fuse_low_rank_sums(other)
    return other


def step(model, dtype=None):
    """Loss and gradients; `dtype` is autocast's."""
    torch.manual_seed(2)  # of dropout
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = cross_entropy(model(input_ids=IDS).logits.flatten(0, 1).float(), IDS.flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fused_layers(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=["plain", "dropout", "rs"])
def test_the_sum_and_its_gradients_are_those_of_peft(settings):
    model = made_model(**settings)
    other = fused(model)
    assert len(fused_layers(other)) == 14  # 7 linear layers in each of 2 blocks
    (expected, gradients), (found, others) = step(model), step(other)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(others, gradients)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}, None),
        ({"dtype": torch.bfloat16, "rounded": "packed"}, torch.bfloat16),
        ({"dtype": torch.bfloat16, "rounded": "packed"}, None),
    ],
    ids=["autocast", "mixed", "all bfloat16", "4 bits, autocast", "4 bits"],
)
def test_rounding_is_all_that_differs_in_low_precision(model, dtype):
    """Against the same model in float32, the fused sum is about as near as PEFT's."""
    plain = made_model(**model)
    (kept, gradients), (found, others) = step(plain, dtype), step(fused(plain), dtype)
    unpacked = made_model(**model | ({"rounded": "unpacked"} if "rounded" in model else {}))
    exact, precise = step(unpacked.float())
    assert abs(found - exact) <= 2 * abs(kept - exact) + 2e-3
    for name, expected in precise.items():
        off, usual = ((one[name].float() - expected).norm() / expected.norm() for one in (others, gradients))
        assert off <= 1.5 * usual + 0.005
        assert others[name].dtype == gradients[name].dtype


def test_a_float32_model_with_four_bit_layers_learns_the_same():
    model = made_model(rounded="packed")
    other = fused(model)
    assert len(fused_layers(other)) == 14
    (expected, gradients), (found, others) = step(model), step(other)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(others, gradients)


def test_under_autocast_no_copy_of_the_inputs_is_kept_for_each_adapter():
    def kept_bytes(model):
        seen = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS).logits.sum()
        assert loss.requires_grad
        return sum(seen.values())

    model = made_model(dtype=torch.bfloat16)
    one = 2 * IDS.numel() * 64  # bytes of the hidden states in bfloat16
    # In each of 2 blocks q, k, v share their inputs, gate and up share theirs, and o's are kept by the attention.
    assert kept_bytes(model) - kept_bytes(fused(model)) == 2 * (2 + 1 + 1) * one


def test_both_count_the_same_flops():
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            step(model)
        return counter.get_total_flops()

    model = made_model()
    assert flops(fused(model)) == flops(model)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["embed_tokens"]}],
    ids=["dora", "bias", "embedding"],
)
def test_layers_that_compute_more_than_the_sum_stay_as_they_are(settings):
    model = made_model(**settings)
    fuse_low_rank_sums(model)
    assert fused_layers(model) == []


def test_a_switched_off_adapter_adds_nothing():
    plain = made_model()
    model = fused(plain)
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        off, without = (one(input_ids=IDS).logits for one in (model, plain))
    with torch.no_grad():
        on = base(input_ids=IDS).logits
        model.merge_adapter()
        merged = base(input_ids=IDS).logits
        model.unmerge_adapter()
    assert torch.equal(off, without)
    assert (off - on).abs().max() > 0.01
    torch.testing.assert_close(merged, on, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_the_same():
    model = made_model()
    assert fused(model).state_dict().keys() == model.state_dict().keys()
