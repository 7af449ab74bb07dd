"""Communication of a training step, counted: every collective of one step by kind and group, with its bytes.

Counted are the calls that reach torch.distributed's operators, whoever makes them (DDP's reducer, FSDP, gradient
clipping). Two counts per call, which published comparisons mix up:

    payload_bytes   the tensor that is reduced, gathered or broadcast, at its full size. DDP's payload per step is
                    the bytes of the gradients, which for LoRA are those of the adapters.
    sent_bytes      what each rank must send for it at least, with a ring of N ranks: payload × 2(N - 1)/N for an
                    all-reduce and × (N - 1)/N for the others (Patarasuk and Yuan 2009,
                    https://doi.org/10.1016/j.jpdc.2008.09.002).

Copies inside a device are no communication, and neither are the calls of a group of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

# Operators of torch.distributed by part of their name; the functional ones serve sharded tensors.
_NAMESPACES = ("c10d", "_c10d_functional")
_KINDS = {
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "broadcast": "broadcast",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
}
_NO_DATA = ("barrier", "wait_tensor", "wrap_tensor")
_RING_FACTOR = {"all_reduce": 2}  # a reduce-scatter and an all-gather


@dataclass(frozen=True)
class Collective:
    """All calls of one collective over one group in a step of one rank."""

    kind: str  # all_reduce, all_gather, reduce_scatter, broadcast
    group: str  # world, or the mesh dimension: replicate, shard
    group_size: int
    calls: int
    payload_bytes: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that each rank sends at least; see the file's head."""
        return math.ceil(_RING_FACTOR.get(self.kind, 1) * self.payload_bytes * (self.group_size - 1) / self.group_size)


class CommunicationCounter(TorchDispatchMode):
    """Put it around one step that is not timed; `collectives` holds the counts."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._bytes: Counter[tuple[str, str, int]] = Counter()

    @property
    def collectives(self) -> list[Collective]:
        """What was counted, by kind and group."""
        return [
            Collective(kind, group, size, self._calls[kind, group, size], self._bytes[kind, group, size])
            for kind, group, size in sorted(self._calls)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # sharded tensors: their collectives on local tensors come here
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            self._count(func._schema.name.partition("::")[2], args, result)
        return result

    def _count(self, operator: str, args: Any, result: Any) -> None:
        if any(part in operator for part in _NO_DATA):
            return
        kind = next((kind for part, kind in _KINDS.items() if part in operator), operator)
        group = _group(args)
        if group.size() == 1:
            return  # DDP calls its collective all the same, FSDP does not: nothing is sent
        key = (kind, _name(group), group.size())
        self._calls[key] += 1
        # The full size is what a gather gives and a reduce-scatter takes: the larger of the two sides.
        self._bytes[key] += max(_bytes(value) for value in (*args, result))


def communication_columns(collectives: Iterable[Collective]) -> dict[str, int]:
    """The measurements of one rank and step: payload in all, by collective and by group; calls; and bytes sent."""
    found = list(collectives)
    columns = {
        "communication_bytes_per_step": sum(one.payload_bytes for one in found),
        "communication_sent_bytes_per_step": sum(one.sent_bytes for one in found),
        "communication_calls_per_step": sum(one.calls for one in found),
    }
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        columns[f"{kind}_bytes_per_step"] = sum(one.payload_bytes for one in found if one.kind == kind)
    return columns


def communication_rows(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """One JSON row per collective and group."""
    return [asdict(one) | {"sent_bytes": one.sent_bytes} for one in collectives]


def _group(args: Any) -> dist.ProcessGroup:
    """The group of a call: an object for the operators of c10d, its name for the functional ones."""
    held = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)]
    group: dist.ProcessGroup = held[0] if held else dist.distributed_c10d._resolve_process_group(args[-1])
    return group


def _is_group(held: torch.ScriptObject) -> bool:
    return str(held._type()).endswith("ProcessGroup")


def _name(group: dist.ProcessGroup) -> str:
    """The mesh dimension that the group was made for, else `world`."""
    kind, _, dimension = group.group_desc.partition("_")
    return dimension if kind == "mesh" else "world"


def _bytes(value: Any) -> int:
    """Bytes of all tensors in an argument or result."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0
