"""Which examples make up each optimizer step, micro-batch and rank: arithmetic on lengths, decided before training.

Everything here follows from the lengths of the training examples and the run's factors alone, so two methods with
the same factors see the same examples in the same order, and a different number of devices only deals the same
global batches out differently.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from tunemap.errors import UserError

Batching = Literal["longest", "length_grouped", "fixed_length", "packed"]
Integers = npt.NDArray[np.int64]

GROUPED_BATCHES = 50  # global batches that `length_grouped` sorts together: enough to leave under 2 % padding


@dataclass(frozen=True)
class Schedule:
    """The order of training, as flat arrays; rows are examples, or groups of whole examples when packed.

    Step s trains on rows [s·G, (s+1)·G) with G = per_device_batch_size × gradient_accumulation × world_size. They are
    dealt out in slices of per_device_batch_size: micro-batch a of rank r takes slice a·world_size + r.
    """

    batching: Batching
    per_device_batch_size: int
    gradient_accumulation: int
    world_size: int
    max_length: int
    steps_per_epoch: int
    lengths: Integers  # tokens of each example of the dataset
    examples: Integers  # indices into the dataset, in order of training
    row_offsets: Integers  # row i holds examples[row_offsets[i]:row_offsets[i + 1]]
    one_row: bool  # packed rows of a micro-batch come as one, without any padding

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step, over all ranks and micro-batches."""
        return self.per_device_batch_size * self.gradient_accumulation * self.world_size

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return (len(self.row_offsets) - 1) // self.global_batch_size

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete after step `step`, counted from 0."""
        return (step + 1) / self.steps_per_epoch

    def micro_batch(self, step: int, micro_batch: int, rank: int) -> list[Integers]:
        """The rows of one forward pass of one rank, each as the indices of its examples."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        if not (0 <= micro_batch < self.gradient_accumulation and 0 <= rank < self.world_size):
            raise IndexError(f"micro-batch {micro_batch} of {self.gradient_accumulation}, rank {rank}")
        part = (step * self.gradient_accumulation + micro_batch) * self.world_size + rank
        first = part * self.per_device_batch_size
        offsets = self.row_offsets[first : first + self.per_device_batch_size + 1]
        return [self.examples[start:end] for start, end in pairwise(offsets)]

    @cached_property
    def row_lengths(self) -> Integers:
        """Real tokens of each row."""
        return _sums(self.lengths[self.examples], self.row_offsets)

    @cached_property
    def widths(self) -> Integers:
        """Columns of each micro-batch's tensors, of shape (steps, gradient_accumulation, world_size)."""
        shape = (self.steps, self.gradient_accumulation, self.world_size)
        if self.batching == "fixed_length":
            return np.full(shape, self.max_length, np.int64)
        rows = self.row_lengths.reshape(*shape, self.per_device_batch_size)
        return rows.sum(axis=-1) if self.one_row else rows.max(axis=-1)

    @cached_property
    def real_tokens(self) -> Integers:
        """Tokens of each step that are not padding, over all ranks."""
        return self.per_step(self.lengths)

    @cached_property
    def padded_tokens(self) -> Integers:
        """Token slots of each step, padding included, over all ranks."""
        return self.widths.sum(axis=(1, 2)) * (1 if self.one_row else self.per_device_batch_size)

    @cached_property
    def samples(self) -> Integers:
        """Examples of each step, over all ranks; more than rows when packed."""
        return self.per_step(np.ones_like(self.lengths))

    @property
    def padding_waste_share(self) -> float:
        """Share of token slots that are padding."""
        return 1 - int(self.real_tokens.sum()) / int(self.padded_tokens.sum())

    def per_step(self, per_example: npt.NDArray[np.integer]) -> Integers:
        """Sum over each step's examples of a number known per example, such as its label tokens."""
        return _sums(per_example[self.examples], self.row_offsets[:: self.global_batch_size])

    def per_micro_batch(self, per_example: npt.NDArray[np.integer]) -> Integers:
        """As `per_step`, of shape (steps, gradient_accumulation, world_size)."""
        sums = _sums(per_example[self.examples], self.row_offsets[:: self.per_device_batch_size])
        return sums.reshape(self.steps, self.gradient_accumulation, self.world_size)

    def widest_step(self) -> int:
        """The first step that holds the widest micro-batch of all: the one with the highest peak memory."""
        return int(self.widths.max(axis=(1, 2)).argmax())

    @cached_property
    def order_hash(self) -> str:
        """SHA-256 over lengths, order and grouping into rows and steps; the same however many devices share a step."""
        checksum = hashlib.sha256()
        for part in (self.lengths, self.examples, self.row_offsets, np.array([self.global_batch_size])):
            checksum.update(np.ascontiguousarray(part, np.int64).tobytes())
        return checksum.hexdigest()


def batch_schedule(
    lengths: npt.ArrayLike,
    *,
    per_device_batch_size: int,
    gradient_accumulation: int,
    world_size: int,
    batching: Batching,
    max_length: int,
    seed: int,
    epochs: float | None,
    max_steps: int | None,
    one_row: bool = False,
) -> Schedule:
    """Decide the order of training from the examples' lengths in tokens (none above `max_length`).

    Each epoch is shuffled anew from (seed, epoch). The rows that do not fill an epoch's last global batch are left
    out of that epoch: every step then has the same number of rows, whatever the number of devices. The number of
    steps is the smaller of `max_steps` and `epochs` × steps per epoch, rounded up.

    `length_grouped` sorts 50 global batches at a time by length and then shuffles the batches, so micro-batches and
    ranks of a step get similar lengths. `packed` fills rows of up to `max_length` tokens with whole examples by
    best fit decreasing, then shuffles the rows; with `one_row` those of a micro-batch come as one, without padding.

    Raises `UserError` when the data do not fill one global batch, or when neither `epochs` nor `max_steps` is given.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= max_length:
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not lie in 1..{max_length}")
    if epochs is None and max_steps is None:
        raise UserError("epochs and max_steps are both null: give one of them, or nothing ends the training")
    batch = per_device_batch_size * gradient_accumulation * world_size
    rows = packed_row_count(sizes, max_length) if batching == "packed" else len(sizes)
    steps_per_epoch = rows // batch
    if steps_per_epoch == 0:
        kind = "packed rows" if batching == "packed" else "training rows"
        raise UserError(
            f"{rows} {kind} are fewer than one global batch of {batch} (per_device_batch_size "
            f"{per_device_batch_size} × gradient_accumulation {gradient_accumulation} × gpus {world_size}): "
            "use more train_rows or a smaller batch"
        )
    steps = math.inf if epochs is None else max(1, math.ceil(epochs * steps_per_epoch - 1e-9))
    steps = int(min(steps, math.inf if max_steps is None else max_steps))
    order = [
        row
        for epoch in range(math.ceil(steps / steps_per_epoch))
        for row in _epoch_rows(
            sizes, batching, max_length, batch, steps_per_epoch, np.random.default_rng([seed, epoch])
        )
    ][: steps * batch]
    return Schedule(
        batching=batching,
        per_device_batch_size=per_device_batch_size,
        gradient_accumulation=gradient_accumulation,
        world_size=world_size,
        max_length=max_length,
        steps_per_epoch=steps_per_epoch,
        lengths=sizes,
        examples=np.concatenate(order),
        row_offsets=np.concatenate([[0], np.cumsum([len(row) for row in order])]).astype(np.int64),
        one_row=one_row,
    )


def packed_row_count(lengths: npt.ArrayLike, max_length: int) -> int:
    """Rows of up to `max_length` tokens that best-fit packing needs for whole examples of these lengths."""
    sizes = np.asarray(lengths, np.int64)
    return len(_packed_rows(np.arange(len(sizes)), sizes, max_length))


def _sums(values: npt.NDArray[np.integer], offsets: Integers) -> Integers:
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(totals[offsets[1:]] - totals[offsets[:-1]])


def _epoch_rows(
    lengths: Integers,
    batching: Batching,
    max_length: int,
    batch: int,
    steps: int,
    rng: np.random.Generator,
) -> list[Integers]:
    order = rng.permutation(len(lengths))
    if batching == "packed":
        packed = _packed_rows(order, lengths, max_length)
        return [packed[row] for row in rng.permutation(len(packed))[: steps * batch]]
    order = order[: steps * batch]
    if batching == "length_grouped":
        window = GROUPED_BATCHES * batch
        parts = [order[start : start + window] for start in range(0, len(order), window)]
        grouped = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
        order = grouped.reshape(steps, batch)[rng.permutation(steps)].ravel()
    return list(order.reshape(-1, 1))


def _packed_rows(order: Integers, lengths: Integers, max_length: int) -> list[Integers]:
    """Best fit decreasing: longest first, each into the fullest row that still has room (Johnson 1973).

    The number of rows depends on the lengths alone; which of several equally long examples share a row depends on
    `order`.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = defaultdict(list)  # free tokens -> rows that have exactly so many left
    free: list[int] = []  # the keys of `room`, sorted
    for example in order[np.argsort(-lengths[order], kind="stable")]:
        length = int(lengths[example])
        place = bisect_left(free, length)
        if place == len(free):
            row, left = len(rows), max_length
            rows.append([])
        else:
            left = free[place]
            row = room[left].pop()
            if not room[left]:
                del room[left], free[place]
        rows[row].append(int(example))
        left -= length
        if not room[left]:
            insort(free, left)
        room[left].append(row)
    return [np.array(row, np.int64) for row in rows]
