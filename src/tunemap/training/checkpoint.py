"""Checkpoints: all that training needs to go on as if nothing had happened, written so that a kill cannot spoil them.

    checkpoint/manifest.json     step, identity, world size, strategy, machines, checksum of each file
    checkpoint/rank0.pt ...      per rank: trained tensors (its shards), optimizer, scaler, random generators, memory

A new checkpoint is complete in a folder of its own before it takes the place of the old one by renaming.
Frozen weights are not in it: they are loaded from the model's folder again.

What torch.distributed.checkpoint adds is reading by another number of ranks than wrote. No run needs that: strategy and
number of devices are part of what a run is, another number is another run with steps of its own, and its workers refuse
to start as fewer or more (`world.join_world`). What a run needs is not in it: states of bitsandbytes' optimizers, which
are quantised per local shard and cannot be cut anew, each rank's random generators, and checksums.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunemap.distributed.strategies import unwrap
from tunemap.distributed.world import World
from tunemap.errors import UserError
from tunemap.files import read_sealed, sha256_of, write_sealed
from tunemap.measure.environment import device_fingerprint
from tunemap.measure.memory import peaks_until_now
from tunemap.methods.peft_types import load_method_state, method_state
from tunemap.training.finished import CHECKPOINT, OLD_CHECKPOINT
from tunemap.training.loop import TrainingState
from tunemap.training.optimizer import is_paged, load_state

NEXT_CHECKPOINT = f"{CHECKPOINT}.next"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    """What lies in a run's work folder: a usable checkpoint's manifest, or why there is none."""

    manifest: dict[str, Any] | None
    message: str


def save(
    folder: Path, state: TrainingState, world: World, *, identity: str, strategy: str, parts_s: dict[str, float]
) -> None:
    """Write a checkpoint of all ranks into `folder`; every rank must call this.

    parts_s: seconds of each part of the run until now, of earlier processes too.
    """
    target = folder / NEXT_CHECKPOINT
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    world.barrier()
    path = target / f"rank{world.rank}.pt"
    with path.open("wb") as file:
        torch.save(_contents(state, world), file)
        file.flush()
        os.fsync(file.fileno())
    checksums = dict(world.gather((path.name, sha256_of(path))))
    machines = world.gather(device_fingerprint(world.device))
    if world.is_main:
        manifest = {
            "identity": identity,
            "strategy": strategy,
            "world_size": world.size,
            "machines": machines,
            "step": state.step,
            "elapsed_s": state.elapsed_s,
            "parts_s": parts_s,
            "sha256": checksums,
        }
        write_sealed(target / MANIFEST, manifest)
        _replace(folder)
    world.barrier()


def find(folder: Path, world: World, *, identity: str) -> Found:
    """Look for a checkpoint that belongs to this very run, and check that it is whole; every rank must call this.

    identity: `finished.checkpoint_identity`. Strategy and number of devices are part of it: a checkpoint of another
    layout is another run's.
    """
    return world.gather(_look(folder, identity) if world.is_main else Found(None, ""))[0]


def is_of_this_machine(manifest: dict[str, Any], world: World) -> bool:
    """Whether this rank's device is like the one that wrote the checkpoint."""
    return bool(manifest["machines"][world.rank] == device_fingerprint(world.device))


def _look(folder: Path, identity: str) -> Found:
    """What one rank finds, which moves folders: the others must not look at the same time."""
    current = folder / CHECKPOINT
    if not (current / MANIFEST).exists() and (folder / OLD_CHECKPOINT / MANIFEST).exists():
        current = folder / OLD_CHECKPOINT  # killed between the two renames of `_replace`
    if not (current / MANIFEST).exists():
        return Found(None, "no checkpoint: starting from the first step")
    try:
        manifest = read_sealed(current / MANIFEST)
    except UserError:
        return _set_aside(current, MANIFEST)
    if manifest.get("identity") != identity:
        written_by = f"{manifest['strategy']} on {manifest['world_size']} devices"
        other = f"another configuration, model, data or version of the trainer ({written_by})"
        return Found(None, f"{current} was written by {other}: starting from the first step")
    broken = [name for name, expected in manifest["sha256"].items() if not _whole(current / name, expected)]
    if broken:
        return _set_aside(current, ", ".join(broken))
    if current.name != CHECKPOINT:
        current.rename(folder / CHECKPOINT)
    return Found(manifest, f"resuming after step {manifest['step']}")


def _set_aside(checkpoint: Path, broken: str) -> Found:
    aside = checkpoint.with_name("checkpoint.corrupt")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    return Found(None, f"{broken} of the checkpoint is damaged: set aside in {aside}, starting anew")


def restore(folder: Path, state: TrainingState, world: World, manifest: dict[str, Any]) -> None:
    """Bring `state` and the random generators of this rank to where the checkpoint was written."""
    place = "cpu" if is_paged(state.optimizer) else world.device  # a device may not hold paged states
    contents = torch.load(folder / CHECKPOINT / f"rank{world.rank}.pt", map_location=place, weights_only=True)
    trained = _trained(state.model)
    with torch.no_grad():
        for name, tensor in contents["trained"].items():
            _local(trained[name]).copy_(tensor)
    load_state(state.optimizer, contents["optimizer"])
    load_method_state(unwrap(state.model), contents["method"])
    if state.scaler is not None:
        state.scaler.load_state_dict(contents["scaler"])
    torch.set_rng_state(contents["random"]["torch"].cpu())
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(contents["random"]["cuda"].cpu(), world.device)
    state.step, state.elapsed_s, state.memory = manifest["step"], manifest["elapsed_s"], contents["memory"]


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator; ranks differ, or dropout would drop the same units everywhere."""
    random.seed(seed)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def _contents(state: TrainingState, world: World) -> dict[str, Any]:
    generators = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return {
        "trained": {name: _local(tensor).detach() for name, tensor in _trained(state.model).items()},
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "method": method_state(unwrap(state.model)),
        "random": generators,
        "memory": peaks_until_now(world.device, state.memory),
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(path: Path, expected: str) -> bool:
    return path.exists() and sha256_of(path) == expected


def _replace(folder: Path) -> None:
    """Put the new checkpoint in the old one's place; at each moment one of them is complete under a known name."""
    shutil.rmtree(folder / OLD_CHECKPOINT, ignore_errors=True)
    if (folder / CHECKPOINT).exists():
        (folder / CHECKPOINT).rename(folder / OLD_CHECKPOINT)
    (folder / NEXT_CHECKPOINT).rename(folder / CHECKPOINT)
    shutil.rmtree(folder / OLD_CHECKPOINT, ignore_errors=True)
