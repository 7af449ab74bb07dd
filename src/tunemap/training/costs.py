"""FLOPs of every step of a run in closed form, from the widths, documents and label tokens of its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tunemap.data.batches import Schedule
from tunemap.data.tokens import Tokens
from tunemap.measure.flops import StepFlops, model_shape, step_flops, trained_of
from tunemap.run import Run

KINDS = ("model_flops", "hardware_flops")


@dataclass(frozen=True)
class Costs:
    """FLOPs of a run's micro-batches, int64 (steps, gradient_accumulation, world_size)."""

    model_flops: NDArray[np.int64]
    hardware_flops: NDArray[np.int64]

    def per_step(self) -> dict[str, list[int]]:
        """Model and hardware FLOPs of each step, over all micro-batches and ranks."""
        return {name: getattr(self, name).sum(axis=(1, 2)).tolist() for name in KINDS}


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

    def sequences(number: int, width: int, logit_rows: int | None) -> StepFlops:
        return step_flops(
            shape,
            trained,
            [(number, width)],
            logit_rows=logit_rows,
            gradient_checkpointing=factors.gradient_checkpointing,
            fused_attention=factors.attention != "eager" and not dropout,
        )

    def document(length: int) -> StepFlops:
        return sequences(1, length, 0 if some_logits else None)

    def padded_rows(width: int) -> StepFlops:
        return sequences(factors.per_device_batch_size, width, 0 if some_logits else None)

    if schedule.one_row:
        bodies = {name: schedule.per_micro_batch(of) for name, of in _tabulated(document, schedule.lengths).items()}
    else:
        bodies = _tabulated(padded_rows, schedule.widths)
    logits = sequences(0, 0, 1) if some_logits else StepFlops()  # of a label token
    labels = schedule.per_micro_batch(tokens.train.label_tokens)
    return Costs(*(bodies[name] + getattr(logits, name) * labels for name in KINDS))


def _tabulated(flops: Callable[[int], StepFlops], sizes: NDArray[np.integer]) -> dict[str, NDArray[np.int64]]:
    """Both kinds of FLOPs for each of `sizes`, in their shape; each size is computed once."""
    distinct, inverse = np.unique(sizes, return_inverse=True)
    found = [flops(int(size)) for size in distinct]
    return {
        name: np.array([getattr(one, name) for one in found], dtype=np.int64)[inverse].reshape(sizes.shape)
        for name in KINDS
    }
