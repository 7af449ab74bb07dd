"""FLOPs of every step of a run in closed form, from the widths of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tunemap.data.batches import Schedule
from tunemap.measure.flops import StepFlops, model_shape, step_flops, trained_of
from tunemap.run import Run


@dataclass(frozen=True)
class Costs:
    """FLOPs of a micro-batch by its width in tokens."""

    by_width: dict[int, StepFlops]

    def of_rank(self, schedule: Schedule, step: int, rank: int) -> StepFlops:
        """FLOPs of one step of one rank."""
        widths = schedule.widths[step, :, rank].tolist()
        return sum((self.by_width[width] for width in widths), StepFlops())

    def per_step(self, schedule: Schedule) -> dict[str, list[int]]:
        """Model and hardware FLOPs of each step, over all micro-batches and ranks."""
        return {
            name: [int(total) for total in self._lookup(schedule, name).sum(axis=(1, 2))]
            for name in ("model_flops", "hardware_flops")
        }

    def _lookup(self, schedule: Schedule, name: str) -> np.ndarray:
        widths, inverse = np.unique(schedule.widths, return_inverse=True)
        costs = np.array([getattr(self.by_width[int(width)], name) for width in widths], dtype=np.int64)
        return costs[inverse].reshape(schedule.widths.shape)


def closed_form(model: nn.Module, config: Any, run: Run, schedule: Schedule, *, device_type: str) -> Costs | None:
    """The costs of a run; None for an architecture whose FLOPs are not known. `model` before it is wrapped."""
    try:
        shape = model_shape(config)
    except ValueError:
        return None
    trained, factors = trained_of(model, shape), run.factors
    # torch has no fused attention with dropout on a CPU.
    dropout = getattr(config, "attention_dropout", 0.0) > 0 and device_type == "cpu"
    widths = [int(width) for width in np.unique(schedule.widths)]
    return Costs(
        {
            width: step_flops(
                shape,
                trained,
                [(factors.per_device_batch_size, width)],
                gradient_checkpointing=factors.gradient_checkpointing,
                fused_attention=factors.attention != "eager" and not dropout,
            )
            for width in widths
        }
    )
