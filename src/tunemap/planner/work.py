"""Counts what a step computes: FLOPs, bytes and kernels, operator by operator, on real or on fake tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from tunemap.measure.flops import flop_counter
from tunemap.measure.memory import _tensors_in
from tunemap.planner.prediction import Work

_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
_NO_WORK = ("c10d", "_c10d_functional", "prim")  # namespaces: collectives are counted elsewhere
# Operators that only make another view or read nothing: no kernel starts.
_NO_KERNEL = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "alias",
              "resize_", "set_", "record_stream", "_local_scalar_dense")  # fmt: skip


class WorkCounter(TorchDispatchMode):
    """Put it around one step; `work` holds the counts. Bytes count each operand of an operator once."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas: dict[Any, Any] = dict(flop_counter().flop_registry)
        self._matmul_flops: Counter[str] = Counter()
        self._attention_flops: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._kernels = 0

    @property
    def work(self) -> Work:
        """What was counted so far."""
        return Work(
            dict(self._matmul_flops),
            dict(self._attention_flops),
            self._bytes["matmul"],
            self._bytes["attention"],
            self._bytes["other"],
            self._kernels,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # sharded tensors: their operators on local tensors come here
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_KERNEL or func.namespace in _NO_WORK:
            return
        self._kernels += 1
        moved = _bytes((args, kwargs)) + _bytes(result)
        formula = self._formulas.get(func._overloadpacket)
        if formula is None:
            self._bytes["other"] += moved
            return
        flops = int(formula(*args, **kwargs, out_val=result))
        tensors = [one for one in _tensors_in((args, kwargs)) if one.is_floating_point()]
        dtype = str(tensors[-1].dtype if tensors else torch.float32).removeprefix("torch.")
        kind = "attention" if any(part in name for part in _ATTENTION) else "matmul"
        (self._attention_flops if kind == "attention" else self._matmul_flops)[dtype] += flops
        self._bytes[kind] += moved


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(values))
