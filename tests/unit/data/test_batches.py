"""The order of training: complete, the same on any number of devices, and with the padding that it says it has."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunemap.data.batches import Schedule, batch_schedule, packed_row_count
from tunemap.errors import UserError

BATCHINGS = ("longest", "length_grouped", "fixed_length", "packed")
LENGTHS = np.random.default_rng(3).integers(5, 60, 500)


def make(lengths: Any = LENGTHS, **changes: Any) -> Schedule:
    factors: dict[str, Any] = {
        "per_device_batch_size": 4,
        "gradient_accumulation": 2,
        "world_size": 1,
        "batching": "longest",
        "max_length": 64,
        "seed": 0,
        "epochs": 1,
        "max_steps": None,
    }
    return batch_schedule(lengths, **(factors | changes))


def step_rows(schedule: Schedule, step: int) -> list[list[int]]:
    """The global batch of a step, in the order in which its slices are dealt out."""
    return [
        row.tolist()
        for micro_batch in range(schedule.gradient_accumulation)
        for rank in range(schedule.world_size)
        for row in schedule.micro_batch(step, micro_batch, rank)
    ]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_epoch_uses_no_example_twice_and_loses_only_the_incomplete_last_batch(batching: str) -> None:
    schedule = make(batching=batching)
    rows = packed_row_count(LENGTHS, 64) if batching == "packed" else len(LENGTHS)
    assert schedule.steps == rows // 8
    seen = [index for step in range(schedule.steps) for row in step_rows(schedule, step) for index in row]
    assert len(seen) == len(set(seen)) == schedule.samples.sum()
    if batching != "packed":
        assert len(LENGTHS) - len(seen) == len(LENGTHS) % 8


@given(
    lengths=st.lists(st.integers(1, 20), min_size=12, max_size=60),
    batching=st.sampled_from(BATCHINGS),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_each_epoch_is_without_repetition(lengths: list[int], batching: str, seed: int, epochs: int) -> None:
    schedule = make(lengths, batching=batching, seed=seed, epochs=epochs, per_device_batch_size=1, max_length=30)
    for epoch in range(epochs):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        seen = [index for step in steps for row in step_rows(schedule, step) for index in row]
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(range(len(lengths)))


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(("world_size", "gradient_accumulation"), [(2, 4), (4, 2), (8, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_devices(
    batching: str, world_size: int, gradient_accumulation: int
) -> None:
    one = make(batching=batching, per_device_batch_size=2, gradient_accumulation=8)
    many = make(
        batching=batching,
        per_device_batch_size=2,
        gradient_accumulation=gradient_accumulation,
        world_size=world_size,
    )
    assert one.steps == many.steps
    assert all(step_rows(one, step) == step_rows(many, step) for step in range(one.steps))
    assert one.order_hash == many.order_hash
    assert (one.real_tokens == many.real_tokens).all()
    assert (one.padded_tokens == many.padded_tokens).all()


def test_ranks_of_a_step_have_disjoint_examples() -> None:
    schedule = make(world_size=3, per_device_batch_size=2)
    for step in range(schedule.steps):
        ranks = [
            {
                int(i)
                for a in range(schedule.gradient_accumulation)
                for row in schedule.micro_batch(step, a, r)
                for i in row
            }
            for r in range(3)
        ]
        assert len(set.union(*ranks)) == sum(map(len, ranks)) == 12


@pytest.mark.parametrize("batching", BATCHINGS)
def test_token_counts_and_widths_equal_those_counted_row_by_row(batching: str) -> None:
    schedule = make(batching=batching, world_size=2)
    for step in (0, 3, schedule.steps - 1):
        real = padded = 0
        for a in range(2):
            for rank in range(2):
                rows = [int(LENGTHS[row].sum()) for row in schedule.micro_batch(step, a, rank)]
                width = 64 if batching == "fixed_length" else max(rows)
                assert schedule.widths[step, a, rank] == width
                real, padded = real + sum(rows), padded + width * len(rows)
        assert schedule.real_tokens[step] == real
        assert schedule.padded_tokens[step] == padded
    waste = 1 - schedule.real_tokens.sum() / schedule.padded_tokens.sum()
    assert schedule.padding_waste_share == pytest.approx(waste)


def test_the_widest_step_holds_the_widest_micro_batch() -> None:
    schedule = make()
    widths = [
        max(LENGTHS[row[0]] for a in range(2) for row in schedule.micro_batch(step, a, 0))
        for step in range(schedule.steps)
    ]
    assert schedule.widest_step() == widths.index(max(widths))


def test_order_depends_on_seed_and_epoch() -> None:
    first, again, other = make(epochs=2), make(epochs=2), make(epochs=2, seed=1)
    assert first.order_hash == again.order_hash != other.order_hash
    epoch = first.steps_per_epoch
    assert step_rows(first, 0) != step_rows(first, epoch)


def test_order_hash_tells_grouping_apart() -> None:
    hashes = {make(batching=batching).order_hash for batching in BATCHINGS}
    assert len(hashes) == 3  # fixed_length sees what longest sees, in the same order
    assert make(per_device_batch_size=2).order_hash != make().order_hash
    assert make(LENGTHS[::-1].copy()).order_hash != make().order_hash


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 62), (2, None, 124), (0.5, None, 31), (0.01, None, 1), (1, 10, 10), (1, 100, 62), (None, 100, 100)],
)
def test_number_of_steps_is_the_smaller_of_epochs_and_max_steps(
    epochs: float | None, max_steps: int | None, steps: int
) -> None:
    assert make(epochs=epochs, max_steps=max_steps).steps == steps


def test_fewer_steps_are_a_prefix_of_more() -> None:
    few, many = make(max_steps=7), make(max_steps=30)
    assert all(step_rows(few, step) == step_rows(many, step) for step in range(7))


def test_epoch_counts_passes_over_the_data() -> None:
    schedule = make(epochs=2)
    assert schedule.epoch(schedule.steps_per_epoch - 1) == 1
    assert schedule.epoch(schedule.steps - 1) == 2


def test_length_grouping_wastes_less_and_still_shuffles() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 4000)
    longest, grouped = make(lengths), make(lengths, batching="length_grouped")
    assert grouped.padding_waste_share < 0.1 * longest.padding_waste_share
    means = grouped.real_tokens / grouped.samples
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # long batches do not follow long batches


def test_labels_per_step_add_up() -> None:
    labels = LENGTHS // 2
    schedule = make()
    expected = [sum(labels[row[0]] for row in step_rows(schedule, step)) for step in range(schedule.steps)]
    assert schedule.per_step(labels).tolist() == expected


@given(st.lists(st.integers(1, 10), max_size=7))
def test_packing_needs_at_most_one_row_more_than_the_best_possible(lengths: list[int]) -> None:
    def best(remaining: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        """The fewest rows, by trying every placement."""
        if not remaining:
            return len(rooms)
        length, rest = remaining[0], remaining[1:]
        options = [best(rest, (*rooms, 10 - length))]
        for i, room in enumerate(rooms):
            if room >= length:
                options.append(best(rest, (*rooms[:i], room - length, *rooms[i + 1 :])))
        return min(options)

    optimum = best(tuple(lengths), ())
    assert optimum <= packed_row_count(lengths, 10) <= 11 * optimum / 9 + 1  # Johnson 1973


def test_packed_rows_hold_whole_examples_within_the_limit() -> None:
    schedule = make(batching="packed")
    sizes = np.array([LENGTHS[schedule.examples[a:b]].sum() for a, b in pairwise(schedule.row_offsets)])
    assert sizes.max() <= 64
    assert (schedule.row_lengths == sizes).all()


def test_packed_rows_in_one_row_have_no_padding() -> None:
    rows, one = (make(batching="packed", one_row=one_row) for one_row in (False, True))
    assert one.order_hash == rows.order_hash
    assert (one.padded_tokens == one.real_tokens).all()
    assert (rows.padded_tokens > rows.real_tokens).any()
    assert (one.widths == rows.row_lengths.reshape(*rows.widths.shape, 4).sum(axis=-1)).all()
    assert one.padding_waste_share == 0


def test_too_few_rows_say_what_to_change() -> None:
    with pytest.raises(UserError, match=r"7 training rows .* global batch of 8 .*train_rows or a smaller batch"):
        make([5] * 7)
    with pytest.raises(UserError, match="1 packed rows"):
        make([5] * 7, batching="packed")


def test_endless_training_is_refused() -> None:
    with pytest.raises(UserError, match="epochs and max_steps are both null"):
        make(epochs=None)


def test_lengths_beyond_the_maximum_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not lie in 1\.\.64"):
        make([65] * 8)


def test_micro_batches_outside_the_schedule_are_refused() -> None:
    schedule = make()
    for step, micro_batch, rank in [(62, 0, 0), (-1, 0, 0), (0, 2, 0), (0, 0, 1)]:
        with pytest.raises(IndexError):
            schedule.micro_batch(step, micro_batch, rank)
