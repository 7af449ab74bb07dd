"""GPU and CPU descriptions from resources/hardware/*.yaml, and what this machine has. Imports no torch."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, PositiveFloat, PositiveInt, ValidationError

from tunemap.errors import UserError
from tunemap.measure.nvml import ask, nvml, text, visible_handles

RESOURCES = Path(__file__).resolve().parents[2] / "resources" / "hardware"

PeakDtype = Literal["float32", "tfloat32", "bfloat16", "float16"]


class Price(BaseModel):
    """What one device costs per hour, from whom and when: the number that goes stale first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_hour: PositiveFloat = Field(description="Price of one device for one hour, in `currency`.")
    currency: Literal["USD", "EUR"] = "USD"
    offer: str = Field(description="Provider and product.")
    read_on: date | None = Field(description="Day on which the price was read; null where the table has no date.")
    source: HttpUrl


class Hardware(BaseModel):
    """One kind of device. What is not known is null, never a guess.

    Peaks are dense (no structured sparsity) and, for 16-bit types, with accumulation in float32, which training
    uses: half the number that GeForce data sheets print.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name of the file, without its ending.")
    kind: Literal["gpu", "cpu"]
    device_names: tuple[str, ...] = Field((), description="What the driver calls it (NVML).")
    memory_bytes: PositiveInt | None = Field(description="Total device memory as the driver reports it.")
    bandwidth_bytes_per_s: PositiveFloat | None = Field(description="Peak memory bandwidth.")
    peak_flops_per_s: dict[PeakDtype, PositiveFloat | None] = Field(description="Peak of matrix products by dtype.")
    link: str | None = Field(description="How devices of one machine are connected.")
    link_bytes_per_s: PositiveFloat | None = Field(description="Peak of that connection, per device and direction.")
    power_limit_w: PositiveFloat | None = Field(description="Default power limit of the board.")
    workspace_bytes: PositiveInt | None = Field(
        None, description="cuBLAS workspace that PyTorch allocates per handle and stream by default."
    )
    context_bytes: PositiveInt | None = Field(
        None, description="Memory that the driver counts for a process before its first tensor; null until measured."
    )
    price: Price | None = Field(description="Null where no offer was found.")
    sources: tuple[HttpUrl, ...] = Field(description="Where the numbers are from.")
    note: str | None = None

    def peak(self, dtype: str) -> float | None:
        """Peak FLOP/s of matrix products in `dtype`; None where it is unknown or the device has no such products."""
        return self.peak_flops_per_s.get(dtype)  # type: ignore[call-overload]


def known_hardware(folder: Path = RESOURCES) -> list[str]:
    """Names that `load_hardware` accepts, sorted. Raises UserError if the folder is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; hardware descriptions lie in resources/hardware of the repository")
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_hardware(name: str, folder: Path = RESOURCES) -> Hardware:
    """The description in `folder/name.yaml`; upper and lower case, spaces and underscores do not matter.

    Raises UserError with the nearest known name for an unknown one, and with file and key for a broken file.
    """
    known = known_hardware(folder)
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(f"hardware {name!r} is not described in {folder}{hint} Known: {', '.join(known)}")
    return _read(folder / f"{key}.yaml")


def _read(path: Path) -> Hardware:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    try:
        hardware = Hardware.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {key}: {first['msg']}") from None
    if hardware.name != path.stem:
        raise UserError(f"{path}: name: {hardware.name!r} is not the name of the file, {path.stem!r}")
    return hardware


def hardware_of_device(device_name: str, folder: Path = RESOURCES) -> Hardware | None:
    """The description whose `device_names` has the driver's name of a GPU; None if there is none."""
    descriptions = (load_hardware(name, folder) for name in known_hardware(folder))
    return next((hardware for hardware in descriptions if device_name in hardware.device_names), None)


@dataclass(frozen=True)
class Machine:
    """What this machine offers to this process.

    gpus: the driver's names of the visible GPUs, in CUDA's order; empty without one.
    cores: CPUs that this process may use.
    memory_bytes: main memory.
    """

    gpus: tuple[str, ...]
    cores: int
    memory_bytes: int


def this_machine() -> Machine:
    """Ask the driver (not torch) and the operating system."""
    import psutil

    with nvml() as library:
        handles = visible_handles(library) if library else []
        names = tuple(text(ask(library, "nvmlDeviceGetName", handle)) or "unknown GPU" for handle in handles)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(gpus=names, cores=cores, memory_bytes=psutil.virtual_memory().total)
