"""The loss from the logits of label tokens alone, a chunk at a time, so that all logits never exist at once.

With a vocabulary of 152 thousand the logits of 2 x 2048 tokens in float32 are 2.5 GB, their gradient as much again,
and those of prompts and padding are computed for nothing. Here the output layer multiplies only the positions that
are learned, and each chunk's gradient is computed while its logits are there (Hsu et al. 2024, Liger Kernel,
https://arxiv.org/abs/2410.10989, section 3.2), so that nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunemap.cross_entropy import CHUNK_BYTES
from tunemap.data.collate import Batch
from tunemap.training.failure import UnsupportedRunError


class LabelLogits:
    """Makes a causal model's output layer return the summed loss of its batch instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        """`model` before it is wrapped for several devices.

        Raises UnsupportedRunError where the output layer is more than one matrix.
        """
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear or head.bias is not None:
            raise UnsupportedRunError(
                "logits: label_tokens needs an output layer that is one plain matrix, without bias and adapter; "
                f"this one is {head}; use logits: all"
            )
        self._head: nn.Linear = head
        self._batch: Batch | None = None
        head.forward = self._loss

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the label tokens of a batch, in float32; `model` may be wrapped."""
        self._batch = batch
        try:
            loss: torch.Tensor = model(**batch.inputs).logits
            return loss
        finally:
            self._batch = None

    def _loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of the output layer; `hidden` is (B, T, width), behind virtual tokens if there are any."""
        assert self._batch is not None
        columns = self._batch.labels.shape[1]
        if hidden.shape[1] != columns:
            hidden = hidden[:, -columns:]
        positions = self._batch.label_positions
        rows = hidden.flatten(0, 1).index_select(0, positions)
        targets = self._batch.labels.flatten().index_select(0, positions)
        return chunked_cross_entropy(rows, self._head.weight, targets)


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, rows_per_chunk: int | None = None
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T`, summed over rows, in float32.

    Args:
        hidden: (N, width).
        weight: (vocabulary, width).
        targets: int64 (N,).
        rows_per_chunk: rows whose logits exist together; 64 MiB of float32 unless told.
    """
    rows = rows_per_chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, rows)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in its forward pass, where the logits are; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        hidden_needed, weight_needed = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if hidden_needed else None
        d_weight = torch.zeros_like(weight) if weight_needed else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(targets), rows):
                chunk = slice(start, start + rows)
                inputs, target = hidden[chunk].to(dtype), targets[chunk, None]
                logits = (inputs @ matrix.T).float()
                norm = logits.logsumexp(-1, keepdim=True)
                total += (norm - logits.gather(1, target)).sum()
                # d loss / d logits = softmax - one-hot, in the logits' own memory.
                gradient = logits.sub_(norm).exp_()
                gradient.scatter_add_(1, target, torch.full_like(norm, -1.0))
                gradient = gradient.to(dtype)
                if d_hidden is not None:
                    d_hidden[chunk] = gradient @ matrix
                if d_weight is not None:
                    d_weight += gradient.T @ inputs
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = [None if one is None else one.mul_(gradients[0]) for one in (d_hidden, d_weight)]
        return scaled[0], scaled[1], None, None
