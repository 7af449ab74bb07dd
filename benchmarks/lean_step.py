"""What the training step leaves out in every run, one thing after the other: time, memory, and the same loss.

    python benchmarks/lean_step.py                   # CPU, about ten minutes; prints the table
    python benchmarks/lean_step.py --rounds 40 --output benchmarks/results/lean-step-cpu.json
    python benchmarks/lean_step.py --device cuda --output benchmarks/results/lean-step-cuda.json

The first way is the usual one: a mask of the padding, torch's cross-entropy, PEFT's sum of a layer's result and its
adapter's, clipping in a pass of its own. Each further way leaves one of them out. All train the same padded batch of
lengths as in GSM8K, by steps of one process that take turns; the learning rate is so small that no weight moves, so
loss and gradient norm must be the same, and the benchmark fails where they are not. Ratios are medians over rounds
with a bootstrap interval: of processor time on a CPU, by the clock on a GPU, where a processor's time is that of the
host alone. Memory is counted by the tracker that measures runs on a CPU, here on a GPU as well.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import ratio_of, time_left
from peers import architecture
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.cross_entropy import IGNORED, cross_entropy_sum
from tunemap.files import write_json
from tunemap.measure.environment import environment
from tunemap.measure.memory import track_live_storage
from tunemap.methods.lora_layers import fuse_low_rank_sums
from tunemap.training.optimizer import build_optimizer, clip_gradients

STILL = 1e-12  # a learning rate that moves no weight
ALLOWED = 1e-5  # relative difference of losses and norms: float32 sums in another order
LENGTHS = (150, 210, 260, 380)  # tokens of the batch's rows
CLOCKS = {"cpu": "cpu", "cuda": "wall"}  # whose ratios tell how fast a device is: the steadier, and the only one


@dataclass(frozen=True)
class Way:
    """How a step is taken; the usual way, unless something is left out."""

    name: str
    mask: bool = True
    torchs_loss: bool = True
    pefts_sum: bool = True
    clipping_alone: bool = True


WAYS = {
    "full": (
        Way("as usual"),
        Way("no mask of the padding", mask=False),
        Way("loss in place", mask=False, torchs_loss=False),
        Way("clipping within AdamW", mask=False, torchs_loss=False, clipping_alone=False),
    ),
    "lora": (
        Way("as usual"),
        Way("no mask of the padding", mask=False),
        Way("loss in place", mask=False, torchs_loss=False),
        Way("LoRA's sum within a product", mask=False, torchs_loss=False, pefts_sum=False),
        Way("clipping within AdamW", mask=False, torchs_loss=False, pefts_sum=False, clipping_alone=False),
    ),
}


class Step:
    """A model with its optimizer and one batch, to take steps in any way."""

    def __init__(self, method: str, device: str) -> None:
        torch.manual_seed(0)
        shape = architecture(256, 6, 16384)
        settings = {name: value for name, value in shape.items() if name not in ("model_type", "architectures")}
        model: Any = Qwen2ForCausalLM(Qwen2Config(**settings, use_cache=False))
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model = model.to(device).train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.model, name="adamw", learning_rate=STILL, weight_decay=0.0)
        self.ids = torch.randint(0, settings["vocab_size"], (len(LENGTHS), max(LENGTHS)), device=device)
        lengths = torch.tensor(LENGTHS, device=device)[:, None]
        self.mask = (torch.arange(max(LENGTHS), device=device) < lengths).long()
        self.labels = torch.where(self.mask.roll(-1, 1) * self.mask == 1, self.ids.roll(-1, 1), IGNORED)
        self.labels[:, -1] = IGNORED

    def take(self, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; returns its loss and the norm of its gradients."""
        for module in self.model.modules():
            vars(module).pop("forward", None)
        if not way.pefts_sum:
            fuse_low_rank_sums(self.model)
        loss = self._loss(way)
        loss.backward()
        if way.clipping_alone:
            norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        else:
            norm = clip_gradients(self.parameters, self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        vars(self.optimizer).pop("grad_scale", None)
        return loss.detach(), norm

    def _loss(self, way: Way) -> torch.Tensor:
        inputs = {"input_ids": self.ids} | ({"attention_mask": self.mask} if way.mask else {})
        logits = self.model(**inputs).logits.flatten(0, 1)
        if way.torchs_loss:
            return cross_entropy(logits.float(), self.labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return cross_entropy_sum(logits, self.labels.flatten(), IGNORED)

    def peak_bytes(self, way: Way) -> int:
        """Largest sum of all tensors during a step."""
        with track_live_storage(self.model, self.optimizer) as tracker, tracker.phase("forward"):
            self.take(way)
        return tracker.peak_allocated_bytes


def measure(method: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for one method."""
    step, ways = Step(method, device), WAYS[method]
    expected = [float(value) for value in step.take(ways[0])]
    for way in ways:
        for name, value, usual in zip(("loss", "gradient norm"), step.take(way), expected, strict=True):
            if abs(float(value) / usual - 1) > ALLOWED:
                raise SystemExit(f"{method}, {way.name}: {name} {float(value)} is not {usual}: not the same work")
    start = time.perf_counter()
    seconds = np.zeros((rounds, len(ways), 2))  # by the clock, and of the processor
    for number in range(rounds):
        order = range(len(ways)) if number % 2 == 0 else reversed(range(len(ways)))
        for index in order:
            began = _now(device)
            step.take(ways[index])
            seconds[number, index] = _now(device) - began
        left = time_left(start, number + 1, rounds)
        print(f"{method}, round {number + 1}/{rounds}, {left} ", end="\r" if number + 1 < rounds else "\n", flush=True)
    peaks = [step.peak_bytes(way) for way in ways]
    return [
        {
            "method": method,
            "way": way.name,
            "step_time_median_s": float(np.median(seconds[:, index, 0])),
            "peak_allocated_bytes": peaks[index],
            "speed_up": _speed_up(seconds[:, 0], seconds[:, index]),
            "speed_up_of_the_step": _speed_up(seconds[:, max(0, index - 1)], seconds[:, index]),
        }
        for index, way in enumerate(ways)
    ]


def _now(device: str) -> np.ndarray:
    if device == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def _speed_up(before: np.ndarray, after: np.ndarray) -> dict[str, dict[str, float]]:
    """Time before over time after, by both clocks."""
    clocks = enumerate(("wall", "cpu"))
    return {clock: ratio_of(np.stack([after[:, i], before[:, i]], axis=1))._asdict() for i, clock in clocks}


def main() -> None:
    """Read the command line, measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=40, help="steps of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="json file to keep the results in")
    parser.add_argument("--note", help="what a reader of the results must know of their making; kept with them")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    known = {"note": arguments.note, "environment": environment(Path(__file__).resolve().parents[1]).as_dict()}
    table: list[dict[str, Any]] = []
    for method in arguments.methods:
        table += measure(method, arguments.device, arguments.rounds)
        if arguments.output:
            write_json(arguments.output, {"rows": table} | known)
    clock = CLOCKS[arguments.device]
    ratios = f"{f'of the first, {clock}':21s}  {f'of the one before, {clock}':23s}"
    print(f"{'method':6s} {'way':28s} {'ms':>7s}  {ratios}  {'peak MB':>7s}")
    for row in table:
        first, before = (
            f"{one[clock]['ratio']:.3f} [{one[clock]['low']:.3f}, {one[clock]['high']:.3f}]"
            for one in (row["speed_up"], row["speed_up_of_the_step"])
        )
        start = f"{row['method']:6s} {row['way']:28s} {1e3 * row['step_time_median_s']:7.1f}"
        print(f"{start}  {first:21s}  {before:23s}  {row['peak_allocated_bytes'] / 1e6:7.1f}")


if __name__ == "__main__":
    main()
