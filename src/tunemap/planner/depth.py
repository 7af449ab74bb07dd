"""Deep models from shallow ones: the account of a model of L equal blocks from those of two with few blocks.

A step is cut into segments: its phases, and the backward pass at its first, second, last but one and last block. What
is alive at a given point of a segment is a constant plus a multiple of L, and between those blocks it changes by the
same amount from block to block, so its greatest value is at one of them. Each segment's peak is therefore a straight
line in L, and the peak of the step is the highest of these lines at L. Work and communication are straight lines too.
Exact, where all blocks are alike; a test compares with accounts of whole models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tunemap.measure.memory import LiveStorage
from tunemap.planner.prediction import Account, Work

SHALLOW = (5, 7)  # blocks of the two models: the segments below need 4
DEEP = 16  # from so many blocks on, two shallow accounts are cheaper than one whole

Segments = dict[str, tuple[int, dict[str, int]]]  # name -> peak bytes and their breakdown at that moment


class SegmentedStorage(LiveStorage):
    """A tracker that keeps the peak of each segment apart."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        blocks: Sequence[nn.Module],
        block_bytes: int = 1,
    ) -> None:
        self._segment = ""
        self.segments: Segments = {}
        super().__init__(model, optimizer, block_bytes=block_bytes)
        for index, block in enumerate(blocks):
            block.register_forward_hook(self._watch(_segment_of(index, len(blocks))))

    def reset_peak(self) -> None:
        """Forget all peaks."""
        super().reset_peak()
        self.segments = {}

    def _watch(self, segment: str) -> Any:
        def backward_begins(gradient: torch.Tensor) -> None:
            self._segment = segment
            self._note()

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            if isinstance(made, torch.Tensor) and made.requires_grad and self._phase == "forward":
                made.register_hook(backward_begins)

        return hook

    def _meet(self, tensor: torch.Tensor) -> None:
        before, segments = self._current_bytes, dict(self.segments)
        super()._meet(tensor)
        if extra := self._current_bytes - before:  # was there all along
            self.segments = {
                name: (peak + extra, parts | {"other": parts["other"] + extra})
                for name, (peak, parts) in segments.items()
            }

    def _add(self, category: str, change_bytes: int) -> None:
        super()._add(category, change_bytes)
        self._note()

    def _note(self) -> None:
        if self._phase != "backward":
            self._segment = ""
        name = f"{self._phase} {self._segment}".strip()
        known = self.segments.get(name)
        if known is None or self._current_bytes > known[0]:
            self.segments[name] = (self._current_bytes, dict(self._by_category))


def _segment_of(index: int, blocks: int) -> str:
    """The backward pass meets the last block first."""
    names = {0: "block 0", 1: "block 1", blocks - 1: "block -1", blocks - 2: "block -2"}
    return names.get(index, "between")


def highest(segments: Mapping[str, tuple[int, dict[str, int]]]) -> tuple[str, int, dict[str, int]]:
    """Phase, bytes and breakdown of the highest segment."""
    name = max(segments, key=lambda key: segments[key][0])
    return name.split(" ")[0], *segments[name]


def deepened(shallow: tuple[Account, Account], segments: tuple[Segments, Segments], blocks: int) -> Account:
    """The account of `blocks` blocks, from those of SHALLOW blocks and their segments."""
    factor = (blocks - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    few, more = shallow

    def line(left: int, right: int) -> int:
        return left + round((right - left) * factor)

    at_depth: Segments = {}
    for name, (peak, breakdown) in segments[0].items():
        if name in segments[1] and not name.endswith("between"):
            other_peak, other = segments[1][name]
            parts = {category: line(breakdown[category], other[category]) for category in breakdown}
            at_depth[name] = (line(peak, other_peak), parts)
    phase, peak, breakdown = highest(at_depth)
    phase_peaks: dict[str, int] = {}
    for name, (reached, _) in at_depth.items():
        phase_peaks[name.split(" ")[0]] = max(reached, phase_peaks.get(name.split(" ")[0], 0))
    estimation = None
    if few.estimation_peak_bytes is not None and more.estimation_peak_bytes is not None:
        estimation = line(few.estimation_peak_bytes, more.estimation_peak_bytes)
    return replace(
        few,
        peak_bytes=peak,
        peak_phase=phase,
        breakdown_bytes=breakdown,
        phase_peak_bytes=phase_peaks,
        estimation_peak_bytes=estimation,
        weights_bytes=line(few.weights_bytes, more.weights_bytes),
        total_parameters=line(few.total_parameters, more.total_parameters),
        trainable_parameters=line(few.trainable_parameters, more.trainable_parameters),
        work=_work(few.work, more.work, factor),
        optimizer=_work(few.optimizer, more.optimizer, factor),
        collectives=tuple(
            left | {key: line(left[key], right[key]) for key in ("calls", "payload_bytes", "sent_bytes")}
            for left, right in zip(few.collectives, more.collectives, strict=True)
        ),
        seconds=round(few.seconds + more.seconds, 2),
    )


def _work(few: Work, more: Work, factor: float) -> Work:
    return few + (more - few).scaled(factor)


def can_be_deepened(config: Any, method_kind: str, targets: Any) -> int | None:
    """Number of blocks, if the model has many and all of them are alike under the method; None else."""
    blocks = getattr(config, "num_hidden_layers", 0)
    kinds = set(getattr(config, "layer_types", None) or ())
    alike = len(kinds) <= 1 and method_kind in ("full", "lora", "qlora", "gora")
    named = isinstance(targets, str) and targets != "all-linear"  # a pattern may choose among blocks
    numbered = not isinstance(targets, str) and any(part.isdigit() for one in targets or () for part in one.split("."))
    return blocks if blocks >= DEEP and alike and not named and not numbered else None


def with_depth(config: Any, blocks: int) -> Any:
    """The same architecture with so many blocks."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        shallow.layer_types = list(config.layer_types)[:blocks]
    return shallow
