"""What our own instruments cost: the step time of the training loop over that of a bare PyTorch loop.

    python benchmarks/overhead.py                     # ~25M-parameter Qwen2, 4 x 64 tokens, CPU, under 2 minutes
    python benchmarks/overhead.py --device cuda --steps 500
    python benchmarks/overhead.py --output benchmarks/results/overhead.json

The instrumented steps are those of `tunemap.training.loop.Loop` itself; the bare ones are the same work written down
plainly: forward, cross-entropy over the label tokens, backward, clipping, AdamW. The loop asks for its next batch at
the start of each step: there a bare step is run and timed, so that bare and instrumented steps alternate on the same
model, and drift of the machine falls on both alike. What lies between two requests is the instrumented step, with all
that the loop does: phases marked, and every 5 steps (half as many as in a run) losses and times read, records written.

The ratio is that of the sums over a logging window, its median over windows with a bootstrap interval. CPU time is
printed beside wall time: on a machine shared with others it is the steadier one.
The target is a ratio under 1.01. Beside it stands the cost of the clock alone, timed without any model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.config import Factors
from tunemap.data.batches import batch_schedule
from tunemap.data.collate import IGNORED, Batch
from tunemap.distributed.world import World
from tunemap.measure.clock import PHASES, StepClock, summarise
from tunemap.measure.environment import environment
from tunemap.training.loop import Loop, TrainingState
from tunemap.training.optimizer import build_optimizer
from tunemap.training.precision import PRECISIONS
from tunemap.training.steps import append_records

SEQUENCES, LENGTH = 4, 64
WINDOW = 5  # steps between flushes; the default of a run is 10
TARGET = 1.01


def model_of_25_million() -> Qwen2ForCausalLM:
    """A Qwen2 with about 25 million parameters, random weights."""
    config = Qwen2Config(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


class EnoughError(Exception):
    """The time for measuring is over."""


class Loops:
    """The same step, bare and by the training loop, on one model."""

    def __init__(self, device: str, folder: Path, steps: int) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = model_of_25_million().to(device).train()
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(self.model, name="adamw", learning_rate=1e-5, weight_decay=0.0)
        ids = torch.randint(0, 16384, (SEQUENCES, LENGTH), device=device)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        count = SEQUENCES * (LENGTH - 1)
        self.batch = Batch({"input_ids": ids}, labels, SEQUENCES * LENGTH, count, SEQUENCES * LENGTH, SEQUENCES)
        self.loop = Loop(
            factors=Factors(per_device_batch_size=SEQUENCES, max_length=LENGTH, max_steps=steps, logging_steps=WINDOW),
            precision=PRECISIONS["fp32"],
            schedule=batch_schedule(
                [LENGTH] * SEQUENCES,
                per_device_batch_size=SEQUENCES,
                gradient_accumulation=1,
                world_size=1,
                batching="fixed_length",
                max_length=LENGTH,
                seed=0,
                epochs=None,
                max_steps=steps,
            ),
            world=World(0, 1, torch.device(device)),
            label_tokens=[count] * steps,
            write=lambda records: append_records(folder / "steps.rank0.csv", records),
            window_ended=lambda state, loss: None,
        )

    def bare(self) -> None:
        """A PyTorch training step and nothing else."""
        (self._loss() / self.batch.label_tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self) -> torch.Tensor:
        # In a function, so that the logits are released as early as in the training loop: page faults are time.
        logits = self.model(input_ids=self.batch.inputs["input_ids"]).logits
        return cross_entropy(logits.flatten(0, -2).float(), self.batch.labels.flatten(), reduction="sum")

    def paired_times(self, limit_s: float) -> np.ndarray:
        """Seconds as [step, bare | instrumented, wall | CPU] of whole windows, the first window left out."""
        times: list[list[np.ndarray]] = []
        deadline = time.perf_counter() + limit_s

        def batches() -> Iterator[Batch]:
            while True:
                if len(times) % WINDOW == 0 and time.perf_counter() > deadline:
                    raise EnoughError
                start = self._now()
                self.bare()
                middle = self._now()
                yield self.batch
                times.append([middle - start, self._now() - middle])

        with suppress(EnoughError):
            self.loop.train(TrainingState(self.model, self.optimizer, scaler=None, memory={}), batches())
        whole = len(times) // WINDOW * WINDOW
        return np.array(times[WINDOW:whole])

    def _now(self) -> np.ndarray:
        """Wall and CPU clock, the device idle."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])


def window_ratio(bare: np.ndarray, instrumented: np.ndarray) -> dict[str, float]:
    """Median over windows of instrumented / bare, with a 95 % bootstrap interval over windows."""
    ratios = instrumented.reshape(-1, WINDOW).sum(axis=1) / bare.reshape(-1, WINDOW).sum(axis=1)
    samples = np.random.default_rng(0).choice(ratios, size=(10_000, ratios.size))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def clock_alone_cpu_s(device: str) -> float:
    """Host seconds of the clock alone in one step: six stamps, and their share of a window's flush."""
    clock, steps = StepClock(device), 5_000
    start = time.process_time()
    for step in range(steps):
        clock.begin(step)
        for phase in PHASES:
            clock.mark(phase)
        clock.end()
        if step % WINDOW == WINDOW - 1:
            summarise([record.step_time_s for record in clock.flush()])
    return (time.process_time() - start) / steps


def measure(device: str, steps: int, limit_s: float) -> dict[str, Any]:
    """Everything that this benchmark says, as JSON-able data."""
    with tempfile.TemporaryDirectory() as folder:
        loops = Loops(device, Path(folder), steps)
        times = loops.paired_times(limit_s)
    alone_s = clock_alone_cpu_s(device)
    bare_s = float(np.median(times[:, 0, 0]))
    return {
        "device": device,
        "parameters": sum(parameter.numel() for parameter in loops.model.parameters()),
        "pairs": len(times),
        "bare_step_s": bare_s,
        "wall": window_ratio(times[:, 0, 0], times[:, 1, 0]),
        "cpu": window_ratio(times[:, 0, 1], times[:, 1, 1]),
        "clock_alone_s": alone_s,
        "clock_alone_share": alone_s / bare_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=1000, help="most pairs of steps (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=90.0, help="stop after this long (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result with its environment as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.device, arguments.steps, arguments.limit_s)
    millions = result["parameters"] / 1e6
    print(f"{millions:.1f} M parameters, {result['pairs']} pairs of steps, bare {result['bare_step_s']:.4f} s/step")
    for clock in ("wall", "cpu"):
        ratio = result[clock]
        verdict = "under" if ratio["high"] < TARGET else "not shown to be under"
        print(
            f"{clock:>4} time, instrumented / bare: {ratio['ratio']:.4f} "
            f"[{ratio['low']:.4f}, {ratio['high']:.4f}], {verdict} {TARGET}"
        )
    share = result["clock_alone_share"]
    print(f"clock alone: {result['clock_alone_s'] * 1e6:.1f} µs/step, {share:.2e} of the bare step")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = result | {"environment": environment(Path(__file__).resolve().parents[1]).as_dict()}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
