"""EVA's start of LoRA by PEFT, with an end where PEFT would search forever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import initialize_lora_eva_weights
from torch import nn

from tunemap.errors import UserError
from tunemap.methods.undisturbed import Batch


def start_along_activations(peft_model: nn.Module, config: Any, batches: list[Batch]) -> None:
    """EVA: A's rows become the first singular vectors of what enters each layer (https://arxiv.org/abs/2410.07170).

    PEFT passes over a batch that has fewer tokens than it wants vectors, and goes through the batches again and again
    until all vectors stand still: forever if it passes over all of them. UserError where they never do.
    """
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    vectors = max(round(rank * config.eva_config.rho) for rank in ranks)
    most = max(_tokens_looked_at(batch, config.eva_config) for batch in batches)
    if most < vectors:
        raise UserError(
            f"init_lora_weights eva: r times rho is {vectors}, and no estimation batch has more than {most} tokens to "
            "look at; raise estimation_batch_size, or lower r or rho"
        )
    # The batches are the same on every process; gathered, each of their tokens would count once for each process.
    initialize_lora_eva_weights(
        peft_model, _SomePasses(batches), gather_distributed_inputs=False, show_progress_bar=False
    )


def _tokens_looked_at(batch: Batch, eva: Any) -> int:
    looked_at = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if eva.use_label_mask:
        looked_at = looked_at & (batch["labels"] != eva.label_mask_value)
    return int(looked_at.sum())


class _SomePasses:
    """Batches for EVA, which stands still after a few passes over them or never."""

    PASSES = 50

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.PASSES):
            yield from self._batches
        raise UserError(
            f"init_lora_weights eva: its vectors have not settled in {self.PASSES} passes over the estimation batches; "
            "raise estimation_batches or estimation_batch_size, or lower r or tau"
        )
