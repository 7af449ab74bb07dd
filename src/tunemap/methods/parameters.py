"""Logical parameter counts of any model, and the closed form that a LoRA run's trainable count must equal.

Logical means: a 4-bit weight counts its own elements, not its packed bytes; a tied weight counts once; the frozen
backup of a module that PEFT copied for training does not count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# PEFT keeps the untouched original of a fully trained module beside the trained copy, under this name.
_FROZEN_BACKUP = "original_module"

Shape = tuple[int, int]
"""(out_features, in_features) of a linear layer."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one model (elements, not bytes); `trainable - adapter - head` is trained backbone.

    trainable: parameters that receive an update.
    total:     parameters that the model computes with: backbone, head and adapter.
    adapter:   trainable parameters that a PEFT method added.
    head:      trainable parameters outside the backbone, such as a classifier; an output layer tied to the
               embeddings belongs to the backbone.
    """

    trainable: int
    total: int
    adapter: int
    head: int


def logical_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape that the arithmetic sees: for a bitsandbytes 4-bit weight the one before packing."""
    quant_state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if quant_state is None else quant_state.shape)


def logical_size(parameter: torch.Tensor) -> int:
    """Number of weights in `parameter`, whatever its storage packs into one element."""
    return torch.Size(logical_shape(parameter)).numel()


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether the stored elements are not the weights themselves, so that no gradient can reach them."""
    return not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count `model`, wrapped by PEFT or not, on any device (meta included); sharded weights count at full size."""
    backbone = {_storage_key(parameter) for parameter in _backbone(model).parameters()}
    of_adapter = adapter_ids(model)
    trainable = total = adapter = head = 0
    for parameter in _distinct_parameters(model):
        size = logical_size(parameter)
        total += size
        if not parameter.requires_grad:
            continue
        trainable += size
        if id(parameter) in of_adapter:
            adapter += size
        elif _storage_key(parameter) not in backbone:
            head += size
    return ParameterCounts(trainable=trainable, total=total, adapter=adapter, head=head)


def lora_closed_form(shapes: Mapping[str, tuple[int, int]], ranks: int | Mapping[str, int]) -> int:
    """Trainable parameters of LoRA: the sum over modules of rank x (in + out).

    `shapes` gives (out_features, in_features) per adapted module, `ranks` one rank for all or a rank for each
    (A is rank x in, B is out x rank; Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1).
    """
    rank_of = dict.fromkeys(shapes, ranks) if isinstance(ranks, int) else ranks
    return sum(rank_of[name] * (rows + columns) for name, (rows, columns) in shapes.items())


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer of a bare model's backbone, by full module name.

    The output layer and classification heads are left out, as in "all linear layers" of the LoRA literature.
    """
    backbone = _backbone(model)
    inside = {id(module) for module in backbone.modules()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: _outputs_and_inputs(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and module is not output
    }


def _outputs_and_inputs(layer: nn.Linear | Conv1D) -> Shape:
    """A layer of GPT-2 (Conv1D) is linear too, and keeps its weight transposed."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def head_names(model: nn.Module) -> list[str]:
    """Names of the direct children of a transformers model that hold parameters and are not its backbone."""
    backbone = _backbone(model)
    if backbone is model:
        return []
    return [
        name
        for name, child in model.named_children()
        if child is not backbone and next(child.parameters(), None) is not None
    ]


def heads_to_save(model: nn.Module) -> list[str]:
    """The heads that PEFT must be told to train in full: by itself it takes names that end in classifier or score."""
    return [name for name in head_names(model) if not name.endswith(("classifier", "score"))]


def adapter_ids(model: nn.Module) -> set[int]:
    """Identities of the parameters that PEFT added: by the tuner's prefix, or below the prompt encoder."""
    if not hasattr(model, "peft_config"):
        return set()
    # Adaption prompts are the one tuner that does not state its prefix.
    prefix = getattr(model.base_model, "prefix", None) or "adaption_"
    return {
        id(parameter)
        for name, parameter in model.named_parameters()
        if name.startswith("prompt_encoder.") or f".{prefix}" in name
    }


def _backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head: what `base_model_prefix` names, or the whole model where nothing is named."""
    unwrapped = getattr(model, "get_base_model", lambda: model)()
    prefix = getattr(unwrapped, "base_model_prefix", "")
    inner = getattr(unwrapped, prefix, None) if prefix else None
    return inner if isinstance(inner, nn.Module) else unwrapped


def _distinct_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters in registration order, each storage region once, without PEFT's frozen backups."""
    seen: set[tuple[int, ...]] = set()
    for name, parameter in model.named_parameters():
        key = _storage_key(parameter)
        if key not in seen and _FROZEN_BACKUP not in name.split("."):
            seen.add(key)
            yield parameter


def _storage_key(parameter: torch.Tensor) -> tuple[int, ...]:
    """Identity of the memory behind a parameter: storage, offset and size; valid on meta, where addresses are 0."""
    local: torch.Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return (local.untyped_storage()._cdata, int(local.storage_offset()), local.numel())
