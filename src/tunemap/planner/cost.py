"""Energy and money of a planned run, from the power limit and the price in the hardware file. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tunemap.hardware import Hardware
from tunemap.measure.energy import cost

LEAST_POWER_SHARE = 0.4  # of the board's limit: what launch-bound training draws; compute-bound work reaches the limit


@dataclass(frozen=True)
class Costs:
    """Ranges over all devices; None where the hardware file does not know. Energy is an estimate by power limit."""

    energy_joules_low: float | None = None
    energy_joules_high: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None
    currency: str | None = None


def costs(seconds: tuple[float, float], hardware: Hardware | None, *, devices: int) -> Costs:
    """What so many seconds on so many devices take."""
    if hardware is None:
        return Costs()
    low, high = seconds
    power, price = hardware.power_limit_w, hardware.price
    per_hour = price.per_hour if price else None
    return Costs(
        energy_joules_low=power * LEAST_POWER_SHARE * low * devices if power else None,
        energy_joules_high=power * high * devices if power else None,
        cost_low=cost(low, per_hour, devices),
        cost_high=cost(high, per_hour, devices),
        currency=price.currency if price else None,
    )
