"""The rows of the fact tables of one device; definitions of their columns are in `tunemap.trace.facts`."""

from typing import Any

import numpy as np

from tunemap.errors import UserError
from tunemap.trace.arrays import COPY_KINDS, CPU_DEVICE, MEMORY_KINDS, MEMSET, Array, Copies, Kernels, Trace, dense
from tunemap.trace.categories import COMMUNICATION, OTHER, Rules, short_name
from tunemap.trace.host import Host
from tunemap.trace.intervals import Spans
from tunemap.trace.launches import Launches

Table = dict[str, list[Any]]
"""Columns of equal length."""

Row = dict[str, Any]

_DEVICE = ("process", "pid", "device")
_COPY = (*_DEVICE, "kind", "scope")

COLUMNS: dict[str, tuple[str, ...]] = {
    "kernels": (*_DEVICE, "name", "short_name", "category", "count", "time_ns", "wall_ns", "min_ns", "median_ns",
                "max_ns"),
    "categories": (*_DEVICE, "category", "count", "time_ns", "wall_ns", "time_share"),
    "phases": (*_DEVICE, "phase", "category", "count", "time_ns", "wall_ns"),
    "collectives": (*_DEVICE, "collective", "group", "count", "time_ns", "wall_ns", "mean_ns", "max_ns", "bytes",
                    "transfer_ns", "waiting_ns", "rank_count", "reason"),
    "copies": (*_COPY, "from_memory", "to_memory", "from_device", "to_device", "phase", "count", "bytes", "time_ns",
               "wall_ns"),
    "copy_timeline": (*_COPY, "from_device", "to_device", "bucket_start_ns", "count", "bytes", "time_ns"),
    "gaps": (*_DEVICE, "cause", "phase", "count", "time_ns", "max_ns"),
    "apis": ("process", "pid", "name", "count", "time_ns", "mean_ns", "median_ns", "max_ns"),
}  # fmt: skip
"""Every table with its columns, in order."""

SHORT_GAP_NS = 5_000
"""Up to here a gap before work that was already launched is the hardware's own pause, not a wait."""

_MOST_BUCKETS = 1_000_000

_PEER_COPY, _DEVICE_COPY = 10, 8
_HOST_COPIES = (1, 2, 3, 4, 9, 11, 12)


class Categories:
    """The category of every name that a kernel has, each classified once."""

    def __init__(self, trace: Trace, rules: Rules) -> None:
        self.names = trace.names
        used = np.zeros(len(trace.names), bool)
        used[trace.kernels.name] = True
        on_cpu = bool((trace.kernels.device == CPU_DEVICE).any())
        self._gpu = np.zeros(len(trace.names), np.int16)
        self._cpu = np.zeros(len(trace.names), np.int16)
        gpu = {i: rules.kernel_category(trace.names[i]) for i in np.flatnonzero(used).tolist()}
        cpu = {i: rules.operator_category(trace.names[i]) for i in gpu} if on_cpu else {}
        self.labels = sorted({COMMUNICATION, OTHER, *gpu.values(), *cpu.values()})
        code_of = {label: code for code, label in enumerate(self.labels)}
        self.communication, self.other = code_of[COMMUNICATION], code_of[OTHER]
        for codes, labels in ((self._gpu, gpu), (self._cpu, cpu)):
            codes[list(labels)] = [code_of[label] for label in labels.values()]
        self._rank = np.zeros(len(trace.names), np.int32)
        self._rank[sorted(gpu, key=trace.names.__getitem__)] = np.arange(len(gpu))
        self._waits = np.isin(self.labels, list(rules.waiting_categories))

    def rank(self, name: Array) -> Array:
        """Position of each name in alphabetical order: what settles ties, whatever order the file has."""
        return self._rank[name]

    def may_wait(self, category: Array, on_cpu: bool) -> Array:
        """Which rows are operators whose own time may be waiting for a collective; kernels never are."""
        return self._waits[category] if on_cpu else np.zeros(len(category), bool)

    def of(self, name: Array, on_cpu: bool) -> Array:
        """Category codes (into `labels`) of name indices."""
        return (self._cpu if on_cpu else self._gpu)[name]


def sums(keys: Array, size: int, weights: Array) -> Array:
    """Exact integer sums by key: a double holds every integer up to 2**53 ns, 104 days."""
    return np.rint(np.bincount(keys, weights, size)).astype(np.int64)


def kernel_rows(
    where: Row, categories: Categories, kernels: Kernels, category: Array, wall: Array, on_cpu: bool
) -> list[Row]:
    """One row per kernel name, longest first. Operators come in pieces, so that they have no single durations."""
    if len(kernels) == 0:
        return []
    names, key = dense(kernels.name)
    duration = kernels.end_ns - kernels.start_ns
    count = np.bincount(key[kernels.counted], minlength=len(names))
    total, wall_ns = sums(key, len(names), duration), sums(key, len(names), wall)
    code = np.zeros(len(names), np.int16)
    code[key] = category
    low, middle, high = _spread(key, duration, len(names))
    return [
        where
        | {
            "name": categories.names[int(names[i])],
            "short_name": short_name(categories.names[int(names[i])]),
            "category": categories.labels[int(code[i])],
            "count": int(count[i]),
            "time_ns": int(total[i]),
            "wall_ns": int(wall_ns[i]),
            "min_ns": None if on_cpu else int(low[i]),
            "median_ns": None if on_cpu else float(middle[i]),
            "max_ns": None if on_cpu else int(high[i]),
        }
        for i in sorted(range(len(names)), key=lambda i: (-total[i], categories.names[int(names[i])]))
    ]


def _spread(key: Array, duration: Array, size: int) -> tuple[Array, Array, Array]:
    """(min, median, max) by key, every key occurring at least once.

    Key and duration are packed into one integer, because sorting integers is many times faster than lexsort.
    """
    bits = int(duration.max()).bit_length()
    if bits + size.bit_length() < 63:
        ordered = np.sort((key.astype(np.int64) << bits) | duration) & ((1 << bits) - 1)
    else:
        ordered = duration[np.lexsort((duration, key))]
    count = np.bincount(key, minlength=size)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    last = first + count - 1
    middle = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) / 2
    return ordered[first], middle, ordered[last]


def category_rows(where: Row, categories: Categories, kernels: Kernels, category: Array, wall: Array) -> list[Row]:
    """One row per category that occurs, longest first; `time_share` is of the kernel time of the device."""
    size = len(categories.labels)
    duration = kernels.end_ns - kernels.start_ns
    pieces, count = np.bincount(category, minlength=size), np.bincount(category[kernels.counted], minlength=size)
    total, wall_ns = sums(category, size, duration), sums(category, size, wall)
    whole = int(total.sum())
    return [
        where
        | {
            "category": categories.labels[i],
            "count": int(count[i]),
            "time_ns": int(total[i]),
            "wall_ns": int(wall_ns[i]),
            "time_share": int(total[i]) / whole if whole else None,
        }
        for i in np.argsort(-total, kind="stable").tolist()
        if pieces[i]
    ]


def other_facts(categories: Categories, kernels: Kernels, category: Array, duration: Array) -> Row:
    """How much time no rule knows, and whose it is: the check on the rules that every summary carries."""
    unknown = category == categories.other
    whole = int(duration.sum())
    by_name: dict[str, int] = {}
    if unknown.any():
        names, key = dense(kernels.name[unknown])
        total = sums(key, len(names), duration[unknown])
        top = np.argsort(-total, kind="stable")[:5].tolist()
        by_name = {categories.names[int(names[i])]: int(total[i]) for i in top}
    return {
        "other_time_share": int(duration[unknown].sum()) / whole if whole else None,
        "other_top_ns": by_name,
    }


def phase_rows(
    where: Row,
    categories: Categories,
    host: Host,
    kernels: Kernels,
    category: Array,
    phase: Array,
    wall: Array,
) -> list[Row]:
    """One row per phase and category; they sum to the totals of the device, `unattributed` included."""
    width = len(categories.labels)
    key = phase.astype(np.int64) * width + category
    size = len(host.phases) * width
    duration = kernels.end_ns - kernels.start_ns
    pieces, count = np.bincount(key, minlength=size), np.bincount(key[kernels.counted], minlength=size)
    total, wall_ns = sums(key, size, duration), sums(key, size, wall)
    return [
        where
        | {
            "phase": host.phases[i // width],
            "category": categories.labels[i % width],
            "count": int(count[i]),
            "time_ns": int(total[i]),
            "wall_ns": int(wall_ns[i]),
        }
        for i in np.flatnonzero(pieces).tolist()
    ]


# -- copies ----------------------------------------------------------------------------------------------------


def _scope(copies: Copies) -> Array:
    """0 host (host and device), 1 local (within one device), 2 peer (between devices).

    A device-to-device copy whose two devices differ is a peer copy even where CUPTI calls it DtoD.
    """
    apart = (copies.source_device >= 0) & (copies.target_device >= 0) & (copies.source_device != copies.target_device)
    peer = (copies.kind == _PEER_COPY) | ((copies.kind == _DEVICE_COPY) & apart)
    return np.where(peer, 2, np.where(np.isin(copies.kind, _HOST_COPIES), 0, 1))


_SCOPES = ("host", "local", "peer")


def _copy_columns(copies: Copies) -> list[Array]:
    """What tells copies apart: kind, scope, and for peer copies the two devices."""
    scope = _scope(copies)
    ends = [np.where(scope == 2, end, -1) for end in (copies.source_device, copies.target_device)]
    return [copies.kind, scope, *ends]


def _copy_labels(kind: int, scope: int, source: int, target: int) -> Row:
    return {
        "kind": COPY_KINDS.get(kind, "unknown"),
        "scope": _SCOPES[scope],
        "from_device": None if source < 0 else source,
        "to_device": None if target < 0 else target,
    }


def _groups(columns: list[Array]) -> tuple[Array, Array]:
    """The distinct rows (n, columns) in lexicographic order, and for each row of the columns its position among them.

    What np.unique(axis=0) gives, without its slow comparison of whole rows.
    """
    key = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, position = dense(column)
        key = key * len(values) + position
    distinct, group = dense(key)
    example = np.empty(len(distinct), np.int64)
    example[group] = np.arange(len(group))
    return np.stack([column[example].astype(np.int64) for column in columns], axis=1), group


def copy_rows(where: Row, host: Host, copies: Copies, phase: Array, wall: Array) -> list[Row]:
    """One row per kind, scope, memory kinds, peer devices and phase; memsets are kind `memset`."""
    if len(copies) == 0:
        return []
    columns = [*_copy_columns(copies), copies.source_memory, copies.target_memory, phase]
    distinct, key = _groups(columns)
    size = len(distinct)
    count = np.bincount(key, minlength=size)
    volume, total = sums(key, size, copies.bytes), sums(key, size, copies.end_ns - copies.start_ns)
    wall_ns = sums(key, size, wall)
    return [
        where
        | _copy_labels(*distinct[i, :4].tolist())
        | {
            "from_memory": MEMORY_KINDS.get(int(distinct[i, 4]), "unknown"),
            "to_memory": MEMORY_KINDS.get(int(distinct[i, 5]), "unknown"),
            "phase": host.phases[int(distinct[i, 6])],
            "count": int(count[i]),
            "bytes": int(volume[i]),
            "time_ns": int(total[i]),
            "wall_ns": int(wall_ns[i]),
        }
        for i in range(size)
    ]


def copy_timeline_rows(where: Row, copies: Copies, begin: int, bucket_ns: int) -> list[Row]:
    """Copies over time: one row per kind and bucket that has any; `bucket_start_ns` counts from the window's start.

    A copy that crosses a bucket's border is divided in proportion to time, rounded so that bytes and time still sum
    exactly; it is counted where it starts. Memsets move nothing between memories and are left out.
    """
    copies = copies.take(copies.kind != MEMSET)
    if len(copies) == 0:
        return []
    first = (copies.start_ns - begin) // bucket_ns
    last = np.maximum(copies.end_ns - 1 - begin, copies.start_ns - begin) // bucket_ns
    parts = last - first + 1
    if parts.sum() > 10 * len(copies) + _MOST_BUCKETS:
        raise UserError(
            f"--bucket-ms {bucket_ns / 1e6:g}: copies would fall into {int(parts.sum())} buckets; choose a larger one"
        )
    row = np.repeat(np.arange(len(copies)), parts)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    bucket = first[row] + piece
    start, end = copies.start_ns[row], copies.end_ns[row]
    low = np.maximum(start, begin + bucket * bucket_ns)
    high = np.minimum(end, begin + (bucket + 1) * bucket_ns)
    share = copies.bytes[row].copy()
    split = np.flatnonzero(parts[row] > 1)
    share[split] = [
        size * (b - s) // (e - s) - size * (a - s) // (e - s)
        for size, s, e, a, b in zip(*(column[split].tolist() for column in (share, start, end, low, high)), strict=True)
    ]
    columns = [*(column[row] for column in _copy_columns(copies)), bucket]
    distinct, key = _groups(columns)
    size = len(distinct)
    count, volume, time = (
        np.bincount(key[piece == 0], minlength=size),
        sums(key, size, share),
        sums(key, size, high - low),
    )
    return [
        where
        | _copy_labels(*distinct[i, :4].tolist())
        | {
            "bucket_start_ns": int(distinct[i, 4]) * bucket_ns,
            "count": int(count[i]),
            "bytes": int(volume[i]),
            "time_ns": int(time[i]),
        }
        for i in range(size)
    ]


# -- gaps and calls --------------------------------------------------------------------------------------------

GAP_CAUSES = ("host", "host_sync", "queued", "short", "unknown", "end")
"""host: the next work was launched after the gap began: the device ran dry. host_sync: the same, and the host sat in a
blocking call at that moment. queued: it was launched before, and waited for an event, a stream or another rank.
short: the same, for at most `SHORT_GAP_NS`. unknown: the capture has no launch of it. end: nothing follows."""


def gap_rows(
    where: Row,
    host: Host,
    idle: Spans,
    kernels: Kernels,
    launches: Launches,
    copies: Copies,
    copy_launch: Launches,
    on_cpu: bool,
) -> list[Row]:
    """One row per cause and phase; the phase is that of the launch that ends the gap, on a CPU that of its start."""
    if len(idle) == 0:
        return []
    begins = np.concatenate([kernels.start_ns, copies.start_ns])
    at = np.searchsorted(idle.end, begins)
    ends_gap = np.flatnonzero(idle.end[np.minimum(at, len(idle) - 1)] == begins)
    known, called, phases = (
        np.concatenate([getattr(launches, name), getattr(copy_launch, name)])[ends_gap]
        for name in ("known", "start_ns", "phase")
    )
    # of several that start together, the one that was launched first; unknown launches last
    rows = np.lexsort((phases, called, ~known, at[ends_gap]))
    gap, first = np.unique(at[ends_gap][rows], return_index=True)
    follows = np.zeros(len(idle), bool)
    follows[gap] = True
    following = np.zeros(len(idle), np.int64)
    following[gap] = rows[first]
    known, called, phase = (v[following] if len(v) else np.zeros(len(idle), v.dtype) for v in (known, called, phases))
    length = idle.end - idle.start
    late = called >= idle.start
    cause = np.select(
        [~follows, ~known, late & host.blocking.contains(idle.start), late, length <= SHORT_GAP_NS],
        [GAP_CAUSES.index(c) for c in ("end", "unknown", "host_sync", "host", "short")],
        GAP_CAUSES.index("queued"),
    )
    phase = np.where(follows, phase, host.none)
    if on_cpu:
        phase = host.phase_at(np.full(len(idle), -1), idle.start)
    width = len(host.phases)
    key = cause * width + phase
    size = len(GAP_CAUSES) * width
    count, total = np.bincount(key, minlength=size), sums(key, size, length)
    longest = np.zeros(size, np.int64)
    np.maximum.at(longest, key, length)
    return [
        where
        | {
            "cause": GAP_CAUSES[i // width],
            "phase": host.phases[i % width],
            "count": int(count[i]),
            "time_ns": int(total[i]),
            "max_ns": int(longest[i]),
        }
        for i in np.flatnonzero(count).tolist()
    ]


def api_rows(where: Row, host: Host) -> list[Row]:
    """One row per CUDA call of the process, longest total first."""
    if len(host.calls) == 0:
        return []
    names, key = dense(host.calls.name)
    duration = host.calls.end_ns - host.calls.start_ns
    count, total = np.bincount(key, minlength=len(names)), sums(key, len(names), duration)
    _, middle, high = _spread(key, duration, len(names))
    return [
        where
        | {
            "name": host.names[int(names[i])],
            "count": int(count[i]),
            "time_ns": int(total[i]),
            "mean_ns": int(total[i]) / int(count[i]),
            "median_ns": float(middle[i]),
            "max_ns": int(high[i]),
        }
        for i in sorted(range(len(names)), key=lambda i: (-total[i], host.names[int(names[i])]))
    ]
