"""A Qwen2 of two tiny layers, batches for it, gradients by plain backward; names of golden values."""

import copy

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.methods import gora
from tunemap.methods.parameters import linear_shapes
from tunemap.methods.undisturbed import model_loss


def tiny_qwen2(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def some_batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 48, (count, 4, 16), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def mean_loss(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([model_loss(model, batch).double() for batch in batches]).mean())


def plain_gradients(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Oracle: backward on a copy with every weight trainable, gradients averaged afterwards."""
    model = copy.deepcopy(model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        model_loss(model, batch).backward()
    return {name: model.get_parameter(f"{name}.weight").grad / len(batches) for name in linear_shapes(model)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


SCRIPTS = "scripts(union_mean,linear,4..32)"  # the allocation of the released scripts, in the golden file
LADDER = list(gora.METHODS)
