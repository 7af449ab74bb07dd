"""What each `precision` means: the dtype of frozen weights, of trained weights, and of the arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run.

    frozen: weights that are not trained.
    trained: weights that are trained, except adapters, which have a dtype of their own.
    autocast: dtype of matrix products where it differs from the weights', else None.
    scaler: whether gradients are scaled, as fp16's narrow range needs.
    """

    frozen: torch.dtype
    trained: torch.dtype
    autocast: torch.dtype | None
    scaler: bool

    @property
    def compute(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.autocast or self.frozen

    def autocast_context(self, device_type: str) -> AbstractContextManager[None]:
        """Context of a forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, None, False),
    "bf16": Precision(torch.bfloat16, torch.float32, torch.bfloat16, False),
    "fp16": Precision(torch.float16, torch.float32, torch.float16, True),
    "pure_bf16": Precision(torch.bfloat16, torch.bfloat16, None, False),
}
