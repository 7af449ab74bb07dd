"""The host side of one process: which call launched what, in which phase, and when it sat in a blocking call."""

import heapq
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tunemap.trace.arrays import Array, Calls, Ranges, Trace
from tunemap.trace.categories import UNATTRIBUTED, Rules
from tunemap.trace.intervals import Spans, union

_BLOCKING = re.compile(
    r"^(cuda|hip)(Device|Stream|Event|Thread)Synchronize|^(cuda|hip)Memcpy$|^cu(Ctx|Stream|Event)Synchronize"
    r"|^(cuda|hip)(Free|Malloc|MallocHost|FreeHost|HostAlloc)$"
)


@dataclass(frozen=True)
class PhaseTimeline:
    """Which phase holds at which time: the innermost range, that is the one that started last."""

    edge: Array  # sorted times
    phase: Array  # code from this edge to the next, one more than phases for none

    def at(self, times: Array, none: int) -> Array:
        """Phase code at each time, `none` outside of all ranges."""
        if len(self.edge) == 0:
            return np.full(len(times), none, np.int16)
        index = np.searchsorted(self.edge, times, side="right") - 1
        return np.where(index < 0, none, self.phase[index]).astype(np.int16)


def flatten_ranges(start: Array, end: Array, code: Array, none: int) -> PhaseTimeline:
    """Nested or overlapping ranges to a timeline; at each time the range with the latest start that is still open."""
    rows = np.lexsort((-end, start))
    pending = list(zip(start[rows].tolist(), end[rows].tolist(), code[rows].tolist(), strict=True))
    edges: list[int] = []
    phases: list[int] = []
    open_ranges: list[tuple[int, int, int]] = []  # (-start, end, code): the latest start first, then the shorter one
    at = 0
    for time in np.unique(np.concatenate([start, end])).tolist():
        while at < len(pending) and pending[at][0] == time:
            begin, stop, phase = pending[at]
            heapq.heappush(open_ranges, (-begin, stop, phase))
            at += 1
        while open_ranges and open_ranges[0][1] <= time:
            heapq.heappop(open_ranges)
        edges.append(time)
        phases.append(open_ranges[0][2] if open_ranges else none)
    return PhaseTimeline(np.array(edges, np.int64), np.array(phases, np.int16))


class Host:
    """Calls and ranges of one process of a trace."""

    def __init__(self, trace: Trace, process: int, rules: Rules) -> None:
        self.calls: Calls = trace.calls.take(trace.calls.process == process)
        self.names = trace.names
        ranges = trace.ranges.take(trace.ranges.process == process)
        distinct = np.unique(ranges.name).tolist()
        self.phases = phase_labels(rules)
        self.none = len(self.phases) - 1
        code_of = {label: code for code, label in enumerate(self.phases)}
        phase_of = {i: code_of[label] for i in distinct if (label := rules.phase(trace.names[i])) is not None}
        step_names = [i for i in distinct if rules.is_step(trace.names[i])]
        self.steps: Ranges = ranges.take(np.isin(ranges.name, step_names))
        named = ranges.take(np.isin(ranges.name, list(phase_of)))
        self.phase_ranges = named
        self.phase_codes = np.array([phase_of[i] for i in named.name.tolist()], np.int16)
        shared = ~np.isin(self.phase_codes, [code_of[label] for label in rules.thread_phases])
        self._process_timeline = self._timeline(shared)
        self._thread_timelines = {
            thread: self._timeline(named.thread == thread) for thread in np.unique(named.thread).tolist()
        }

    def _timeline(self, rows: Array) -> PhaseTimeline:
        ranges = self.phase_ranges
        return flatten_ranges(ranges.start_ns[rows], ranges.end_ns[rows], self.phase_codes[rows], self.none)

    def phase_at(self, thread: Array, time: Array) -> Array:
        """Phase code of work that `thread` launched at `time`.

        A range of the same thread decides; without one, a range of any thread of the process does: autograd launches
        the backward pass from a thread of its own, where no range is open.
        """
        phase = self._process_timeline.at(time, self.none)
        for own, timeline in self._thread_timelines.items():
            rows = np.flatnonzero(thread == own)
            inside = timeline.at(time[rows], self.none)
            phase[rows] = np.where(inside == self.none, phase[rows], inside)
        return phase

    @cached_property
    def _by_correlation(self) -> tuple[int, Array] | tuple[None, tuple[Array, Array]]:
        """A dense table (lowest correlation, row or -1), or the sorted pairs where ids are too sparse for one."""
        rows = np.flatnonzero(self.calls.correlation > 0)
        keys, start = self.calls.correlation[rows], self.calls.start_ns[rows]
        if len(rows) == 0:
            return 0, np.empty(0, np.int32)
        low, high = int(keys.min()), int(keys.max())
        if high - low < max(1 << 20, 8 * len(rows)):
            table = np.full(high - low + 1, -1, np.int32)
            table[keys - low] = rows
            if not np.array_equal(table[keys - low], rows):  # several calls with one id: the earliest counts
                latest_first = np.argsort(-start, kind="stable")
                table[keys[latest_first] - low] = rows[latest_first]
            return low, table
        order = np.lexsort((start, keys))
        return None, (keys[order], rows[order])

    def launch_row(self, correlation: Array) -> Array:
        """Row of `calls` that launched each correlation, -1 where the capture does not have it."""
        low, found = self._by_correlation
        if low is None:
            keys, rows = found
            at = np.minimum(np.searchsorted(keys, correlation), len(keys) - 1)
            return np.where((keys[at] == correlation) & (correlation > 0), rows[at], -1)
        if len(found) == 0:
            return np.full(len(correlation), -1, np.int32)
        at = correlation - low
        valid = (at >= 0) & (at < len(found)) & (correlation > 0)
        return np.where(valid, found[np.where(valid, at, 0)], np.int32(-1))

    def phase_rows(self, where: dict[str, Any]) -> list[dict[str, Any]]:
        """Host time in the ranges of each phase; nested ranges of one phase count once."""
        rows = []
        for code in np.unique(self.phase_codes).tolist():
            own = self.phase_ranges.take(self.phase_codes == code)
            spans = union(own.start_ns, own.end_ns)
            rows.append(where | {"phase": self.phases[code], "range_count": len(spans), "time_ns": spans.total})
        return rows

    @cached_property
    def blocking(self) -> Spans:
        """When some thread of the process sat in a call that waits for the device."""
        distinct = np.unique(self.calls.name).tolist()
        rows = np.isin(self.calls.name, [i for i in distinct if _BLOCKING.search(self.names[i])])
        return union(self.calls.start_ns[rows], self.calls.end_ns[rows])


def phase_labels(rules: Rules) -> tuple[str, ...]:
    """Every phase in the order of the rules, then `unattributed`."""
    return (*dict.fromkeys(rule.label for rule in rules.phases), UNATTRIBUTED)
