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
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


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

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.rows * self.length

    @property
    def warm_up_steps(self) -> int:
        """First steps that nobody's time counts."""
        return self.steps // 4

    def save(self, folder: Path) -> None:
        """Write it down for the contestants."""
        (folder / "workload.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        """Read what `save` wrote."""
        return cls(**json.loads((folder / "workload.json").read_text()))


class Stopwatch:
    """Notes the time at which each optimizer step ended, in the same way for everybody.

    On a GPU it waits for the device at the first and at the last of the steps that count, and at no other, so that a
    loop that runs ahead of its device is neither hindered nor believed.
    """

    def __init__(self, result: Path, work: Workload) -> None:
        self._result, self._work = result, work
        self._ends: list[tuple[float, float]] = []

    def step_ended(self) -> None:
        """Note the time, and the CPU time of this process: the steadier of the two on a shared machine."""
        if self._work.device == "cuda" and len(self._ends) in (self._work.warm_up_steps, self._work.steps - 1):
            torch.cuda.synchronize()
        self._ends.append((time.perf_counter(), time.process_time()))

    def save(self, *, losses: list[float], own_tokens_per_second: float | None) -> None:
        """Leave times, losses, what the contestant itself calls its throughput, and a GPU's peak of allocated bytes."""
        known: dict[str, Any] = {"losses": losses, "own_tokens_per_second": own_tokens_per_second}
        known["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() if self._work.device == "cuda" else None
        self._result.write_text(json.dumps({"step_ends_wall_and_cpu_s": self._ends, **known}))
