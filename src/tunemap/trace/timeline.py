"""One step of a capture on each device, as a table small enough to draw: what ran when, and when nothing did.

The step is the middle one of those that the trace has: a step range, or where a trace has none, from the end of one
optimizer phase to the end of the next. Each row is an interval of a lane, in nanoseconds since the step began on its
rank. `time_ns` is how much of the interval its `name` filled: the rest is what the eye could not tell apart.

    step            one row, named by the step's place in the trace; `time_ns` is the time in which anything ran
    phase           where the host was: forward, backward, optimizer, ...
    work            the category of operators, communication aside, that took most of the interval
    operator        the `LONGEST` operators of the step, by name
    communication   collectives, by type
    copy            copies and memsets
    gap             nothing ran; named by the phase in which the gap began

A step is cut into `BINS` equal parts. In `phase` and `work` each part has the name that holds most of it; in the
others intervals are joined across gaps narrower than a part, and gaps narrower than a part have no row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tunemap.trace.arrays import CPU_DEVICE, Array, Copies, Kernels, Trace
from tunemap.trace.categories import Rules, load_rules, short_name
from tunemap.trace.host import Host
from tunemap.trace.intervals import Spans, gaps, union
from tunemap.trace.tables import Categories, Table

COLUMNS = ("process", "rank", "device", "lane", "name", "start_ns", "end_ns", "time_ns")
BINS = 600
LONGEST = 5

_Interval = tuple[str, str, int, int, int]


def step_timeline(trace: Trace) -> Table:
    """The middle step of each process on each of its devices; no rows for a process whose ranges name no step."""
    rules = load_rules()
    categories = Categories(trace, rules)
    rows: list[tuple[Any, ...]] = []
    for process, described in enumerate(trace.processes):
        host = Host(trace, process, rules)
        steps = _steps(host)
        if len(steps) == 0:
            continue
        kernels = trace.kernels.take(trace.kernels.process == process)
        copies = trace.copies.take(trace.copies.process == process)
        for device in np.union1d(kernels.device, copies.device).tolist():
            where = (process, described.rank, "cpu" if device == CPU_DEVICE else device)
            own = kernels.take(kernels.device == device), copies.take(copies.device == device)
            rows += [(*where, *found) for found in _device(host, steps, categories, rules, *own)]
    return {column: [row[place] for row in rows] for place, column in enumerate(COLUMNS)}


def _steps(host: Host) -> Spans:
    """Step ranges; without any, what lies between the ends of optimizer phases, of which the first has no beginning."""
    if len(host.steps):
        by_start = np.argsort(host.steps.start_ns, kind="stable")
        return Spans(host.steps.start_ns[by_start], host.steps.end_ns[by_start])
    updates = host.phase_ranges.take(host.phase_codes == host.phases.index("optimizer"))
    ends = union(updates.start_ns, updates.end_ns).end
    return Spans(ends[:-1], ends[1:])


def _device(
    host: Host, steps: Spans, categories: Categories, rules: Rules, kernels: Kernels, copies: Copies
) -> Iterator[_Interval]:
    number = (len(steps) - 1) // 2
    begin, length = int(steps.start[number]), int(steps.end[number] - steps.start[number])
    edges = np.unique(np.linspace(0, length, BINS + 1).astype(np.int64))
    narrow = max(1, length // BINS)

    def spans(rows: Kernels | Copies, chosen: Array | slice = slice(None)) -> Spans:
        start, end = rows.start_ns[chosen] - begin, rows.end_ns[chosen] - begin
        return union(np.maximum(start, 0), np.minimum(end, length))

    inside = (kernels.start_ns < begin + length) & (kernels.end_ns > begin)
    kernels = kernels.take(inside)
    on_cpu = bool(len(kernels)) and int(kernels.device[0]) == CPU_DEVICE
    category = categories.of(kernels.name, on_cpu)
    communicates = category == categories.communication
    busy = union(*(np.concatenate(part) for part in zip(_ends(spans(kernels)), _ends(spans(copies)), strict=True)))

    yield "step", str(number + 1), 0, length, busy.total
    yield from _dominant("phase", edges, _phase_spans(host, edges + begin, begin))
    work = {
        categories.labels[code]: spans(kernels, category == code)
        for code in np.unique(category[~communicates]).tolist()
    }
    yield from _dominant("work", edges, {name: found for name, found in work.items() if len(found)})
    names = [categories.names[i] for i in kernels.name.tolist()]
    brief = np.array([short_name(name) for name in names], object)
    times = {name: int(spans(kernels, (brief == name) & ~communicates).total) for name in set(brief[~communicates])}
    for name in sorted(times, key=lambda one: (-times[one], one))[:LONGEST]:
        yield from _joined("operator", name, spans(kernels, (brief == name) & ~communicates), narrow)
    kinds = np.array([rules.collective(name) for name in names], object)
    for kind in sorted(set(kinds[communicates])):
        yield from _joined("communication", kind, spans(kernels, communicates & (kinds == kind)), narrow)
    yield from _joined("copy", "copy", spans(copies), narrow)
    idle = gaps(busy, 0, length)
    wide = idle.end - idle.start >= narrow
    starts, ends = idle.start[wide], idle.end[wide]
    phases = host.phase_at(np.full(len(starts), -1), starts + begin)
    for phase, start, end in zip(phases.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield "gap", host.phases[phase], start, end, end - start


def _ends(spans: Spans) -> tuple[Array, Array]:
    return spans.start, spans.end


def _phase_spans(host: Host, times: Array, begin: int) -> dict[str, Spans]:
    """Each phase with the parts of a step whose middle lies in it."""
    middles = (times[:-1] + times[1:]) // 2
    codes = host.phase_at(np.full(len(middles), -1), middles)
    return {
        host.phases[code]: union(times[:-1][codes == code] - begin, times[1:][codes == code] - begin)
        for code in np.unique(codes).tolist()
    }


def _dominant(lane: str, edges: Array, named: dict[str, Spans]) -> Iterator[_Interval]:
    """Runs of parts in which the same name takes most time; parts that are mostly empty are left out."""
    if not named:
        return
    covered = np.array([np.diff(found.covered_before(edges)) for found in named.values()])
    anything = union(*(np.concatenate(part) for part in zip(*map(_ends, named.values()), strict=True)))
    empty = np.diff(edges) - np.diff(anything.covered_before(edges))
    labels = [None, *named]
    most = np.argmax(np.vstack([empty, covered]), axis=0)
    changes = np.flatnonzero(np.diff(most)) + 1
    for first, last in zip([0, *changes.tolist()], [*changes.tolist(), len(most)], strict=True):
        name = labels[int(most[first])]
        if name is not None:
            time = int(covered[int(most[first]) - 1, first:last].sum())
            yield lane, name, int(edges[first]), int(edges[last]), time


def _joined(lane: str, name: str, found: Spans, narrow: int) -> Iterator[_Interval]:
    """The intervals of one name, joined across gaps shorter than `narrow`."""
    wide = union(found.start, found.end + narrow)
    ends = wide.end - narrow
    times = found.covered_before(ends) - found.covered_before(wide.start)
    for start, end, time in zip(wide.start.tolist(), ends.tolist(), times.tolist(), strict=True):
        yield lane, name, start, end, time
