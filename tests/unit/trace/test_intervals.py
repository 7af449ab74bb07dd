"""Interval algebra against a bitmap of every nanosecond."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunemap.trace.intervals import contributions, gaps, join, order, union

SIZE = 60
intervals = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12).map(
    lambda pairs: [(min(p), max(p)) for p in pairs]
)


def arrays(pairs):
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def bitmap(pairs):
    bits = np.zeros(SIZE, bool)
    for start, end in pairs:
        bits[start:end] = True
    return bits


@given(intervals)
def test_union_is_sorted_disjoint_and_covers_the_same(pairs):
    spans = union(*arrays(pairs))
    assert np.array_equal(bitmap(zip(spans.start, spans.end, strict=True)), bitmap(pairs))
    assert (spans.end > spans.start).all()
    assert (spans.start[1:] > spans.end[:-1]).all()
    assert spans.total == bitmap(pairs).sum()


@given(intervals)
def test_covered_before_and_contains_agree_with_the_bitmap(pairs):
    spans, bits = union(*arrays(pairs)), bitmap(pairs)
    times = np.arange(SIZE)
    assert np.array_equal(spans.covered_before(times), np.concatenate([[0], np.cumsum(bits)[:-1]]))
    assert np.array_equal(spans.contains(times), bits)


@given(intervals, intervals)
def test_join_and_gaps_partition_the_window(a, b):
    joined = join(union(*arrays(a)), union(*arrays(b)))
    free = gaps(joined, 0, SIZE)
    assert np.array_equal(bitmap(zip(free.start, free.end, strict=True)), ~bitmap(a + b))
    assert joined.total + free.total == SIZE


@given(intervals, intervals)
def test_contributions_give_each_nanosecond_to_the_earliest_start(pairs, hiding):
    pairs = sorted(pairs, key=lambda p: p[0])
    free, expected = ~bitmap(hiding), []
    taken = np.zeros(SIZE, bool)
    for start, end in pairs:
        mine = bitmap([(start, end)]) & ~taken
        taken |= mine
        expected.append((mine & free).sum())
    assert contributions(*arrays(pairs), union(*arrays(hiding))).tolist() == expected


@given(intervals, st.randoms(use_true_random=False))
def test_order_with_ties_does_not_depend_on_the_order_of_rows(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    ordered = []
    for rows in (pairs, shuffled):
        start, end = arrays(rows)
        by = order(start, end)
        ordered.append(list(zip(start[by].tolist(), end[by].tolist(), strict=True)))
    assert ordered[0] == ordered[1] == sorted(pairs)


def test_order_of_sorted_rows_copies_nothing():
    assert order(np.array([1, 2, 3])) == slice(None)
