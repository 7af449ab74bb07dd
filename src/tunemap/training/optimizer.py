"""The optimizers of a study, how gradients are clipped for them, and how they run where parameters are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunemap.config import Factors
from tunemap.errors import UserError
from tunemap.methods.peft_types import loraplus_optimizer
from tunemap.training.frugal import BackwardOptimizer, galore_adamw

BETAS = (0.9, 0.999)
EPSILON = 1e-8
LEARNING_RATE_RATIO = "learning_rate_ratio"  # of a parameter group to the run's learning rate; 1 where absent


def optimizer_of(model: nn.Module, factors: Factors, *, learning_rate_ratio: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer that a run's factors ask for, over the trained parameters of `model` (the one inside DDP)."""
    options = {"learning_rate": factors.learning_rate, "weight_decay": factors.weight_decay}
    if factors.optimizer == "galore_adamw":
        shape = {"rank": factors.galore_rank, "update_steps": factors.galore_update_steps}
        return galore_adamw(model, **options, **shape, betas=BETAS, eps=EPSILON)  # type: ignore[arg-type]
    if factors.optimizer in ("lomo", "adalomo"):
        return BackwardOptimizer(model, name=factors.optimizer, **options)
    return build_optimizer(model, name=factors.optimizer, **options, learning_rate_ratio=learning_rate_ratio)


def build_optimizer(
    model: nn.Module, *, name: str, learning_rate: float, weight_decay: float, learning_rate_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """The optimizer called `name` that steps after the backward pass; with a ratio, in the groups of LoRA+.

    `adamw` is torch's fused kernel: one pass over the states and no temporary the size of the gradients, which the
    foreach default needs. `adafactor` keeps row and column means of the squared gradient in place of two moments
    (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235). The others are bitsandbytes'; they do not know sharded
    tensors and run on local shards.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, options = _kind(name)
    on_shards = name != "adamw" and any(isinstance(parameter, DTensor) for parameter in trained)
    if learning_rate_ratio != 1.0:
        if on_shards:
            raise UserError(f"optimizer {name}: cannot have the two learning rates of LoRA+ over shards; use adamw")
        grouped = loraplus_optimizer(
            model, kind, lr=learning_rate, ratio=learning_rate_ratio, weight_decay=weight_decay, **options
        )
        for group in grouped.param_groups:
            group[LEARNING_RATE_RATIO] = group["lr"] / learning_rate
        return grouped
    options |= {"lr": learning_rate, "weight_decay": weight_decay}
    if on_shards:
        return LocalShardOptimizer(trained, lambda shards: kind(shards, **options))
    return kind(trained, **options)


def _kind(name: str) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Class and options of an optimizer by its name in a study."""
    if name == "adafactor":
        return torch.optim.Adafactor, {}
    options: dict[str, Any] = {"betas": BETAS, "eps": EPSILON}
    if name == "adamw":
        return torch.optim.AdamW, options | {"fused": True}
    import bitsandbytes.optim as bnb

    classes = {"adamw_8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW, "paged_adamw_8bit": bnb.PagedAdamW8bit}
    return classes[name], options


def is_paged(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps its states in pages that the driver moves between GPU and host (bitsandbytes)."""
    inner = optimizer._inner if isinstance(optimizer, LocalShardOptimizer) else optimizer
    return bool(getattr(inner, "is_paged", False))


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore what `state_dict` gave; the states of a paged optimizer, given on the CPU, get pages again.

    bitsandbytes marks paged states by an attribute that a checkpoint keeps and their memory does not, so that the first
    step would ask the driver to prefetch ordinary memory, and end the process. Nor would they fit where pages were
    needed.
    """
    if not is_paged(optimizer):
        optimizer.load_state_dict(state)
        return
    optimizer.load_state_dict(state, move_to_device=False)  # type: ignore[call-arg]
    inner: Any = optimizer._inner if isinstance(optimizer, LocalShardOptimizer) else optimizer
    for parameter, states in inner.state.items():
        for name, value in states.items():
            if name in _MOMENTS:
                states[name] = inner.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor):
                states[name] = value.to(parameter.device)


_MOMENTS = ("state1", "state2")  # what bitsandbytes keeps in pages


def clip_gradients(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float | None
) -> torch.Tensor:
    """Clip the gradients, now or within the optimizer's next step; returns the norm of all as they are.

    torch's fused kernel divides gradients by the optimizer's `grad_scale` while it reads them, which a gradient scaler
    uses too. That saves the pass over all gradients that clipping takes otherwise, even where it multiplies by 1.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_grad_norm is None:
        return norm
    if optimizer.defaults.get("fused") and not any(isinstance(gradient, DTensor) for gradient in gradients):
        divisor = ((norm.float() + 1e-6) / max_grad_norm).clamp(min=1.0)  # as in clip_grads_with_norm_
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return norm


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

    def load_state_dict(self, state_dict: dict[str, Any], **options: Any) -> None:
        """Restore the state of this rank's shards; options are the inner optimizer's."""
        self._inner.load_state_dict(state_dict, **options)
        self.state = self._inner.state


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
