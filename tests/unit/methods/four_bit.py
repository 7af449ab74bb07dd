"""Models whose linear layers hold 4-bit weights, for the tests of this folder."""

import copy

import pytest
from torch import nn

from tunemap.methods.parameters import linear_shapes


def quantised(model: nn.Module, dequantised: bool = False) -> nn.Module:
    """A copy with nf4 linear layers, or with ordinary layers that hold the same rounded weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(model)
    for name in linear_shapes(model):
        linear = model.get_submodule(name)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4"
        )
        packed.load_state_dict(linear.state_dict())
        packed.support_avx512bf16_for_cpu = False  # its in-place repacking for inference loses gradients
        packed.to("cpu")
        packed.weight.requires_grad_(False)
        if dequantised:
            rounded = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            linear.weight.data = rounded.to(linear.weight.dtype)
        else:
            model.set_submodule(name, packed)
    return model
