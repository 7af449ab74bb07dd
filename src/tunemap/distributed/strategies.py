"""The strategies: one process, data parallel (DDP), fully sharded (FSDP2 per transformer block), hybrid sharding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tunemap.distributed.world import World
from tunemap.models.loading import block_class_names


def wrap(model: nn.Module, strategy: str, world: World, *, compute: torch.dtype | None = None) -> nn.Module:
    """Spread `model` over the world; the same code runs at world size 1, so that it can be the baseline.

    `compute` is the dtype of matrix products under autocast: gathered weights then travel in it, half the bytes.
    Raises RuntimeError if the result is not what was asked for (accelerate and the HF Trainer fall back to DDP in
    silence when asked for FSDP on a CPU).
    """
    if strategy == "single":
        return model
    if strategy == "ddp":
        # Buckets that alias the gradients save one gradient-sized buffer and one copy per step; buffers hold
        # constants here (rotary frequencies), broadcasting them each step would only be traffic.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = _mesh(strategy, world)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if compute else MixedPrecisionPolicy()
    blocks = transformer_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    if units != len(blocks) + 1:
        raise RuntimeError(f"{units} FSDP units for {len(blocks)} transformer blocks: {len(blocks) + 1} were asked for")
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("FSDP left parameters unsharded")
    return model


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, wrapped by peft or not, in order."""
    names = block_class_names(model)
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise RuntimeError(f"no transformer block ({', '.join(names)}) in {type(model).__name__}")
    return blocks


def _mesh(strategy: str, world: World) -> DeviceMesh:
    if strategy == "hybrid":
        shape = (2, world.size // 2)  # two replicas, each sharded over half of the devices
        return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the backward pass only when `enabled`: once per step, not per micro-batch."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    else:
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP; FSDP2 changes the model in place."""
    return model.module if isinstance(model, DistributedDataParallel) else model
