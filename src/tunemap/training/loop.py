"""The step loop: batch, forward, backward, optimizer, for every method and strategy alike.

Nothing in it waits for the device except the end of a logging window, where losses and times are read together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tunemap.config import Factors
from tunemap.cross_entropy import IGNORED, cross_entropy_sum
from tunemap.data.batches import Schedule
from tunemap.data.collate import Batch
from tunemap.distributed.strategies import gradient_sync, unwrap
from tunemap.distributed.world import World
from tunemap.measure.clock import StepClock
from tunemap.measure.memory import LiveStorage, track_live_storage
from tunemap.methods.peft_types import after_optimizer_step, penalty
from tunemap.training.frugal import BackwardOptimizer
from tunemap.training.optimizer import LEARNING_RATE_RATIO, clip_gradients
from tunemap.training.precision import Precision
from tunemap.training.schedule import learning_rate_multiplier
from tunemap.training.steps import StepRecord


class NotFiniteError(Exception):
    """The loss became NaN or infinite; everything after it would be noise."""


@dataclass
class TrainingState:
    """All that changes while training, and so all that a checkpoint holds, besides the random generators."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    step: int = 0  # steps finished
    elapsed_s: float = 0.0
    memory: dict[str, Any] | None = None  # what the tracker saw at its step; on a GPU peaks of earlier processes


def named_for_profilers(phase: str) -> AbstractContextManager[Any]:
    """Name a phase in the traces of profilers; about a microsecond where none is attached."""
    return torch.profiler.record_function(phase)


@dataclass
class Loop:
    """What stays the same during training."""

    factors: Factors
    precision: Precision
    schedule: Schedule
    world: World
    label_tokens: list[int]  # of each step, over all ranks and micro-batches
    write: Callable[[list[StepRecord]], None]
    window_ended: Callable[[TrainingState, float], None]
    loss_of: Callable[[nn.Module, Batch], torch.Tensor] | None = None  # None: `loss_sum`
    watch: Callable[[], AbstractContextManager[None]] | None = None  # around one step that is not measured
    beat: Callable[[int, str], None] = lambda step, phase: None  # told what begins, as a sign of life
    name_phase: Callable[[str], AbstractContextManager[Any]] = named_for_profilers
    compiling: Callable[[], AbstractContextManager[None]] = nullcontext  # around the step that compiles
    _pending: list[dict[str, Any]] = field(default_factory=list)

    def train(self, state: TrainingState, batches: Iterator[Batch]) -> None:
        """Train from `state.step` to the end of the schedule.

        Raises NotFiniteError at the end of the window in which the loss stopped being a number.
        """
        clock = StepClock(self.world.device)
        started = time.perf_counter() - state.elapsed_s
        first, watched = state.step, self._watched_step(state.step)
        tracked = self._tracked_step(first, watched) if state.memory is None else None
        parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        state.model.train()
        for step in range(first, self.schedule.steps):
            tracker = track_live_storage(state.model, state.optimizer) if step == tracked else None
            witness = self.watch() if self.watch and step == watched else None
            clock.begin(step)
            with tracker or witness or (self.compiling() if step == first else nullcontext()):
                row = self.take_step(state, parameters, batches, clock, step, tracker)
            clock.end()
            state.step, state.elapsed_s = step + 1, time.perf_counter() - started
            if tracker is not None:
                state.memory = _memory(tracker)
            warming_up = step < self.factors.measurement_warmup_steps or step == first
            measured = not warming_up and tracker is None and witness is None
            self._pending.append(row | {"elapsed_s": state.elapsed_s, "measured": int(measured)})
            if state.step % self.factors.logging_steps == 0 or state.step == self.schedule.steps:
                self.beat(step, "window")
                loss = self._flush(clock)
                self.window_ended(state, loss)

    def take_step(
        self,
        state: TrainingState,
        parameters: list[nn.Parameter],
        batches: Iterator[Batch],
        clock: StepClock,
        step: int,
        tracker: LiveStorage | None,
    ) -> dict[str, Any]:
        """One optimizer step; returns what is known of it without waiting for the device. `clock` has begun it."""
        model, optimizer, scaler = state.model, state.optimizer, state.scaler
        phase = tracker.phase if tracker else self.name_phase
        counts = {"samples": 0, "real_tokens": 0, "label_tokens": 0, "padded_tokens": 0}
        step_loss: torch.Tensor | float = 0.0
        learning_rate = self._set_learning_rate(optimizer, step)
        in_backward = optimizer if isinstance(optimizer, BackwardOptimizer) else None
        last = self.factors.gradient_accumulation - 1
        for index in range(self.factors.gradient_accumulation):
            self.beat(step, "data")
            with self.name_phase("data"):
                batch = next(batches)
            for name in counts:
                counts[name] += getattr(batch, name)
            clock.mark("data")
            self.beat(step, "forward")
            with gradient_sync(model, index == last):
                with phase("forward"), self.precision.autocast_context(self.world.device.type):
                    # Gradients are averaged over ranks; times the world size, the sum is over all label tokens.
                    loss = (self.loss_of or loss_sum)(model, batch) / self.label_tokens[step] * self.world.size
                    loss = loss + penalty(unwrap(model)) / self.factors.gradient_accumulation
                clock.mark("forward")
                self.beat(step, "backward")
                with phase("backward"):
                    if in_backward:
                        in_backward.backward(loss)
                    else:
                        (scaler.scale(loss) if scaler else loss).backward()
                clock.mark("backward")
            step_loss = step_loss + loss.detach()
        self.beat(step, "optimizer")
        with phase("optimizer"):
            if scaler:
                scaler.unscale_(optimizer)
            if in_backward:
                norm = in_backward.gradient_norm()
            else:
                norm = clip_gradients(parameters, optimizer, self.factors.max_grad_norm)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            after_optimizer_step(unwrap(model), step)
            optimizer.zero_grad()
        clock.mark("optimizer")
        epoch = self.schedule.epoch(step)
        return {
            "step": step,
            "epoch": epoch,
            "learning_rate": learning_rate,
            "loss": step_loss,
            "gradient_norm": norm.full_tensor() if hasattr(norm, "full_tensor") else norm,
            **counts,
        }

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        learning_rate = self.factors.learning_rate * learning_rate_multiplier(
            step,
            schedule=self.factors.schedule,
            warmup_steps=self.factors.warmup_steps,
            total_steps=self.schedule.steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LEARNING_RATE_RATIO, 1.0)
        return learning_rate

    def _watched_step(self, first: int) -> int:
        """The step that the witness watches: the first one, which is not measured anyway.

        In a compiled run the one after it: torch runs a watched step uncompiled, and would never compile what it met
        first under a witness.
        """
        return first + 1 if self.factors.compile else first

    def _tracked_step(self, first: int, watched: int) -> int | None:
        """On a CPU, the step that the memory tracker watches: the one with the widest batch.

        Not the first one, which has no optimizer state yet. A GPU's allocator counts by itself.
        """
        if self.world.device.type == "cuda":
            return None
        widest = self.schedule.widest_step()
        candidates = [step for step in range(max(first, 1), self.schedule.steps) if step != watched]
        if not candidates:
            return None
        widths = self.schedule.widths.max(axis=(1, 2))
        return widest if widest in candidates else max(candidates, key=lambda step: int(widths[step]))

    def _flush(self, clock: StepClock) -> float:
        """Read losses and times of the window, write its records; returns the last loss."""
        pending, self._pending = self._pending, []
        losses = torch.stack([torch.as_tensor(row["loss"]).float() for row in pending])
        if self.world.size > 1:
            torch.distributed.all_reduce(losses)
            losses /= self.world.size
        norms = torch.stack([torch.as_tensor(row["gradient_norm"]).float() for row in pending])
        times = clock.flush()
        records = []
        for row, loss, norm, spent in zip(pending, losses.tolist(), norms.tolist(), times, strict=True):
            timings = {name: value for name, value in vars(spent).items() if name != "step"}
            values = row | {"loss": loss, "gradient_norm": norm} | timings
            records.append(StepRecord(rank=self.world.rank, **values))
        self.write(records)
        for record in records:
            if not math.isfinite(record.loss):
                raise NotFiniteError(f"loss {record.loss} at step {record.step}, gradient norm {record.gradient_norm}")
        return records[-1].loss


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the label tokens of a batch (or over its class labels), in float32.

    Labels are shifted already, so the logits are taken as they are.
    """
    logits = model(**batch.inputs).logits
    # Behind the virtual tokens of prompt tuning. Elsewhere not even a slice of the whole: its backward would copy the
    # gradient of all logits into new memory, the largest tensor of the step.
    if batch.labels.dim() == 2 and logits.shape[1] != batch.labels.shape[1]:
        logits = logits[:, -batch.labels.shape[1] :]
    return cross_entropy_sum(logits.flatten(0, -2), batch.labels.flatten(), IGNORED)


def _memory(tracker: LiveStorage) -> dict[str, Any]:
    return {
        "peak_allocated_bytes": tracker.peak_allocated_bytes,
        "end_allocated_bytes": tracker.end_allocated_bytes,
        "peak_phase": tracker.peak_phase,
        **{f"{category}_bytes": count for category, count in tracker.breakdown_bytes.items()},
    }
