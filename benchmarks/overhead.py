"""What our own instruments cost: the step time of the training loop over that of a bare PyTorch loop.

    python benchmarks/overhead.py                     # ~25M-parameter Qwen2, 2 x 64 tokens, CPU, under 6 minutes
    python benchmarks/overhead.py --device cuda --pairs 400
    python benchmarks/overhead.py --output benchmarks/results/overhead-cpu.json

The instrumented steps are those of `tunemap.training.loop.Loop` itself, signs of life included; the bare ones are the
same work written down plainly, with the same kernels: forward, cross-entropy, backward, clipping, AdamW. The loop asks
for its next batch at the start of each step: there bare steps are run and timed, on the same model, in the order bare,
instrumented, instrumented, bare, in which a steady drift of the machine cancels. In each such block losses and times
are read and records written: five times as often as in a run.

The ratio is the median over blocks with a bootstrap interval. Every other block is a null comparison, bare steps
against bare steps in the same harness: what it says besides 1 is the harness. CPU time is printed beside wall time: on
a machine shared with others it is the steadier one. The target is a ratio under 1.01.

Beside it stands the direct measurement: the same loop over a model of almost no work, where the difference of the two
loops is all that there is to see. It is the instruments' time per step, and its share of the bare step above.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from paired import ratio_of
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.config import Factors
from tunemap.cross_entropy import IGNORED, cross_entropy_sum
from tunemap.data.batches import batch_schedule
from tunemap.data.collate import Batch
from tunemap.distributed.world import World
from tunemap.measure.environment import environment
from tunemap.training.heartbeat import Heartbeat
from tunemap.training.loop import Loop, TrainingState
from tunemap.training.optimizer import build_optimizer, clip_gradients
from tunemap.training.precision import PRECISIONS
from tunemap.training.steps import append_records

SEQUENCES, LENGTH = 2, 64
WINDOW = 2  # steps between flushes, as many as a block has; the default of a run is 10
DIRECT_PAIRS = 200
TARGET = 1.01
VOCABULARY = 16384


def model_of_25_million() -> Qwen2ForCausalLM:
    """A Qwen2 with about 25 million parameters, random weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
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

    def __init__(self, device: str, folder: Path, pairs: int, model: nn.Module) -> None:
        steps = 2 * (pairs + 2)
        self.device, self.pairs = device, pairs
        self.model = model.to(device).train()
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(self.model, name="adamw", learning_rate=1e-5, weight_decay=0.0)
        ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), device=device)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        count = SEQUENCES * (LENGTH - 1)
        positions = torch.nonzero(labels.flatten() != IGNORED).flatten()
        tokens = SEQUENCES * LENGTH
        self.batch = Batch({"input_ids": ids}, labels, positions, tokens, count, tokens, SEQUENCES)
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
            beat=Heartbeat(folder, 0).beat,
        )

    def bare(self) -> None:
        """A PyTorch training step and nothing else."""
        (self._loss() / self.batch.label_tokens).backward()
        clip_gradients(self.parameters, self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self) -> torch.Tensor:
        # In a function, so that the logits are released as early as in the training loop: page faults are time.
        logits = self.model(input_ids=self.batch.inputs["input_ids"]).logits
        return cross_entropy_sum(logits.flatten(0, -2), self.batch.labels.flatten(), IGNORED)

    def paired_times(self, limit_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the blocks, and of the null blocks, as [block, bare | other, wall | CPU], warm-up left out."""
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        deadline = time.perf_counter() + limit_s

        def timed(work: Callable[[], None]) -> np.ndarray:
            start = self._now()
            work()
            return self._now() - start

        def batches() -> Iterator[Batch]:
            for _ in range(self.pairs + 2):
                if time.perf_counter() > deadline:
                    raise EnoughError
                first = timed(self.bare)
                start = self._now()
                yield self.batch
                yield self.batch
                instrumented = self._now() - start
                found[0].append(np.array([first + timed(self.bare), instrumented]))
                a, b, c, d = (timed(self.bare) for _ in range(4))
                found[1].append(np.array([a + d, b + c]))
            raise EnoughError

        with suppress(EnoughError):
            self.loop.train(TrainingState(self.model, self.optimizer, scaler=None, memory={}), batches())
        return np.array(found[0][2:]), np.array(found[1][2:])

    def _now(self) -> np.ndarray:
        """Wall and CPU clock, the device idle."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return np.array([time.perf_counter(), time.process_time()])


class Trifle(nn.Module):
    """A model of almost no work, with the interface of the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(4))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """The same four logits for each token."""
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 4))


def instruments_alone_s(device: str, folder: Path) -> float:
    """Host seconds that the loop adds to a step, measured where the step itself is almost nothing."""
    loops = Loops(device, folder, DIRECT_PAIRS, Trifle())
    loops.batch.labels.clamp_(max=3)
    times, null = loops.paired_times(limit_s=60.0)
    added = (times[:, 1, 0] - times[:, 0, 0]) - (null[:, 1, 0] - null[:, 0, 0])
    return float(np.median(added)) / 2  # a block has two steps of each


def measure(device: str, pairs: int, limit_s: float) -> dict[str, Any]:
    """Everything that this benchmark says, as JSON-able data."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        alone_s = instruments_alone_s(device, Path(folder))
        loops = Loops(device, Path(folder), pairs, model_of_25_million())
        times, null = loops.paired_times(limit_s)
    bare_s = float(np.median(times[:, 0, 0])) / 2
    return {
        "device": device,
        "parameters": sum(parameter.numel() for parameter in loops.model.parameters()),
        "blocks": len(times),
        "bare_step_s": bare_s,
        "wall": ratio_of(times[..., 0])._asdict(),
        "cpu": ratio_of(times[..., 1])._asdict(),
        "null_wall": ratio_of(null[..., 0])._asdict(),
        "null_cpu": ratio_of(null[..., 1])._asdict(),
        "instruments_alone_s": alone_s,
        "instruments_alone_share": alone_s / bare_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pairs", type=int, default=150, help="most blocks of each kind (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=300.0, help="stop after this long (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result with its environment as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.device, arguments.pairs, arguments.limit_s)
    millions = result["parameters"] / 1e6
    blocks = f"{result['blocks']} blocks of 2 + 2 steps"
    print(f"{millions:.1f} M parameters, {blocks}, bare {result['bare_step_s']:.4f} s/step")
    for clock in ("wall", "cpu"):
        ratio, null = result[clock], result[f"null_{clock}"]
        verdict = "under" if ratio["high"] < TARGET else "not shown to be under"
        print(
            f"{clock:>4} time, instrumented / bare: {ratio['ratio']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}], "
            f"{verdict} {TARGET}; bare / bare: {null['ratio']:.4f} [{null['low']:.4f}, {null['high']:.4f}]"
        )
    share = result["instruments_alone_share"]
    print(f"instruments alone: {result['instruments_alone_s'] * 1e6:.0f} µs/step, {share:.2%} of the bare step")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = result | {"environment": environment(Path(__file__).resolve().parents[1]).as_dict()}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
