"""The NVIDIA driver's own counters through nvidia-ml-py; on a machine without the driver every answer is empty."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def nvml() -> Iterator[Any | None]:
    """The initialised `pynvml` module, or None where there is no NVIDIA driver (or no nvidia-ml-py)."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        yield None
        return
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(library: Any, function: str, *arguments: Any) -> Any | None:
    """Call `library.function(*arguments)`; None where this GPU or driver does not support the question."""
    try:
        return getattr(library, function)(*arguments)
    except (library.NVMLError, AttributeError):
        return None


def text(value: str | bytes | None) -> str | None:
    """NVML strings as str (older nvidia-ml-py returns bytes)."""
    return value.decode() if isinstance(value, bytes) else value


def visible_handles(library: Any) -> list[Any]:
    """NVML handles of the GPUs that CUDA_VISIBLE_DEVICES leaves to this process, in CUDA's order.

    NVML itself ignores that variable, so that its index 0 may be somebody else's GPU. Indices in the variable
    are taken as NVML's, which needs CUDA_DEVICE_ORDER=PCI_BUS_ID on machines with unlike GPUs. As in CUDA, the
    list ends at the first entry that is not a device.
    """
    count = ask(library, "nvmlDeviceGetCount") or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    handles = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < count:
            handles.append(library.nvmlDeviceGetHandleByIndex(int(entry)))
        elif entry.startswith(("GPU-", "MIG-")) and (handle := ask(library, "nvmlDeviceGetHandleByUUID", entry)):
            handles.append(handle)
        else:
            break
    return handles


def cuda_index(device: Any) -> int | None:
    """The index in `cuda:index`, 0 for plain `cuda`, None for a device that is no CUDA device."""
    kind, _, index = str(device).partition(":")
    return int(index or 0) if kind == "cuda" else None


def handle_of(library: Any, device: Any) -> Any | None:
    """NVML's handle of a torch CUDA device such as `cuda:1`; None for another device or an index beyond the last.

    By the device's own UUID where torch already runs on CUDA, else by its place in CUDA_VISIBLE_DEVICES.
    """
    index = cuda_index(device)
    if index is None:
        return None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        uuid = torch.cuda.get_device_properties(index).uuid
        return ask(library, "nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
    handles = visible_handles(library)
    return handles[index] if index < len(handles) else None


def process_bytes_by_pid(device: Any) -> dict[int, int]:
    """Device memory in bytes of every process that computes on `device`, by process id as the driver sees it.

    Empty without a driver. Processes whose memory the driver does not tell (MIG, some virtual machines) are
    left out. Inside a container the ids are the host's, so that a process may not find itself.
    """
    with nvml() as library:
        handle = handle_of(library, device) if library else None
        if handle is None:
            return {}
        processes = ask(library, "nvmlDeviceGetComputeRunningProcesses", handle) or []
        return {process.pid: process.usedGpuMemory for process in processes if process.usedGpuMemory is not None}


def driver_process_bytes(device: Any, pid: int | None = None) -> int | None:
    """Device memory in bytes that the driver counts for process `pid` (default: this one); None where unknown."""
    return process_bytes_by_pid(device).get(os.getpid() if pid is None else pid)
