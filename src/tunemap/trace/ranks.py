"""Across ranks: how much of a collective is transfer and how much is waiting, and who is slower than the others.

A collective ends on all ranks together, but a rank that arrives early sits in its kernel until the last one comes.
The n-th call on one rank belongs to the n-th call on the others, so its transfer time is the shortest duration over
the ranks, and what a rank spends beyond that is waiting (the definition of TraceLens' NcclAnalyser). It needs every
rank: with one missing, the last arrival may be the missing one. Where the ranks cannot be matched, the reason is in
the row and the two numbers are empty.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunemap.trace.arrays import CPU_DEVICE, Array, Kernels, Trace
from tunemap.trace.categories import Rules

IMBALANCE_METRICS = (
    "compute_ns",
    "communication_ns",
    "exposed_communication_ns",
    "exposed_copy_ns",
    "idle_ns",
    "window_ns",
)


@dataclass(frozen=True)
class Communications:
    """The communication kernels of one device of one process, in order of start."""

    where: dict[str, Any]
    device: int
    name: Array  # index into Trace.names
    start_ns: Array
    end_ns: Array
    wall_ns: Array
    group: Array  # index into Trace.groups, -1 unknown
    bytes: Array  # given to the collective by this rank, -1 unknown

    @classmethod
    def of(
        cls,
        trace: Trace,
        where: dict[str, Any],
        device: int,
        kernels: Kernels,
        kernel_index: Array,
        own: Array,
        wall: Array,
    ) -> "Communications":
        """`own`: which of `kernels` communicate; `kernel_index`: their rows in `trace.kernels`."""
        group, size = np.full(len(own), -1, np.int64), np.full(len(own), -1, np.int64)
        if len(trace.messages):
            described = np.argsort(trace.messages.kernel, kind="stable")
            sorted_rows = trace.messages.kernel[described]
            at = np.minimum(np.searchsorted(sorted_rows, kernel_index[own]), len(described) - 1)
            found = sorted_rows[at] == kernel_index[own]
            message = described[at]
            group = np.where(found, trace.messages.group[message], -1)
            size = np.where(found, trace.messages.in_bytes[message], -1)
        return cls(where, device, kernels.name[own], kernels.start_ns[own], kernels.end_ns[own], wall[own], group, size)


@dataclass(frozen=True)
class _Calls:
    """The calls of one collective in one group on one device."""

    where: dict[str, Any]
    device: int
    start_ns: Array
    end_ns: Array
    wall_ns: Array
    bytes: Array


def collective_rows(
    trace: Trace, rules: Rules, devices: Sequence[Communications], world_size: int | None = None
) -> list[dict[str, Any]]:
    """One row per device, collective and process group.

    `world_size` counts where a trace does not say it (nsys never does). Where nobody says it, the ranks at hand are
    taken for all, and the row is marked `assumed`.
    """
    calls: dict[tuple[str, int], list[_Calls]] = defaultdict(list)
    for d in devices:
        collectives = {int(i): rules.collective(trace.names[int(i)]) for i in np.unique(d.name)}
        labels = np.array([collectives[int(i)] for i in d.name])
        for collective in dict.fromkeys(collectives.values()):
            for group in np.unique(d.group[labels == collective]).tolist():
                own = (labels == collective) & (d.group == group)
                calls[collective, group].append(
                    _Calls(d.where, d.device, d.start_ns[own], d.end_ns[own], d.wall_ns[own], d.bytes[own])
                )
    rows = []
    for (collective, group), members in calls.items():
        expected = _expected_ranks(trace, group, members) or world_size
        transfers, reason = _transfers(trace, members, expected)
        for position, member in enumerate(members):
            duration = member.end_ns - member.start_ns
            time_ns = int(duration.sum())
            transfer = None if transfers is None else int(transfers[position])
            rows.append(
                member.where
                | {
                    "collective": collective,
                    "group": None if group < 0 else trace.groups[group].name,
                    "count": len(duration),
                    "time_ns": time_ns,
                    "wall_ns": int(member.wall_ns.sum()),
                    "mean_ns": time_ns / len(duration),
                    "max_ns": int(duration.max()),
                    "bytes": int(member.bytes.sum()) if (member.bytes >= 0).all() else None,
                    "transfer_ns": transfer,
                    "waiting_ns": None if transfer is None else time_ns - transfer,
                    "rank_count": None if transfer is None else len(members),
                    "reason": reason,
                    "assumed": transfers is not None and expected is None,
                }
            )
    return sorted(rows, key=lambda row: (row["process"], str(row["device"]), -row["time_ns"], row["collective"]))


def _expected_ranks(trace: Trace, group: int, members: Sequence[_Calls]) -> int | None:
    """How many ranks take part, as far as the trace says it."""
    if group >= 0 and trace.groups[group].size is not None:
        return trace.groups[group].size
    sizes = {trace.processes[m.where["process"]].world_size for m in members}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _transfers(trace: Trace, members: Sequence[_Calls], expected: int | None) -> tuple[list[int] | None, str | None]:
    """Transfer time for each member, or None and the reason."""
    if expected is not None and len(members) != expected:
        return None, f"needs every rank: {len(members)} of {expected} are here"
    if len(members) < 2:
        return None, "needs every rank: only one is here"
    counts = [len(m.start_ns) for m in members]
    if len(set(counts)) > 1:
        return None, f"the ranks have different numbers of calls ({min(counts)} to {max(counts)})"
    same_clock = len({trace.processes[m.where["process"]].trace for m in members}) == 1
    totals = [0] * len(members)
    for start, end in _matched(members):
        if same_clock and bool((start.max(axis=0) > end.min(axis=0)).any()):
            return None, "matched calls do not overlap in time: more than one process group?"
        shortest = (end - start).min(axis=0)
        totals = [total + int(shortest.sum()) for total in totals]
    return totals, None


def _matched(members: Sequence[_Calls]) -> Iterator[tuple[Array, Array]]:
    """(start, end) arrays (ranks, calls) of calls that belong together.

    NCCL keeps the order of calls in a group. gloo runs them on several threads, so there only calls of one size
    are matched in order; when sizes do not agree between ranks, order alone decides.
    """
    sizes = [np.sort(m.bytes) for m in members]
    by_size = members[0].device == CPU_DEVICE and all(np.array_equal(sizes[0], s) for s in sizes[1:])
    keys = np.unique(sizes[0]).tolist() if by_size else [None]
    for key in keys:
        own = [np.ones(len(m.bytes), bool) if key is None else m.bytes == key for m in members]
        yield (
            np.stack([m.start_ns[o] for m, o in zip(members, own, strict=True)]),
            np.stack([m.end_ns[o] for m, o in zip(members, own, strict=True)]),
        )


def imbalance(devices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each part of the partition its spread over the devices; empty for a single device.

    `max_over_mean` is the usual load imbalance: 1 when all are equal.
    """
    if len(devices) < 2:
        return []
    rows = []
    for metric in IMBALANCE_METRICS:
        values = [d[metric] for d in devices]
        mean = sum(values) / len(values)
        slowest = devices[values.index(max(values))]
        rows.append(
            {
                "metric": metric,
                "min": min(values),
                "mean": mean,
                "max": max(values),
                "max_over_mean": max(values) / mean if mean else None,
                "max_process": slowest["process"],
                "max_device": slowest["device"],
            }
        )
    return rows
