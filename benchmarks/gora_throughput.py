"""Throughput of GoRA over that of LoRA at equal settings: the same layers, dtype, batch, tokens and optimizer.

    python benchmarks/gora_throughput.py                  # ~25M-parameter Qwen2, 4 x 64 tokens, CPU, 2 to 4 minutes
    python benchmarks/gora_throughput.py --blocks 60 --output benchmarks/results/gora-throughput-cpu.json

One published study saw GoRA 15 % ahead of LoRA, with adapters of another make and dtype. Here both are peft's layers in
float32. Steps alternate (LoRA, GoRA, GoRA, LoRA) on two models that differ in ranks and starts alone; the ratio is the
median over such blocks with a 95 % bootstrap interval. `lora` against a second LoRA is the null comparison: what the
harness sees where there is no difference. GoRA's estimation, before training, is timed apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import LENGTH, SEQUENCES, model_of_25_million
from paired import in_turns, ratio_of

from tunemap.measure.environment import environment
from tunemap.methods.gora import attach, method, plan
from tunemap.training.optimizer import build_optimizer

CLOCKS = ("wall", "cpu")
VARIANTS = ("lora", "gora", "gora_exact_budget")
ESTIMATION_BATCHES = 8


class Training:
    """One adapter method on a model of its own, a step at a time."""

    def __init__(self, variant: str) -> None:
        torch.manual_seed(0)
        base = model_of_25_million()
        self._ids = torch.randint(0, 16384, (SEQUENCES, LENGTH))
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 16384, (8, SEQUENCES, LENGTH))]
        made = plan(base, batches[:ESTIMATION_BATCHES], method(variant))
        self.trainable, self.estimation_s, self.ranks = made.trainable, made.estimation_s, sorted(made.ranks.values())
        self._model = attach(base, made, task_type="CAUSAL_LM").train()
        ratio = made.settings.learning_rate_ratio
        self._optimizer = build_optimizer(
            self._model, name="adamw", learning_rate=1e-4, weight_decay=0.0, learning_rate_ratio=ratio
        )
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def step(self) -> None:
        """Forward, backward, clipping, optimizer."""
        self._model(input_ids=self._ids, labels=self._ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def compare(variant: str, lora: Training, blocks: int) -> dict[str, Any]:
    """Throughput of a variant over LoRA's, which is the inverse of its step time's ratio."""
    other = Training(variant)
    steps: list[Callable[[], None]] = [lora.step, other.step]
    in_turns(*steps, 2)  # warm-up
    times = in_turns(*steps, blocks)
    ratios = {clock: ratio_of(times[:, ::-1, index]) for index, clock in enumerate(CLOCKS)}
    return {
        "blocks": blocks,
        "throughput_to_lora": {clock: ratio._asdict() for clock, ratio in ratios.items()},
        "tokens_per_second": SEQUENCES * LENGTH * 2 * blocks / times[:, 1, 0].sum(),
        "trainable_parameters": other.trainable,
        "lora_trainable_parameters": lora.trainable,
        "ranks": [other.ranks[0], other.ranks[-1]],
        "estimation_s": other.estimation_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help="of four steps, per variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result with its environment as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lora, results = Training("lora"), {}
    for variant in VARIANTS:
        results[variant] = found = compare(variant, lora, arguments.blocks)
        for clock, ratio in found["throughput_to_lora"].items():
            seen = "no difference seen" if ratio["low"] <= 1 <= ratio["high"] else "a difference"
            name = "lora (null)" if variant == "lora" else variant
            print(
                f"{name:<18} {clock:>4}: throughput {ratio['ratio']:.4f} of LoRA's "
                f"[{ratio['low']:.4f}, {ratio['high']:.4f}], {seen}; {found['trainable_parameters']:,} parameters",
                flush=True,
            )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"variants": results, "environment": environment(Path(__file__).resolve().parents[1]).as_dict()}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
