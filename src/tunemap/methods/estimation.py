"""The batches that a data-driven start looks at: rows of the run's own training data, drawn apart from its order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tunemap.cross_entropy import IGNORED
from tunemap.data.collate import Batch, collate
from tunemap.data.tokens import Tokens
from tunemap.errors import UserError


def estimation_batches(
    tokens: Tokens,
    *,
    batch_count: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for `model(**batch).loss`, that is with labels in place, of one process; padded, never packed.

    The batches are the same for every world size and are dealt out to its processes. UserError where the training
    data have too few rows, or a process would get no batch.
    """
    if world_size > batch_count:
        raise UserError(f"estimation_batches is {batch_count}: too few for {world_size} devices; each needs one")
    chosen = _sampled(len(tokens.train.lengths), batch_count, batch_size, seed)
    for rows in chosen[rank::world_size]:
        # Masked, so that a start that reads one sequence at a time (CorDA) knows where it ends.
        chosen_rows = [np.array([row]) for row in rows]
        batch = collate(tokens.train, chosen_rows, pad_token_id=tokens.pad_token_id, mask_padding=True)
        yield _with_labels_in_place(batch.to(device))


def widest(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batch with most columns, which needs most memory."""
    return max(batches, key=lambda batch: batch["input_ids"].shape[1])


def _sampled(examples: int, batch_count: int, batch_size: int, seed: int) -> list[list[int]]:
    """Rows of each batch, without replacement, by a generator of their own: training's order stays untouched."""
    needed = batch_count * batch_size
    if needed > examples:
        raise UserError(
            f"estimation wants {needed} examples ({batch_count} estimation_batches x {batch_size}), "
            f"the data set has {examples}"
        )
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))[:needed].tolist()
    return [order[start : start + batch_size] for start in range(0, needed, batch_size)]


def _with_labels_in_place(batch: Batch) -> dict[str, torch.Tensor]:
    """Training shifts its labels itself; transformers and peft expect them at their tokens (-100 elsewhere)."""
    labels = batch.labels
    if labels.dim() == 2:
        labels = torch.full_like(labels, IGNORED)
        labels[:, 1:] = batch.labels[:, :-1]
    return {**batch.inputs, "labels": labels}
