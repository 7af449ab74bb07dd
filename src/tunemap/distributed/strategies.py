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
from tunemap.models import loading


def wrap(
    model: nn.Module,
    strategy: str,
    world: World,
    *,
    compute: torch.dtype | None = None,
    reshard_after_forward: bool,
    unit: str = "block",
) -> nn.Module:
    """Spread `model` over the world; the same code runs at world size 1, so that it can be the baseline.

    `compute` is the dtype of matrix products under autocast: gathered weights then travel in it, half the bytes.
    `reshard_after_forward`: whether FSDP frees a block's gathered weights after its forward pass and gathers them
    again for the backward pass (less memory), or keeps them (less communication). What lies outside of the blocks
    stays gathered from forward to backward either way. `unit`: "block", or "model" for a single unit that is gathered
    whole, as in a published study; FSDP2 has no flat parameter, so frozen weights get no gradients there as they did.

    Raises RuntimeError if the result is not what was asked for (accelerate and the HF Trainer fall back to DDP in
    silence when asked for FSDP on a CPU).
    """
    if strategy == "single":
        return model
    if strategy == "ddp":
        # Buckets that alias the gradients save one gradient-sized buffer and one copy per step; buffers hold
        # constants here (rotary frequencies), broadcasting them each step would only be traffic.
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    mesh = _mesh(strategy, world)
    policy = (
        MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32) if compute else MixedPrecisionPolicy()
    )
    blocks = transformer_blocks(model) if unit == "block" else []
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # the root: torch keeps its weights from forward to backward
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    if units != len(blocks) + 1:
        raise RuntimeError(f"{units} FSDP units for {len(blocks)} transformer blocks: {len(blocks) + 1} were asked for")
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("FSDP left parameters unsharded")
    return model


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, wrapped by peft or not, in order: one unit of sharding each."""
    return list(loading.transformer_blocks(model))


def _mesh(strategy: str, world: World) -> DeviceMesh:
    if strategy == "hybrid":
        replicas = min(2, world.size)  # each sharded over its part of the devices; a single one is the baseline
        shape = (replicas, world.size // replicas)
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
