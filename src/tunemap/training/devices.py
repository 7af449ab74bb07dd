"""Which GPUs a run gets on a machine that several runs share: a lease per device, held while the run lasts.

A lease is of the device itself, by the driver's name for it: GPU 0 of one process may be GPU 2 of another.

Imports no torch: the launcher uses this before anything heavy starts.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tunemap.measure.nvml import ask, nvml, text, visible_handles
from tunemap.training.failure import UnsupportedRunError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Devices:
    """What a run may use: `cpu`, or `cuda` with the variables that make its GPUs visible to its processes."""

    kind: str
    environment: dict[str, str] = field(default_factory=dict)


def visible_gpu_count() -> int:
    """GPUs that the NVIDIA driver shows to this process; 0 without a driver."""
    with nvml() as library:
        return len(visible_handles(library)) if library else 0


def device_kind(wanted: str) -> str:
    """`auto` to what this machine has; `cuda` without a GPU is refused."""
    if wanted == "auto":
        return "cuda" if visible_gpu_count() else "cpu"
    if wanted == "cuda" and not visible_gpu_count():
        raise UnsupportedRunError("hardware.device is cuda, and this machine shows no GPU to the NVIDIA driver")
    return wanted


@contextmanager
def lease_devices(wanted: str, count: int) -> Iterator[Devices]:
    """Hold `count` devices for the body, which begins when enough of them are free; on a CPU there is nothing to hold.

    They are chosen from CUDA_VISIBLE_DEVICES where that is set. A GPU that Slurm gave to a job is free at once; those
    that somebody named for a whole workflow are shared by its jobs.

    Raises UnsupportedRunError if there are fewer devices than the run asks for.
    """
    kind = device_kind(wanted)
    if kind == "cpu":
        yield Devices("cpu", {"CUDA_VISIBLE_DEVICES": ""})
        return
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",") if name.strip()] if given is not None else _indices()
    if count > len(names):
        raise UnsupportedRunError(f"the run asks for {count} GPUs, {len(names)} are visible on this machine")
    order = {} if given is not None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with ExitStack() as held:
        leased = _lease(names, count, held)
        yield Devices("cuda", {"CUDA_VISIBLE_DEVICES": ",".join(leased)} | order)


def _indices() -> list[str]:
    return [str(index) for index in range(visible_gpu_count())]


def _lease(names: list[str], count: int, held: ExitStack) -> list[str]:
    """Lock `count` of the devices. It holds none while it waits, so that two runs cannot block each other."""
    identities, told = _identities(names), False
    while True:
        with ExitStack() as attempt:
            leased = []
            for name, identity in zip(names, identities, strict=True):
                file = attempt.enter_context(_lock_file(identity))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                leased.append(name)
                if len(leased) == count:
                    held.push(attempt.pop_all())
                    return leased
        if not told:
            print(f"waiting for {count} of {len(names)} GPUs: other runs hold {len(names) - len(leased)}", flush=True)
            told = True
        time.sleep(POLL_SECONDS)


def _identities(names: list[str]) -> list[str]:
    """UUIDs of the visible devices; for one that the driver does not tell, its name."""
    with nvml() as library:
        handles = visible_handles(library) if library else []
        uuids = [text(ask(library, "nvmlDeviceGetUUID", handle)) for handle in handles]
    known = dict(zip(names, uuids, strict=False))
    return [known.get(name) or f"gpu{name}" for name in names]


def _lock_file(identity: str) -> IO[str]:
    """The lock file of a device. All users of the machine share it: a lock needs no more than the right to read."""
    folder = Path(tempfile.gettempdir()) / "tunemap-device-leases"
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o777)  # whatever the umask
    return os.fdopen(os.open(folder / f"{identity}.lock", os.O_RDONLY | os.O_CREAT, 0o644))
