"""Rows of a schedule -> tensors of one forward pass, labels already shifted.

Axes: B rows, T columns. `labels[b, t]` is the target of position t, that is the token at t + 1 where that token is
part of an answer, else -100; so the last token of each document, its prompt and all padding carry -100, and no
label reaches from one packed document into the next.

Padding is on the right, where no token of a causal model looks, and the model is not told of it: with a mask, attention
computes what lies above the diagonal too and repeats keys and values for every head that shares them. Nor is it told
positions that it counts by itself; in looking for documents among them it would wait for the device in each step.
Packed documents are kept apart by `position_ids` that restart at 0. That works only without `attention_mask` and
with `use_cache=False` (with a cache object, transformers attends across documents without a word); padding behind
the last document is one more document. Where attention goes by document (flash_attention_2, and sdpa on a CPU) all of
them come in one row without padding: `one_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tunemap.cross_entropy import IGNORED
from tunemap.data.tokens import Examples


@dataclass(frozen=True)
class Batch:
    """The tensors of one micro-batch: `model(**batch.inputs)`, then the loss of its logits against `labels`."""

    inputs: dict[str, torch.Tensor]  # int64 (B, T) each
    labels: torch.Tensor  # int64 (B, T) shifted targets, or (B,) class labels
    label_positions: torch.Tensor  # int64 (label_tokens,): where the flattened labels are not -100
    real_tokens: int
    label_tokens: int
    padded_tokens: int  # B × T
    samples: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(
            self,
            inputs={name: function(tensor) for name, tensor in self.inputs.items()},
            labels=function(self.labels),
            label_positions=function(self.label_positions),
        )


def collate(
    examples: Examples,
    rows: Sequence[npt.NDArray[np.int64]],
    *,
    pad_token_id: int,
    width: int | None = None,
    mask_padding: bool = False,
) -> Batch:
    """One example a row, padded on the right to the longest, or to `width` columns for fixed-length batching.

    Texts to classify get an `attention_mask` where something is padded, others with `mask_padding` alone.
    """
    indices = [int(row[0]) for row in rows]
    if any(len(row) != 1 for row in rows):
        raise ValueError("a row with several examples is packed: use collate_packed")
    sequences = [examples.sequence(index) for index in indices]
    columns = max(len(sequence) for sequence in sequences) if width is None else width
    input_ids = np.full((len(rows), columns), pad_token_id, np.int64)
    attention_mask = np.zeros((len(rows), columns), np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
    inputs, classifies = {"input_ids": input_ids}, examples.class_labels[indices[0]] >= 0
    if (classifies or mask_padding) and not attention_mask.all():
        inputs["attention_mask"] = attention_mask
    if classifies:
        labels = examples.class_labels[indices]
    else:
        labels = np.full((len(rows), columns), IGNORED, np.int64)
        for row, index in enumerate(indices):
            labels[row, : len(sequences[row])] = _targets(examples, index)
    return _batch(inputs, labels, real_tokens=int(attention_mask.sum()), samples=len(rows))


def collate_packed(
    examples: Examples,
    rows: Sequence[npt.NDArray[np.int64]],
    *,
    pad_token_id: int,
    one_row: bool = False,
) -> Batch:
    """Several whole examples a row; with `one_row`, all rows become one row without any padding."""
    if len(examples) and examples.class_labels[0] >= 0:
        raise ValueError("texts to classify cannot be packed: each needs its own row")
    documents = [[int(index) for index in row] for row in rows]
    if one_row:
        documents = [[index for row in documents for index in row]]
    lengths = [sum(len(examples.sequence(index)) for index in row) for row in documents]
    shape = (len(documents), max(lengths))
    input_ids = np.full(shape, pad_token_id, np.int64)
    position_ids = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, indices in enumerate(documents):
        start = 0
        for index in indices:
            sequence = examples.sequence(index)
            end = start + len(sequence)
            input_ids[row, start:end] = sequence
            position_ids[row, start:end] = np.arange(end - start)
            labels[row, start:end] = _targets(examples, index)
            start = end
        position_ids[row, start:] = np.arange(shape[1] - start)
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    return _batch(inputs, labels, real_tokens=sum(lengths), samples=sum(map(len, documents)))


def _targets(examples: Examples, index: int) -> npt.NDArray[np.int64]:
    """The token after each position where that token is learned, else -100."""
    sequence = examples.sequence(index)
    targets = np.full(len(sequence), IGNORED, np.int64)
    first = max(int(examples.prompt_tokens[index]) - 1, 0)  # the prompt's last position predicts the first label
    targets[first:-1] = sequence[first + 1 :]
    return targets


def _batch(
    inputs: dict[str, npt.NDArray[np.int64]], labels: npt.NDArray[np.int64], *, real_tokens: int, samples: int
) -> Batch:
    positions = np.flatnonzero(labels != IGNORED)
    return Batch(
        inputs={name: torch.from_numpy(array) for name, array in inputs.items()},
        labels=torch.from_numpy(labels),
        label_positions=torch.from_numpy(positions),
        real_tokens=real_tokens,
        label_tokens=len(positions),
        padded_tokens=inputs["input_ids"].size,
        samples=samples,
    )
