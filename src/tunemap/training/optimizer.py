"""The optimizers of a study, and how they run where parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunemap.errors import UserError
from tunemap.methods.peft_types import loraplus_optimizer

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def build_optimizer(
    parameters: Iterable[nn.Parameter], *, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW by name over the trained parameters.

    `adamw` is torch's fused kernel: one pass over the states and no temporary the size of the gradients, which the
    foreach default needs. The others are bitsandbytes'; they do not know sharded tensors and run on local shards.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options: dict[str, Any] = {"lr": learning_rate, "betas": BETAS, "eps": EPSILON, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(trained, fused=True, **options)
    import bitsandbytes.optim as bnb

    classes = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW, "paged_adamw_8bit": bnb.PagedAdamW8bit}
    if any(isinstance(parameter, DTensor) for parameter in trained):
        return LocalShardOptimizer(trained, lambda shards: classes[name](shards, **options))
    optimizer: torch.optim.Optimizer = classes[name](trained, **options)
    return optimizer


class LocalShardOptimizer(torch.optim.Optimizer):
    """Runs an element-wise optimizer on this rank's shards of sharded parameters.

    `param_groups` holds the sharded parameters, so that a gradient scaler unscales their gradients and agrees with
    the other ranks on whether one of them overflowed; `state` is that of the shards.

    Right for AdamW and its kind, in which each element is updated from its own gradient and state alone; the
    8-bit variants quantise per block of the shard, so their states differ from the unsharded ones by blocking.
    """

    def __init__(
        self, parameters: list[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self._shards = [nn.Parameter(_local(parameter.detach())) for parameter in parameters]
        # A rank may hold no element of a small parameter, and kernels refuse empty tensors.
        self._inner = make([shard for shard in self._shards if shard.numel()])
        super().__init__(parameters, self._inner.defaults)
        self.state = self._inner.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every local shard from its local gradient, with the learning rate of `param_groups`."""
        (group,), (inner,) = self.param_groups, self._inner.param_groups
        inner["lr"] = group["lr"]
        for shard, parameter in zip(self._shards, group["params"], strict=True):
            shard.grad = None if parameter.grad is None else _local(parameter.grad)
        self._inner.step()
        for shard in self._shards:
            shard.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State of this rank's shards."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of this rank's shards."""
        self._inner.load_state_dict(state_dict)
        self.state = self._inner.state


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
