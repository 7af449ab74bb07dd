"""One step as a table: each lane against a count of every nanosecond, and small enough to draw."""

import numpy as np
import pytest
from test_facts import ADD, GEMM, NCCL, make

from tunemap.trace import timeline
from tunemap.trace.timeline import BINS, step_timeline

STEP_NS = 60_000  # a part is 100 ns


def rows_of(table, lane):
    found = zip(*(table[column] for column in ("lane", "name", "start_ns", "end_ns", "time_ns")), strict=True)
    return [row[1:] for row in found if row[0] == lane]


def test_lanes_of_a_step():
    table = step_timeline(
        make(
            kernels=[(GEMM, 1000, 21_000, 1), (ADD, 21_010, 31_000, 2), (NCCL, 30_000, 40_000, 3)],
            copies=[(8, 50_000, 55_000, 5000)],
            ranges=[("forward", 0, 30_000), ("backward", 30_000, 60_000), ("step 1", 0, STEP_NS)],
        )
    )
    assert rows_of(table, "step") == [("1", 0, STEP_NS, 20_000 + 18_990 + 5000)]
    assert rows_of(table, "phase") == [("forward", 0, 30_000, 30_000), ("backward", 30_000, STEP_NS, 30_000)]
    assert rows_of(table, "work") == [
        ("gemm", 1000, 21_000, 20_000),
        ("elementwise", 21_000, 31_000, 9990),
    ]
    assert sorted(row[1:] for row in rows_of(table, "operator")) == [(1000, 21_000, 20_000), (21_010, 31_000, 9990)]
    assert rows_of(table, "communication") == [("allreduce", 30_000, 40_000, 10_000)]
    assert rows_of(table, "copy") == [("copy", 50_000, 55_000, 5000)]
    gaps = [("forward", 0, 1000, 1000), ("backward", 40_000, 50_000, 10_000), ("backward", 55_000, STEP_NS, 5000)]
    assert rows_of(table, "gap") == gaps  # the gap of 10 ns is narrower than a part


def test_without_step_ranges_a_step_lies_between_ends_of_optimizer_phases():
    ranges = [("optimizer", 90, 100), ("forward", 100, 150), ("optimizer", 190, 200), ("optimizer", 290, 300)]
    table = step_timeline(make(kernels=[(GEMM, 0, 300, 1)], ranges=ranges))
    assert rows_of(table, "step") == [("1", 0, 100, 100)]
    assert rows_of(table, "gap") == []
    assert ("forward", 0, 50, 50) in rows_of(table, "phase")


def test_the_middle_step_is_taken():
    steps = [(f"step {number}", 1000 * number, 1000 * number + 1000) for number in (3, 1, 2)]
    kernels = [(GEMM, 1000 * number, 1000 * number + 100 * number, number) for number in (1, 2, 3)]
    assert rows_of(step_timeline(make(kernels=kernels, ranges=steps)), "step") == [("2", 0, 1000, 200)]


@pytest.mark.parametrize("ranges", [[], [("optimizer", 0, 10)]])
def test_a_trace_that_names_no_step_has_no_rows(ranges):
    table = step_timeline(make(kernels=[(GEMM, 0, 10, 1)], ranges=ranges))
    assert set(map(len, table.values())) == {0}


def test_lanes_agree_with_a_count_of_every_nanosecond():
    random = np.random.default_rng(7)
    starts = np.sort(random.integers(0, STEP_NS, 3000)).tolist()
    names = random.choice([GEMM, ADD], 3000).tolist()
    kernels = [(name, start, start + 15, row + 1) for row, (name, start) in enumerate(zip(names, starts, strict=True))]
    table = step_timeline(make(kernels=kernels, ranges=[("step 1", 0, STEP_NS)]))
    busy = {name: np.zeros(STEP_NS, bool) for name in (GEMM, ADD)}
    for name, start, end, _ in kernels:
        busy[name][start:end] = True
    assert rows_of(table, "step")[0][3] == (busy[GEMM] | busy[ADD]).sum()
    per_part = {name: found.reshape(BINS, -1).sum(axis=1) for name, found in busy.items()}
    empty = (~(busy[GEMM] | busy[ADD])).reshape(BINS, -1).sum(axis=1)
    owner = np.argmax([empty, per_part[ADD], per_part[GEMM]], axis=0)  # categories in alphabetical order
    found = np.zeros(BINS, int)
    for name, start, end, _ in rows_of(table, "work"):
        found[start // 100 : end // 100] = {"elementwise": 1, "gemm": 2}[name]
    assert found.tolist() == owner.tolist()
    assert sum(row[3] for row in rows_of(table, "operator")) == busy[GEMM].sum() + busy[ADD].sum()
    assert len(table["lane"]) < 6 * BINS


def test_rows_are_bounded_however_long_the_trace(monkeypatch):
    monkeypatch.setattr(timeline, "BINS", 10)
    kernels = [(GEMM, 100 * row, 100 * row + 60, row + 1) for row in range(1000)]
    table = step_timeline(make(kernels=kernels, ranges=[("step 1", 0, 100_000)]))
    assert len(table["lane"]) <= 5
