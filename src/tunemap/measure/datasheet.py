"""Columns that need a device's description: utilisation against the datasheet's peak, and cost from its price.

They are computed when results are collected, not when a run trains: a corrected datasheet or price makes new tables
and no new training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunemap.errors import UserError
from tunemap.hardware import Hardware, hardware_of_device, load_hardware
from tunemap.measure.energy import cost
from tunemap.measure.flops import utilisation

MATMUL_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "pure_bf16": "bfloat16"}


def hardware_of(environment: Mapping[str, Any], description: str | None) -> Hardware | None:
    """The description that the study names, else the one of the first GPU in a result's environment; None without.

    A CPU run of a study that describes a GPU has no description: nothing of it ran there.
    """
    gpus = environment.get("gpus") or []
    if not gpus or not str(environment.get("device", "cuda")).startswith("cuda"):
        return None
    try:
        return load_hardware(description) if description else hardware_of_device(str(gpus[0].get("name")))
    except UserError:
        if description:
            raise
        return None  # no folder of descriptions beside the package


def datasheet_columns(
    measurements: Mapping[str, Any], hardware: Hardware | None, *, precision: str, devices: int
) -> dict[str, Any]:
    """`mfu_datasheet`, `hfu_datasheet`, `cost`, `cost_per_10k_tokens`, `cost_currency`; each None where unknown.

    cost: price per device-hour × devices × wall time of the run. cost_per_10k_tokens: of the steady state, at the
    measured throughput.
    """
    peak = hardware.peak(MATMUL_DTYPES[precision]) if hardware else None
    against = utilisation(measurements, peak_flops_per_second=peak, devices=devices, against="datasheet")
    price = hardware.price if hardware else None
    per_hour = price.per_hour if price else None
    wall_s, seconds_per_10k = measurements.get("wall_time_s"), measurements.get("seconds_per_10k_tokens")
    return {
        "mfu_datasheet": against["mfu_datasheet"],
        "hfu_datasheet": against["hfu_datasheet"],
        "cost": cost(wall_s, per_hour, devices) if wall_s is not None else None,
        "cost_per_10k_tokens": cost(seconds_per_10k, per_hour, devices) if seconds_per_10k is not None else None,
        "cost_currency": price.currency if price else None,
    }
