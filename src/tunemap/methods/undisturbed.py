"""Passes through a model before training that leave no trace in it, nor in the random numbers that training draws."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model computes from its own `labels`: the mean over the batch's label tokens."""
    return model(**batch).loss


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put requires_grad, gradients and train/eval flags back as they were: embeddings and norms must stay frozen."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modules = [(module, module.training) for module in model.modules()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modules:
            module.training = training


@contextmanager
def own_random_stream(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded randomness inside, the caller's stream untouched: training draws the same numbers as without GoRA."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
