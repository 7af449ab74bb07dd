"""Reports of several nodes on one clock: each begins at its own zero, and the clocks of nodes differ.

An nsys report says when it began in UTC, which puts reports beside each other as well as the nodes' clocks agree:
milliseconds, where collectives take microseconds. What ends on all ranks together tells the rest: the n-th allreduce
on one node ends with the n-th one on another, so the median difference of such ends is what the clocks are apart. It is
the end that counts, since a rank that arrives early waits inside of its kernel. Durations are never touched.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunemap.trace.arrays import Array, Trace
from tunemap.trace.categories import COMMUNICATION, Rules

TOGETHER = ("allreduce", "allgather", "reducescatter", "alltoall")  # no rank can end before the last has come
FEWEST = 3  # matched ends
LOOSEST_NS = 1_000_000  # of matched ends, median; what is further apart does not belong together


def on_one_clock(traces: Sequence[Trace], rules: Rules) -> list[Trace]:
    """The reports on the clock of the first one; as they are where one does not say when it began.

    A note of each report says what it was shifted by and how far the matched ends still are apart.
    """
    if len(traces) < 2 or any(trace.began_ns is None for trace in traces):
        return list(traces)
    first = traces[0]
    anchors = _ends(first, rules)
    aligned = [first]
    for trace in traces[1:]:
        by_utc = int(trace.began_ns or 0) - int(first.began_ns or 0)
        apart = _apart(anchors, {key: ends + by_utc for key, ends in _ends(trace, rules).items()})
        name = trace.processes[0].trace if trace.processes else "a report"
        correction = round(float(np.median(apart))) if len(apart) >= FEWEST else 0
        left_ns = float(np.median(np.abs(apart - correction))) if len(apart) >= FEWEST else np.inf
        if left_ns > LOOSEST_NS:
            correction = 0
            note = f"{name}: beside the first report by its start in UTC alone, as well as the nodes' clocks agree"
        else:
            note = (
                f"{name}: its clock was {correction / 1e3:.1f} µs ahead of the first report's, by the ends of "
                f"{len(apart)} collectives; after the shift they are {left_ns / 1e3:.1f} µs apart (median)"
            )
        aligned.append(_shifted(trace, by_utc - correction, note))
    return aligned


def _ends(trace: Trace, rules: Rules) -> dict[tuple[str, int], Array]:
    """Ends of the collectives of a report, by kind and number of the process in it, in order."""
    kinds = {index: rules.collective(name) for index, name in enumerate(trace.names) if _communicates(name, rules)}
    codes = np.array([index for index, kind in kinds.items() if kind in TOGETHER], np.int64)
    own = trace.kernels.take(np.isin(trace.kernels.name, codes))
    found: dict[tuple[str, int], Array] = {}
    for kind in TOGETHER:
        named = np.isin(own.name, [index for index, label in kinds.items() if label == kind])
        for process in np.unique(own.process[named]).tolist():
            found[kind, process] = np.sort(own.end_ns[named & (own.process == process)])
    return found


def _communicates(name: str, rules: Rules) -> bool:
    return rules.kernel_category(name) == COMMUNICATION


def _apart(first: dict[tuple[str, int], Array], other: dict[tuple[str, int], Array]) -> Array:
    """Differences of ends that belong together: of one kind, where two processes have the same number of them."""
    differences = []
    for kind in TOGETHER:
        pairs = (
            (ends, others)
            for (label, _), ends in first.items()
            for (other_label, _), others in other.items()
            if label == other_label == kind and len(ends) == len(others)
        )
        ends, others = next(pairs, (np.empty(0), np.empty(0)))
        differences.append(others - ends)
    return np.concatenate(differences)


def _shifted(trace: Trace, shift_ns: int, note: str) -> Trace:
    """The same events `shift_ns` later."""
    parts: dict[str, Any] = {}
    for name in ("kernels", "copies", "calls", "ranges"):
        rows = getattr(trace, name)
        parts[name] = dataclasses.replace(rows, start_ns=rows.start_ns + shift_ns, end_ns=rows.end_ns + shift_ns)
    return dataclasses.replace(trace, notes=(*trace.notes, note), **parts)
