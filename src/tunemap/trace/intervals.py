"""Interval algebra on sorted integer arrays: unions, coverage, gaps, and who accounts for which nanosecond.

Intervals are half-open [start, end), integers, and everything here is exact. A `Spans` is a union: sorted, disjoint,
not touching, none empty. Each operation costs one pass, or a binary search per query.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tunemap.trace.arrays import Array


@dataclass(frozen=True)
class Spans:
    """Disjoint, sorted, non-empty intervals that do not touch."""

    start: Array
    end: Array

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def _before(self) -> Array:
        """Total length of the intervals before each interval."""
        return np.concatenate([[0], np.cumsum(self.end - self.start)]).astype(np.int64)

    @property
    def total(self) -> int:
        """Sum of the lengths."""
        return int(self._before[-1])

    def covered_before(self, times: Array) -> Array:
        """For each time, how much of (-inf, time) the intervals cover."""
        if len(self) == 0:
            return np.zeros(len(times), np.int64)
        index = np.searchsorted(self.start, times, side="right") - 1
        inside = np.minimum(times, self.end[index]) - self.start[index]
        return np.where(index < 0, 0, self._before[index] + inside)

    def contains(self, times: Array) -> Array:
        """For each time, whether it lies in an interval."""
        if len(self) == 0:
            return np.zeros(len(times), bool)
        index = np.searchsorted(self.start, times, side="right") - 1
        return (index >= 0) & (times < self.end[index])


def order(start: Array, *ties: Array) -> Array | slice:
    """Rows in order of start, then of the `ties`; a plain slice when they already are, which costs no copy.

    With ties that tell all rows apart the result does not depend on the order of the rows in the file.
    """
    ascending = len(start) < 2 or bool(np.all(start[1:] >= start[:-1]))
    # Without ties to settle, equal starts must keep their order; with them a faster sort may shuffle those first.
    rows = np.arange(len(start)) if ascending else np.argsort(start, kind=None if ties else "stable")
    same = np.flatnonzero(start[rows[1:]] == start[rows[:-1]]) if ties else np.empty(0, np.int64)
    if len(same) == 0:
        return slice(None) if ascending else rows
    tied = np.union1d(same, same + 1)
    among = rows[tied]
    rows[tied] = among[np.lexsort((*(t[among] for t in reversed(ties)), start[among]))]
    return rows


def union(start: Array, end: Array) -> Spans:
    """The union of intervals in any order; empty and negative ones add nothing."""
    keep = end > start
    if not keep.all():
        start, end = start[keep], end[keep]
    if len(start) == 0:
        return Spans(np.empty(0, np.int64), np.empty(0, np.int64))
    rows = order(start)
    start, reach = start[rows], np.maximum.accumulate(end[rows])
    opens = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]]))
    closes = np.concatenate([opens[1:] - 1, [len(start) - 1]])
    return Spans(start[opens], reach[closes])


def join(*spans: Spans) -> Spans:
    """The union of unions."""
    return union(np.concatenate([s.start for s in spans]), np.concatenate([s.end for s in spans]))


def gaps(spans: Spans, start: int, end: int) -> Spans:
    """What [start, end) leaves uncovered; every span must lie within it."""
    return Spans(*_non_empty(np.concatenate([[start], spans.end]), np.concatenate([spans.start, [end]])))


def _non_empty(start: Array, end: Array) -> tuple[Array, Array]:
    keep = end > start
    return start[keep].astype(np.int64), end[keep].astype(np.int64)


def contributions(start: Array, end: Array, hidden_by: Spans | None = None) -> Array:
    """Nanoseconds that each interval adds to the union of the earlier ones, outside of `hidden_by`.

    `start` must be sorted. The sum is the length of the union minus what `hidden_by` covers of it, exactly, so the
    rows of any grouping add up to the partition of the window.
    """
    if len(start) == 0:
        return np.empty(0, np.int64)
    reach = np.maximum.accumulate(end)
    fresh = start.copy()
    np.maximum(start[1:], reach[:-1], out=fresh[1:])
    added = np.maximum(end - fresh, 0)
    if hidden_by is None or len(hidden_by) == 0:
        return added
    hidden = hidden_by.covered_before(fresh + added) - hidden_by.covered_before(fresh)
    return added - hidden
