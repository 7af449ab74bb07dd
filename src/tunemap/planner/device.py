"""What an account comes to on one device: memory beside the tensors, and the verdict. Imports no torch.

What CUDA, its libraries and NCCL take besides tensors has not been verified on GPUs of every kind listed: context and
buffers below are round numbers, workspaces are PyTorch's defaults, and each is a named part of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunemap.hardware import Hardware, Machine
from tunemap.planner.prediction import Account, Verdict

MIB = 1 << 20
# The caching allocator takes large requests from the device in steps of 2 MiB, and keeps what it cannot reuse.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management
SEGMENT_BYTES = 2 * MIB
FRAGMENTATION_SHARE = 0.03
HANDLES = 2  # cuBLAS handles of a training process: the thread of forward passes, and autograd's
CONTEXT_BYTES = 512 * MIB  # where the hardware file does not know better
NCCL_BYTES = 256 * MIB  # channels and proxies of a communicator
PYTHON_BYTES = 600 * MIB  # a process that has imported torch, transformers and peft
CUDA_HOST_BYTES = 3 << 30  # the same with CUDA's libraries and pinned buffers
HEAP_SHARE = 0.25  # what malloc keeps of freed tensors on a CPU
MOST_GB = 1e6  # that may be asked for: no machine has a petabyte of memory
TIGHT_SHARE = 0.92  # the error that is allowed for: worst case of predictions against measurements


@dataclass(frozen=True)
class Target:
    """The device that a run is planned for. memory_bytes: of one GPU, or of the machine where there is none."""

    name: str
    on_gpu: bool
    memory_bytes: int | None
    hardware: Hardware | None

    @classmethod
    def gpu(cls, hardware: Hardware) -> Target:
        """A GPU with a description."""
        return cls(hardware.name, True, hardware.memory_bytes, hardware)

    @classmethod
    def cpu(cls, machine: Machine) -> Target:
        """This machine's processors."""
        return cls("cpu", False, machine.memory_bytes, None)


def device_bytes(account: Account, target: Target, *, devices: int) -> dict[str, int]:
    """The parts of what one process takes of its device, by name; their sum must fit."""
    tensors = max(account.peak_bytes, account.estimation_peak_bytes or 0)
    parts = {"tensors": tensors}
    if not target.on_gpu:
        return parts
    hardware = target.hardware
    parts["unpacked 4-bit weights"] = account.dequantised_bytes
    parts["cuBLAS workspaces"] = HANDLES * ((hardware.workspace_bytes if hardware else None) or 8 * MIB)
    allocated = sum(parts.values())
    reserved = -(-round(allocated * (1 + FRAGMENTATION_SHARE)) // SEGMENT_BYTES) * SEGMENT_BYTES
    parts["allocator"] = reserved - allocated
    parts["context"] = (hardware.context_bytes if hardware else None) or CONTEXT_BYTES
    if devices > 1:
        parts["NCCL"] = NCCL_BYTES
    return parts


def host_bytes(account: Account, target: Target) -> int:
    """Main memory of one process at its peak."""
    if target.on_gpu:
        return CUDA_HOST_BYTES + account.weights_bytes
    return PYTHON_BYTES + round(account.peak_bytes * (1 + HEAP_SHARE))


def needed_bytes(account: Account, target: Target, *, devices: int) -> int:
    """What one process takes of the memory that decides: its GPU's, or the machine's where there is none."""
    return (
        sum(device_bytes(account, target, devices=devices).values()) if target.on_gpu else host_bytes(account, target)
    )


def verdict(needed_bytes: int, target: Target, *, processes: int) -> tuple[Verdict, str]:
    """Whether that fits, and why not; `processes` share the memory where the device is a CPU."""
    if target.memory_bytes is None:
        return "unknown", f"the memory of {target.name} is not known"
    needed = needed_bytes if target.on_gpu else needed_bytes * processes
    share = needed / target.memory_bytes
    gib = 1 << 30
    said = f"{needed / gib:.1f} of {target.memory_bytes / gib:.1f} GiB"
    if share > 1:
        return "cannot", f"needs {said}"
    if share > TIGHT_SHARE:
        return "tight", f"needs {said}, {1 - share:.0%} to spare"
    return "fits", ""
