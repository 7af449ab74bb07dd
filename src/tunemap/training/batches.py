"""The micro-batches of one rank, made on the host while the device works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import torch

from tunemap.config import Factors
from tunemap.data.batches import Schedule, batch_schedule
from tunemap.data.collate import Batch, collate, collate_packed
from tunemap.data.tokens import Tokens
from tunemap.distributed.world import World
from tunemap.training.packed_attention import by_document

PREFETCHED_BATCHES = 4


def schedule_of(factors: Factors, tokens: Tokens, world: World) -> Schedule:
    """The order of training that a run's factors ask for."""
    return batch_schedule(
        tokens.train.lengths,
        per_device_batch_size=factors.per_device_batch_size,
        gradient_accumulation=factors.gradient_accumulation,
        world_size=world.size,
        batching=factors.batching,
        max_length=factors.max_length,
        seed=factors.seed,
        epochs=factors.epochs,
        max_steps=factors.max_steps,
        one_row=by_document(factors, world.device.type),
    )


def micro_batches(tokens: Tokens, schedule: Schedule, world: World, *, first_step: int) -> Iterator[Batch]:
    """All micro-batches of this rank from `first_step` on, in order, on the host."""
    for step in range(first_step, schedule.steps):
        for index in range(schedule.gradient_accumulation):
            rows = schedule.micro_batch(step, index, world.rank)
            if schedule.batching == "packed":
                yield collate_packed(tokens.train, rows, pad_token_id=tokens.pad_token_id, one_row=schedule.one_row)
            else:
                width = schedule.max_length if schedule.batching == "fixed_length" else None
                yield collate(tokens.train, rows, pad_token_id=tokens.pad_token_id, width=width)


def feed(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`. For a GPU a thread collates and pins ahead; a CPU has no core to spare for that."""
    if device.type != "cuda":
        yield from batches
        return
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)

    def fill() -> None:
        try:
            for batch in batches:
                ready.put(batch.pin_memory())
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item.to(device)
