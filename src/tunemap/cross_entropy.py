"""Cross-entropy of logits that are there, in float32: one tensor of their size where torch makes three or four.

torch's own takes the logarithms of the probabilities from a float32 copy of the logits and keeps them for the backward
pass, which fills a tensor of their size with zeros, puts -1 at the targets, and computes the gradient into another one.
At 2,048 tokens and a vocabulary of 152 thousand each of them is 1.2 GB. Here there is no whole copy, and the gradient,
probabilities minus one at the target, takes the place of the logarithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that is not learned, as in torch
CHUNK_BYTES = 64 << 20  # of float32 logits


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Cross-entropy summed over the rows whose label is not `ignored`, in float32.

    Args:
        logits: (N, classes), of any floating dtype.
        labels: int64 (N,).
        ignored: a negative label.
    """
    loss: torch.Tensor = _CrossEntropySum.apply(logits, labels, ignored)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    """The gradient is computed in the memory of what forward kept, so backward runs once."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
        kept = labels != ignored
        targets = labels.clamp(min=0)[:, None]
        logarithms = torch.empty_like(logits, dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
        for start in range(0, len(logits), rows):
            chunk = slice(start, start + rows)
            torch.log_softmax(logits[chunk], -1, dtype=torch.float32, out=logarithms[chunk])
        ctx.save_for_backward(logarithms, targets, kept)
        ctx.dtype = logits.dtype
        return -torch.where(kept, logarithms.gather(1, targets).squeeze(1), 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logarithms, targets, kept = ctx.saved_tensors
        gradient = logarithms.exp_()
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
        gradient.mul_(torch.where(kept, upstream, 0.0)[:, None])
        return gradient.to(ctx.dtype), None, None
