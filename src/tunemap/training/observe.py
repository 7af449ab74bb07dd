"""What one training run is watched for besides its steps: weights, memory, energy, the device, one step's operators.

Everything here happens outside of timed steps: before training, at the end of logging windows, after training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tunemap.data.batches import Schedule
from tunemap.distributed.communication import CommunicationCounter, communication_columns, communication_rows
from tunemap.distributed.strategies import unwrap
from tunemap.distributed.world import World
from tunemap.gates.measurement import batches_gate, cpu_share_gate, device_gate, flops_gate, training_time_gate
from tunemap.gates.result import GateResult
from tunemap.gates.training import (
    finite_loss_gate,
    frozen_weights_gate,
    gradient_norm_gate,
    ranks_disjoint_gate,
    replicas_gate,
    trained_weights_gate,
)
from tunemap.measure.energy import EnergyWindow
from tunemap.measure.environment import device_state
from tunemap.measure.memory import memory_record, peaks_until_now, reset_peaks
from tunemap.measure.witness import Witness
from tunemap.run import Run
from tunemap.training import effects, steps
from tunemap.training.assemble import Assembled
from tunemap.training.checksums import changed, digest_of, replica_groups, weight_checksums


class Observer:
    """Collects on every rank, and on rank 0 turns what all ranks collected into gates and results."""

    def __init__(self, run: Run, world: World, schedule: Schedule, assembled: Assembled) -> None:
        """Take what must be known before training."""
        self.witness = Witness(assembled.blocks)
        self.communication = CommunicationCounter()
        self._run, self._world, self._schedule, self._assembled = run, world, schedule, assembled
        self._first_step = assembled.state.step
        self._checksums = weight_checksums(assembled.state.model)
        parameters = unwrap(assembled.state.model).named_parameters()
        self._trained = [name for name, parameter in parameters if parameter.requires_grad]
        self._states = [device_state(world.device)]
        self._energy: EnergyWindow | None = None
        self._energy_first_step: int | None = None

    # -- during and after training, on every rank -----------------------------------------------------------

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch one step, which is not measured: what it computes, and what it sends."""
        with self.witness.watch(), self.communication:
            yield
        if self._run.factors.compile:  # a watched step runs uncompiled, with the memory that this takes
            reset_peaks(self._world.device)

    def window_ended(self, step: int) -> None:
        """Open the energy window at the first end of a logging window, when the device has finished its warm-up."""
        warm = step >= self._first_step + 1 and step >= self._run.factors.measurement_warmup_steps
        if self._energy is None and warm and step < self._schedule.steps:
            self._energy, self._energy_first_step = EnergyWindow([self._world.device]), step
            self._energy.__enter__()

    def after_training(self) -> None:
        """Read memory and energy first: what comes next uses both."""
        if self._energy is not None:
            self._energy.__exit__(None, None, None)
        record = asdict(memory_record(self._world.device))
        known = peaks_until_now(self._world.device, self._assembled.state.memory) or {}
        tracked = {name: value for name, value in known.items() if name != "peak_phase"}
        self._memory = record | tracked | {"estimation_peak_bytes": self._assembled.estimation_peak_bytes}
        self._states.append(device_state(self._world.device))
        self._after = weight_checksums(self._assembled.state.model)

    def of_rank(self, work: Path) -> dict[str, Any]:
        """What this rank tells rank 0."""
        trained, frozen = set(self._trained), set(self._checksums) - set(self._trained)
        moved = set(changed(self._checksums, self._after))
        records = steps.read_records(steps.rank_file(work, self._world.rank))
        return {
            "memory": {"rank": self._world.rank, **self._memory},
            "moved": sorted(moved & trained),
            "changed_frozen": sorted(moved & frozen),
            "digest": digest_of(self._after, self._trained),
            "counts": {name: [getattr(record, name) for record in records] for name in _COUNTS},
            "losses": [record.loss for record in records],
            "gradient_norms": [record.gradient_norm for record in records],
            "seconds": self._seconds(records),
            "device_states": [state for state in self._states if state is not None],
            "pid": os.getpid(),
            "communication": communication_rows(self.communication.collectives),
            "energy": asdict(self._energy.reading) if self._energy is not None else None,
        }

    def _seconds(self, records: Sequence[steps.StepRecord]) -> dict[str, float]:
        """Sums over the steps of this process, and over the measured ones."""
        compiled = self._first_step if self._run.factors.compile else None
        own = [record for record in records if record.step >= self._first_step and record.step != compiled]
        measured = [record for record in own if record.measured]
        return {
            "training": sum(record.step_time_s + record.data_time_s for record in own),
            "measured": sum(record.step_time_s + record.data_time_s for record in measured),
            "measured_cpu": sum(record.cpu_time_s for record in measured),
        }

    # -- on rank 0 ------------------------------------------------------------------------------------------

    def gates(
        self, ranks: Sequence[dict[str, Any]], *, label_tokens: np.ndarray, parts_s: dict[str, float]
    ) -> list[GateResult]:
        """The gates that can be decided once training has ended."""
        return [
            *self._effect_gates(),
            *self._weight_gates(ranks),
            *self._count_gates(ranks, label_tokens),
            *self._time_gates(ranks, parts_s),
        ]

    def _effect_gates(self) -> list[GateResult]:
        run, seen = self._run, self.witness.seen
        results = [
            effects.optimizer_gate(self._assembled.state.optimizer, run.factors.optimizer),
            effects.compilation_gate(run.factors.compile),
        ]
        if seen.hardware_flops == 0:  # the run ended before the watched step
            return results
        results += effects.step_gates(run, seen, len(self._assembled.blocks))
        results += effects.gathering_gates(run, self.communication.collectives, len(self._assembled.blocks))
        costs = self._assembled.costs
        if costs is not None and run.factors.attention != "flash_attention_2":  # whose operators have no formula
            watched = self._first_step + int(run.factors.compile)
            expected = int(costs.hardware_flops[watched, :, self._world.rank].sum())
            results.append(flops_gate(seen.hardware_flops, expected))
        return results

    def _weight_gates(self, ranks: Sequence[dict[str, Any]]) -> list[GateResult]:
        scaled = self._assembled.state.scaler is not None
        # A sharded tensor moved if any of its shards did.
        moved = set().union(*(rank["moved"] for rank in ranks))
        frozen = set().union(*(rank["changed_frozen"] for rank in ranks))
        results = [
            finite_loss_gate(ranks[0]["losses"]),
            gradient_norm_gate(ranks[0]["gradient_norms"], scaled=scaled),
            frozen_weights_gate(sorted(frozen), len(self._checksums) - len(self._trained)),
            trained_weights_gate([name for name in self._trained if name not in moved], len(self._trained)),
        ]
        if groups := replica_groups(self._run.factors.strategy, [rank["digest"] for rank in ranks]):
            results.append(replicas_gate(groups, "trained weights"))
        return results

    def _count_gates(self, ranks: Sequence[dict[str, Any]], label_tokens: np.ndarray) -> list[GateResult]:
        done = min(len(rank["losses"]) for rank in ranks)
        schedule = self._schedule
        per_step = {
            "samples": schedule.samples,
            "real_tokens": schedule.real_tokens,
            "label_tokens": schedule.per_step(label_tokens),
            "padded_tokens": schedule.padded_tokens,
        }
        planned = {name: int(counts[:done].sum()) for name, counts in per_step.items()}
        realised = {name: sum(sum(rank["counts"][name][:done]) for rank in ranks) for name in _COUNTS}
        epoch = schedule.examples[: int(schedule.samples[: schedule.steps_per_epoch].sum())]
        return [batches_gate(realised, planned), ranks_disjoint_gate(len(epoch), len(np.unique(epoch)))]

    def _time_gates(self, ranks: Sequence[dict[str, Any]], parts_s: dict[str, float]) -> list[GateResult]:
        seconds = ranks[0]["seconds"]
        own_steps = len(ranks[0]["losses"]) - self._first_step
        windows = math.ceil(own_steps / self._run.factors.logging_steps)
        results = [training_time_gate(seconds["training"], parts_s["training"], windows)]
        states = [rank["device_states"] for rank in ranks]
        if all(states):
            pids = [rank["pid"] for rank in ranks]
            results += [device_gate(own, pids) for own in states]
        elif self._world.size == 1 and seconds["measured"]:
            results.append(cpu_share_gate(seconds["measured_cpu"], seconds["measured"]))
        return results

    def communication_columns(self) -> dict[str, int]:
        """Bytes and calls per step of this rank; the others' are the same."""
        return communication_columns(self.communication.collectives)

    def facts(self) -> dict[str, Any]:
        """What the watched step computed."""
        return {"watched_step": asdict(self.witness.seen)}

    def energy(self, ranks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Energy of all devices over the window, with the tokens trained on in it; None without a window."""
        readings = [rank["energy"] for rank in ranks]
        if None in readings or self._energy_first_step is None:
            return None
        totals: dict[str, float | None] = {}
        for name in ("energy_joules", "power_limit_joules"):
            values = [reading[name] for reading in readings]
            totals[name] = None if None in values else sum(values)
        done = min(len(rank["losses"]) for rank in ranks)
        tokens = int(self._schedule.real_tokens[self._energy_first_step : done].sum())
        return totals | {"seconds": max(reading["seconds"] for reading in readings), "tokens": tokens}


_COUNTS = ("samples", "real_tokens", "label_tokens", "padded_tokens")
