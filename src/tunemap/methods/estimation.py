"""The batches that a data-driven start looks at: rows of the run's own training data, drawn apart from its order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tunemap.data.collate import IGNORED, Batch, collate
from tunemap.data.tokens import Tokens
from tunemap.errors import UserError
from tunemap.methods.gora import sample_indices


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
    examples = len(tokens.train.lengths)
    chosen = sample_indices(examples, batch_count=batch_count, batch_size=batch_size, seed=seed)
    for rows in chosen[rank::world_size]:
        batch = collate(tokens.train, [np.array([row]) for row in rows], pad_token_id=tokens.pad_token_id)
        yield _with_labels_in_place(batch.to(device))


def widest(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batch with most columns, which needs most memory."""
    return max(batches, key=lambda batch: batch["input_ids"].shape[1])


def _with_labels_in_place(batch: Batch) -> dict[str, torch.Tensor]:
    """Training shifts its labels itself; transformers and peft expect them at their tokens (-100 elsewhere)."""
    labels = batch.labels
    if labels.dim() == 2:
        labels = torch.full_like(labels, IGNORED)
        labels[:, 1:] = batch.labels[:, :-1]
    return {**batch.inputs, "labels": labels}
