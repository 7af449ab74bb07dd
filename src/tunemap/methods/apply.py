"""Turns a loaded model into the one that a method trains: which parameters learn, in which dtype, with which adapters."""

from __future__ import annotations

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from tunemap.config import FullMethod, LoraMethod
from tunemap.errors import UserError
from tunemap.run import RunMethod, TaskKind


def apply_method(
    model: nn.Module,
    method: RunMethod,
    *,
    task_kind: TaskKind,
    trained_dtype: torch.dtype,
    adapter_dtype: torch.dtype | None,
    seed: int,
) -> nn.Module:
    """Prepare `model` for training with `method`; returns the model to train (peft's wrapper for adapters).

    Adapters are drawn from `seed` alone, so every rank and every strategy starts from the same ones. Newly made
    heads of classifiers are trained by every method, in `trained_dtype`.
    """
    torch.manual_seed(seed)
    if isinstance(method, FullMethod):
        model.requires_grad_(True)
        return model
    if not isinstance(method, LoraMethod):
        raise UserError(f"method kind {method.kind} does not train")
    assert adapter_dtype is not None
    adapted = get_peft_model(model, lora_config(model, method, task_kind), autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype if "lora_" in name else trained_dtype)
    return adapted


def lora_config(model: nn.Module, method: LoraMethod, task_kind: TaskKind) -> LoraConfig:
    """peft's configuration of a LoRA method; a classifier's head is trained as a whole and gets no adapter."""
    classification = task_kind == "classification"
    heads = head_modules(model) if classification else []
    targets = method.target_modules
    return LoraConfig(
        r=method.rank,
        lora_alpha=2 * method.rank if method.alpha is None else method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=heads or None,
        modules_to_save=heads or None,
        use_rslora=method.rslora,
        bias="none",
        task_type=TaskType.SEQ_CLS if classification else TaskType.CAUSAL_LM,
    )


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules outside the pretrained backbone: new, untrained, specific to the task."""
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, module in model.named_children()
        if name != backbone and any(True for _ in module.parameters())
    ]
