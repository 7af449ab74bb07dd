"""LoRA layers of PEFT that read and write memory less often: the same sum, as part of a matrix product.

PEFT adds `lora_B(lora_A(x)) * scaling` to the layer's result: a product, a scaling and a sum, each a pass over a tensor
as large as the result (what it takes of a step: benchmarks/lean_step.py). A matrix product can add to what is
there already (BLAS gemm with beta = 1). And where autocast rounds x for lora_A anyway, PEFT still casts it to the
adapter's dtype first, and the rounded copy is kept for the backward pass, one per adapter; x itself serves as well.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")  # in peft.tuners.lora, the quantised ones where bitsandbytes is


def fuse_low_rank_sums(model: nn.Module) -> None:
    """Let the plain LoRA layers of `model` add B A x to their result within the product with B.

    Plain are layers over a linear one with a single adapter, no bias in B, and nothing that changes LoRA's sum, as DoRA
    does; all others stay as PEFT made them. Class, parameters and what is saved are the same.
    """
    kinds = tuple(getattr(lora, kind) for kind in _KINDS if hasattr(lora, kind))
    for layer in model.modules():
        if isinstance(layer, kinds) and _is_plain(layer):
            layer.forward = MethodType(_forward, layer)


def _is_plain(layer: Any) -> bool:
    one = len(layer.active_adapters) == 1 and list(layer.lora_A) == layer.active_adapters
    return (
        one and not layer.lora_variant and all(type(b) is nn.Linear and b.bias is None for b in layer.lora_B.values())
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the layer's own; `x` is (..., inputs)."""
    if layer.disable_adapters or layer.merged or args or kwargs:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    (name,) = layer.lora_A
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    result = layer.base_layer(x)
    rounds = torch.is_autocast_enabled(x.device.type)
    low = a(layer.lora_dropout[name](x if rounds else x.to(a.weight.dtype)))
    if low.dtype == result.dtype and (rounds or b.weight.dtype == low.dtype):
        total = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.weight.t(), alpha=scaling)
        return total.view(result.shape)
    return torch.add(result, b(low), alpha=scaling).to(result.dtype)
