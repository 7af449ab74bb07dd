"""FLOPs of every step of a run in closed form, from the widths and the label tokens of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tunemap.data.batches import Schedule
from tunemap.data.tokens import Tokens
from tunemap.measure.flops import StepFlops, model_shape, step_flops, trained_of
from tunemap.run import Run


@dataclass(frozen=True)
class Costs:
    """FLOPs of a run's micro-batches.

    by_width: of a micro-batch by its width in tokens, with all logits or with none.
    per_label_token: where only the logits of label tokens are computed, what each of them adds.
    label_tokens: of each micro-batch, of shape (steps, gradient_accumulation, world_size).
    """

    by_width: dict[int, StepFlops]
    per_label_token: StepFlops
    label_tokens: np.ndarray

    def of_rank(self, schedule: Schedule, step: int, rank: int) -> StepFlops:
        """FLOPs of one step of one rank."""
        bodies = (self.by_width[width] for width in schedule.widths[step, :, rank].tolist())
        logits = self.per_label_token.times(int(self.label_tokens[step, :, rank].sum()))
        return sum(bodies, StepFlops()) + logits

    def per_step(self, schedule: Schedule) -> dict[str, list[int]]:
        """Model and hardware FLOPs of each step, over all micro-batches and ranks."""
        return {
            name: [int(total) for total in self._of_micro_batches(schedule, name).sum(axis=(1, 2))]
            for name in ("model_flops", "hardware_flops")
        }

    def _of_micro_batches(self, schedule: Schedule, name: str) -> np.ndarray:
        widths, inverse = np.unique(schedule.widths, return_inverse=True)
        costs = np.array([getattr(self.by_width[int(width)], name) for width in widths], dtype=np.int64)
        bodies = costs[inverse].reshape(schedule.widths.shape)
        return np.asarray(bodies + getattr(self.per_label_token, name) * self.label_tokens)


def closed_form(
    model: nn.Module, config: Any, run: Run, schedule: Schedule, tokens: Tokens, *, device_type: str
) -> Costs | None:
    """The costs of a run; None for an architecture whose FLOPs are not known. `model` before it is wrapped."""
    try:
        shape = model_shape(config)
    except ValueError:
        return None
    trained, factors = trained_of(model, shape), run.factors
    # torch has no fused attention with dropout on a CPU.
    dropout = getattr(config, "attention_dropout", 0.0) > 0 and device_type == "cpu"
    some_logits = factors.logits == "label_tokens"

    def micro_batch(width: int, logit_rows: int | None) -> StepFlops:
        return step_flops(
            shape,
            trained,
            [(factors.per_device_batch_size, width)],
            logit_rows=logit_rows,
            gradient_checkpointing=factors.gradient_checkpointing,
            fused_attention=factors.attention != "eager" and not dropout,
        )

    widths = [int(width) for width in np.unique(schedule.widths)]
    return Costs(
        by_width={width: micro_batch(width, 0 if some_logits else None) for width in widths},
        per_label_token=micro_batch(0, 1) if some_logits else StepFlops(),
        label_tokens=schedule.per_micro_batch(tokens.train.label_tokens),
    )
