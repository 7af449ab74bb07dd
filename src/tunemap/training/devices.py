"""Which GPUs a run gets on a machine that several runs share: a lease per device, held while the run lasts.

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

from tunemap.measure.nvml import nvml, visible_handles
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
    """Hold `count` devices for the body.

    On a CPU there is nothing to hold. Where CUDA_VISIBLE_DEVICES is set (Slurm does), those devices are this run's
    already. Elsewhere each device has a lock file, and the body starts when enough of them are free.

    Raises UnsupportedRunError if there are fewer devices than the run asks for.
    """
    kind = device_kind(wanted)
    if kind == "cpu":
        yield Devices("cpu", {"CUDA_VISIBLE_DEVICES": ""})
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    available = [name for name in visible.split(",") if name] if visible is not None else None
    total = len(available) if available is not None else visible_gpu_count()
    if count > total:
        raise UnsupportedRunError(f"the run asks for {count} GPUs, {total} are visible on this machine")
    if available is not None:
        yield Devices("cuda", {"CUDA_VISIBLE_DEVICES": ",".join(available[:count])})
        return
    with ExitStack() as held:
        names = _lease(total, count, held)
        yield Devices("cuda", {"CUDA_VISIBLE_DEVICES": ",".join(names), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})


def _lease(total: int, count: int, held: ExitStack) -> list[str]:
    """Lock `count` of `total` devices. It holds none while it waits, so that two runs cannot block each other."""
    while True:
        with ExitStack() as attempt:
            names = []
            for index in range(total):
                file = attempt.enter_context(_lock_file(index))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                names.append(str(index))
                if len(names) == count:
                    held.push(attempt.pop_all())
                    return names
        time.sleep(POLL_SECONDS)


def _lock_file(index: int) -> IO[str]:
    """The lock file of a device. All users of the machine share it: a lock needs no more than the right to read."""
    folder = Path(tempfile.gettempdir()) / "tunemap-device-leases"
    with suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o777)  # whatever the umask
    return os.fdopen(os.open(folder / f"gpu{index}.lock", os.O_RDONLY | os.O_CREAT, 0o644))
