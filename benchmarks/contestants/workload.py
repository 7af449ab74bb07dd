"""The work that every contestant does: one folder with model, data and settings, and the stopwatch they all carry.

    model/            weights and tokenizer in the hub's layout
    dataset/, tokens/ the same rows as TuneMap prepares them
    batches.npz       input_ids and labels [steps, rows, length], in the order in which TuneMap trains on them
    run.json          the same as a run of TuneMap; on a GPU recommended.json has what we would set for speed
    workload.json     method, steps, batch, length, learning rate, threads, device, dtype

Imports nothing but torch and the standard library, because each contestant runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Whatever of these is where a contestant runs has its version in the result.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "optimum-benchmark")


@dataclass(frozen=True)
class Workload:
    """One training job; every row has exactly `length` tokens, so that nobody pads and no count is in doubt."""

    size: str
    method: str  # full or lora
    steps: int
    rows: int  # per step
    length: int
    learning_rate: float
    lora_rank: int
    lora_alpha: int
    threads: int
    device: str  # cpu or cuda
    dtype: str  # of the weights and of the arithmetic; adapters are float32
    turns: int = 1  # into which the steps that count are divided

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows * self.length

    @property
    def warm_up_steps(self) -> int:
        """First steps that nobody's time counts."""
        return self.steps // 4

    @property
    def steps_per_turn(self) -> int:
        """Steps between two rests."""
        return (self.steps - self.warm_up_steps) // self.turns

    def save(self, folder: Path) -> None:
        """Write it down for the contestants."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        """Read what `save` wrote."""
        return cls(**json.loads((folder / "workload.json").read_text()))


class Stopwatch:
    """Takes the time of the steps that count, in the same way for everybody.

    With more than one turn it stops its own process (SIGSTOP) after the warm-up and after each turn, until the
    benchmark sends it on (SIGCONT): contestants that train in turns have the machine to themselves in each, and what
    slows the machine for a minute slows all of them.
    On a GPU it waits for the device at the beginning and at the end of a turn, and at no other step, so that a loop
    that runs ahead of its device is neither hindered nor believed.
    """

    def __init__(self, result: Path, work: Workload) -> None:
        self._result, self._work = result, work
        self._steps = 0
        self._turns: list[tuple[float, float]] = []
        self._turn_began = (0.0, 0.0)

    def step_ended(self) -> None:
        """Count the step; at the end of a turn note its time, and rest until the next one."""
        self._steps += 1
        counted = self._steps - self._work.warm_up_steps
        if counted < 0 or counted % self._work.steps_per_turn:
            return
        if counted > 0:
            self._turns.append(tuple(now - then for now, then in zip(self._now(), self._turn_began, strict=True)))
        if self._work.turns > 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        self._turn_began = self._now()

    def _now(self) -> tuple[float, float]:
        """The clock, and the processor time of this process: the steadier of the two on a shared machine."""
        if self._work.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def save(self, *, losses: list[float], own_tokens_per_second: float | None, **versions: str) -> None:
        """Leave times, losses, what the contestant itself calls its throughput, and a GPU's peak of allocated bytes.

        What it calls its throughput is right with one turn only: a clock of its own goes on while it rests.
        versions: of what is no installed package, beside those of the packages.
        """
        known: dict[str, Any] = {"losses": losses, "own_tokens_per_second": own_tokens_per_second}
        known["versions"] = installed_versions() | versions
        known["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() if self._work.device == "cuda" else None
        self._result.write_text(json.dumps({"turns_wall_and_cpu_s": self._turns, **known}))


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a contestant can have, where it has them."""
    known = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known
