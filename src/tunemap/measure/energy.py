"""Energy and money: the GPU energy counter over a window, an estimate by power limit under another name, the price."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tunemap.measure.nvml import ask, handle_of, nvml


@dataclass(frozen=True)
class EnergyReading:
    """Energy of a window, all its devices together.

    seconds: length of the window by the host's clock.
    energy_joules: difference of NVML's total-energy counters (nvmlDeviceGetTotalEnergyConsumption, Volta and
        newer; whole boards, whoever uses them). None unless every device has one. The driver renews the counter
        some ten times a second: windows of several seconds are needed for a per-cent result.
    power_limit_joules: Σ enforced power limit × seconds, an upper estimate and not a measurement. None where
        the driver tells no limit.
    """

    seconds: float
    energy_joules: float | None
    power_limit_joules: float | None


class EnergyWindow:
    """Reads the counters at entry and at exit; `reading` holds the result afterwards.

    The caller sees to it that the devices have finished at both ends (they do after `StepClock.flush`).
    """

    reading: EnergyReading

    def __init__(self, devices: Sequence[Any]) -> None:
        """`devices`: torch devices or their names; a CPU has no counter here."""
        self._devices = list(devices)

    def __enter__(self) -> EnergyWindow:
        self._start_joules = _joules(self._devices)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        end_joules = _joules(self._devices)
        watts = power_limit_watts(self._devices)
        measured = self._start_joules is not None and end_joules is not None
        self.reading = EnergyReading(
            seconds=seconds,
            energy_joules=end_joules - self._start_joules if measured else None,  # type: ignore[operator]
            power_limit_joules=watts * seconds if watts is not None else None,
        )


def power_limit_watts(devices: Sequence[Any]) -> float | None:
    """Sum of the enforced power limits; None unless every device has one."""
    return _sum_over(devices, "nvmlDeviceGetEnforcedPowerLimit")


def _joules(devices: Sequence[Any]) -> float | None:
    return _sum_over(devices, "nvmlDeviceGetTotalEnergyConsumption")


def _sum_over(devices: Sequence[Any], question: str) -> float | None:
    """Sum of NVML's answers, which come in thousandths; None if a device has no answer or there are no devices."""
    with nvml() as library:
        if library is None or not devices:
            return None
        handles = [handle_of(library, device) for device in devices]
        answers = [ask(library, question, handle) for handle in handles if handle is not None]
    told = [answer for answer in answers if answer is not None]
    return sum(told) / 1e3 if len(told) == len(devices) else None


def cost(seconds: float, price_per_device_hour: float | None, devices: int = 1) -> float | None:
    """Price of `devices` devices for `seconds`, in the currency of the price; None without a price."""
    if price_per_device_hour is None:
        return None
    return price_per_device_hour * devices * seconds / 3600
