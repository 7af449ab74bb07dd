"""This process's place among the processes of a run, as torchrun tells it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tunemap.errors import UserError

# The last resort against a rank that never comes; while training, the launcher notices much earlier.
COLLECTIVE_LIMIT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Rank and size of the run's group of processes, and the device of this one."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks, in double precision."""
        if not dist.is_initialized():
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total.item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank, on every rank."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if dist.is_initialized():
            dist.barrier()


def join_world(device: str, *, strategy: str, expected_size: int) -> World:
    """Find this process's rank and device and join the group, unless the run is a single process without one.

    `device` is `cpu` or `cuda`; nccl carries CUDA tensors and gloo CPU ones.

    Raises UserError where the run asks for another number of processes: batches, shards and the random generators
    in a checkpoint belong to `expected_size` ranks, and the result would stand under a wrong label.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size != expected_size:
        raise UserError(f"the run asks for {expected_size} processes (factor gpus), {size} were started")
    own = torch.device(device)
    if device == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    if strategy != "single":
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
    return World(rank, size, own)


def leave_world() -> None:
    """Leave the group, if there is one that needs it; the process is about to end.

    nccl wants its communicators taken down in order. A gloo group is left to the end of the process: tearing it down
    talks to the store of rank 0, which may be gone by then.
    """
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()
