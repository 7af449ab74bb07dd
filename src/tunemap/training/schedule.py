"""Learning-rate schedules; the horizon is the real number of steps, so the last step ends the schedule."""

from __future__ import annotations

import math


def learning_rate_multiplier(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0.

    Warm-up rises linearly and reaches the peak at step `warmup_steps - 1`. After it, `constant` stays, `linear`
    falls in equal parts so that it would be 0 at `total_steps`, `cosine` follows half a period to 0 there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}: constant, linear, cosine")
