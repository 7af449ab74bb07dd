"""What the operators of one training step say: matrix products by dtype, attention kernels, blocks computed again.

A setting in a config file proves nothing: published numbers for gradient checkpointing came from code that read the
setting nowhere. The witness watches one step that is not timed and counts what ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from tunemap.measure.flops import flop_counter

_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention", "flash_attn")
_PREPARATION = ("convert", "mask", "is_", "supported")  # helpers whose names hold an attention kernel's


@dataclass(frozen=True)
class Seen:
    """What one step of one rank computed.

    matmul_flops: by dtype, FLOPs of matrix products; their sum is `StepFlops.hardware_flops` less the attention.
    attention_flops: FLOPs of fused attention kernels, forward and backward.
    attention_kernels: names of the fused forward kernels that ran; empty if attention was made of plain products.
    block_computations: how often a transformer block was computed, recomputation included.
    """

    matmul_flops: dict[str, int]
    attention_flops: int
    attention_kernels: tuple[str, ...]
    block_computations: int

    @property
    def hardware_flops(self) -> int:
        """All FLOPs that ran."""
        return sum(self.matmul_flops.values()) + self.attention_flops


def _is_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be a factor of a product, which indices and masks are not."""
    return tensor.is_floating_point() or tensor.is_complex()


def _dtype_of_factors(name: str, args: Sequence[Any]) -> torch.dtype:
    """The dtype that a product is computed in. A complex one (of C3A) counts as it is.

    The last factor tells it: of addmm the first argument is the bias. Of a 4-bit product it is the first: the last
    are the scales of the weight, which are float32 whatever the product is.
    """
    numbers = [a.dtype for a in args if isinstance(a, torch.Tensor) and _is_number(a)]
    return numbers[0] if "4bit" in name else numbers[-1]


class Witness(TorchDispatchMode):
    """Put it around one step; `seen` holds the result. Costs some microseconds an operator: not in timed steps."""

    def __init__(self, blocks: Sequence[torch.nn.Module]) -> None:
        """`blocks`: the transformer blocks of the model."""
        super().__init__()
        self._blocks = list(blocks)
        self._formulas: dict[Any, Any] = dict(flop_counter().flop_registry)
        self._matmul_flops: Counter[str] = Counter()
        self._attention_flops = 0
        self._kernels: dict[str, None] = {}
        self._computations = 0

    @property
    def seen(self) -> Seen:
        """What was seen so far."""
        return Seen(dict(self._matmul_flops), self._attention_flops, tuple(self._kernels), self._computations)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the operators of the body, and how often each block's first part is computed.

        The first part and not the block: transformers keeps a block's own hooks outside of what is recomputed.
        """
        parts = [next(block.children(), block) for block in self._blocks]
        hooks = [part.register_forward_pre_hook(self._count_block) for part in parts]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count_block(self, *_: Any) -> None:
        self._computations += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # sharded tensors: their operators on local tensors come here
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note(func._overloadpacket, args, kwargs, result)
        return result

    def _note(self, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = str(packet)
        attention = any(part in name for part in _ATTENTION) and not any(part in name for part in _PREPARATION)
        if attention and "backward" not in name:
            self._kernels[name.rpartition(".")[2]] = None
        formula = self._formulas.get(packet)
        if formula is None:
            return
        flops = int(formula(*args, **kwargs, out_val=result))
        if attention:
            self._attention_flops += flops
        else:
            dtype = _dtype_of_factors(name, args)
            self._matmul_flops[str(dtype).removeprefix("torch.")] += flops
