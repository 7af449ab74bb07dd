"""Checksums of a model's weights: what a training changed, what it left alone, and whether ranks agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunemap.distributed.strategies import unwrap

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_checksums(model: nn.Module) -> dict[str, int]:
    """The sum of each parameter's bits, read as integers modulo 2^64; of this rank's shard where it is sharded.

    One pass and one synchronisation for all tensors: no copy of the weights is kept to compare them with.
    """
    tensors = {name: _bits(parameter) for name, parameter in unwrap(model).named_parameters()}
    if not tensors:
        return {}
    sums = torch.stack([bits.sum(dtype=torch.int64) for bits in tensors.values()]).tolist()
    return dict(zip(tensors, sums, strict=True))


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Names of the tensors whose checksums differ."""
    return [name for name, checksum in before.items() if after[name] != checksum]


def digest_of(checksums: dict[str, int], names: Iterable[str]) -> str:
    """One digest for the named tensors."""
    return hashlib.sha256(json.dumps([checksums[name] for name in sorted(names)]).encode()).hexdigest()[:16]


def replica_groups(strategy: str, by_rank: Sequence[str]) -> list[list[str]]:
    """The digests of the ranks that must hold the same tensors, group by group; none where every rank has its own."""
    if strategy == "ddp":
        return [list(by_rank)]
    if strategy == "hybrid":  # two replicas, each sharded over half of the ranks
        half = len(by_rank) // 2
        return [[by_rank[rank], by_rank[rank + half]] for rank in range(half)]
    return []


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    local = parameter.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    # A quantised weight is a tensor subclass; its packed bytes are the plain tensor.
    return local.as_subclass(torch.Tensor).reshape(-1).view(_BITS[local.element_size()])
