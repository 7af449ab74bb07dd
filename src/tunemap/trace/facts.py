"""Facts of a trace: the exact partition of the window, and tidy tables that add up to it.

Definitions (all integers, nanoseconds, per process and device):

- window: from the start of the first to the end of the last kernel, copy or memset; or, on request, the training
  steps, from the start of the first step range to the end of the last one.
- compute, communication, copy: length of the union of the non-communication kernels, of the communication kernels,
  of copies and memsets. Streams do not matter: from PyTorch 2.8 on NCCL may run on the compute stream.
- compute + exposed communication + exposed copies + idle = window, exactly. Exposed communication is communication
  while nothing computes; exposed copies are copies while neither computes nor communicates.
- NCCL shares, three numbers with three names. time_sum: sum of the durations of communication kernels over that of
  all kernels (what is usually published); busy: communication over window; exposed: exposed communication over window.
- time_ns of a row is a sum of durations: overlapping kernels count twice. wall_ns is the row's part of the
  partition: of work that runs at the same time, what started first has it. The wall_ns of kernels add up to
  compute + exposed communication, those of copies to exposed copies, the gaps to idle.
- phase: of the host range around the launch, found by (process, correlation); `unattributed` where the capture has no
  launch or no range, so that phases always add up to the total.

Tables, one row per process and device and: `kernels` name; `categories` category; `phases` phase and category;
`collectives` type and process group, with transfer and waiting told apart where every rank is here; `copies` kind,
scope (host, local: within a device, peer: between devices), memory kinds and phase; `copy_timeline` kind, scope and
time bucket; `gaps` cause and phase; `apis` CUDA call (per process). `process` is an index into summary["processes"],
because neither a pid nor a device tells two ranks apart in every trace.

A trace without a GPU is treated the same way with the CPU as the device: operators are its kernels. One thing differs:
a thread can sit in an operator (a hook of autograd, an issuing call) until a collective is done. The own time of such
operators counts as computation only while no collective runs.
"""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from tunemap.trace.arrays import CPU_DEVICE, Array, Copies, Kernels, Trace
from tunemap.trace.categories import COMMUNICATION, Rules, load_rules
from tunemap.trace.host import Host
from tunemap.trace.intervals import contributions, gaps, join, order, union
from tunemap.trace.launches import copy_launches, kernel_launches, launch_facts
from tunemap.trace.ranks import Communications, collective_rows, imbalance
from tunemap.trace.tables import (
    COLUMNS,
    Categories,
    Table,
    api_rows,
    category_rows,
    copy_rows,
    copy_timeline_rows,
    gap_rows,
    kernel_rows,
    other_facts,
    phase_rows,
)

FORMAT_VERSION = 1

_Work = TypeVar("_Work", Kernels, Copies)


@dataclass(frozen=True)
class FactOptions:
    """What a user may choose."""

    bucket_ns: int = 100_000_000
    window: Literal["gpu", "steps"] = "gpu"
    world_size: int | None = None  # ranks of the job, for traces that do not say it


@dataclass(frozen=True)
class Facts:
    """`summary` goes to summary.json, each table to a file of its name."""

    summary: dict[str, Any]
    tables: dict[str, Table]


@dataclass
class _Collected:
    """Rows of all devices, while they are worked through."""

    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    devices: list[dict[str, Any]] = field(default_factory=list)
    communications: list[Communications] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compute_facts(trace: Trace, rules: Rules | None = None, options: FactOptions | None = None) -> Facts:
    """All facts of a trace. A trace without device work gives empty `devices` and a note that says why."""
    rules, options = rules or load_rules(), options or FactOptions()
    categories = Categories(trace, rules)
    result = _Collected(notes=list(trace.notes))
    host_phases: list[dict[str, Any]] = []
    for process in range(len(trace.processes)):
        host = Host(trace, process, rules)
        where = {"process": process, "pid": trace.processes[process].pid}
        host_phases += host.phase_rows(where)
        result.tables["apis"] += api_rows(where, host)
        kernels = np.flatnonzero(trace.kernels.process == process)
        copies = np.flatnonzero(trace.copies.process == process)
        kernel_device, copy_device = trace.kernels.device[kernels], trace.copies.device[copies]
        for device in np.unique(np.concatenate([kernel_device, copy_device])).tolist():
            rows = kernels[kernel_device == device], copies[copy_device == device]
            _device(trace, categories, host, options, where, device, rows, result)
    result.tables["collectives"] = collective_rows(trace, rules, result.communications, options.world_size)
    if any(row["assumed"] for row in result.tables["collectives"]):
        result.notes.append(
            f"world size unknown: waiting and transfer hold if the {len(result.communications)} ranks here are all"
        )
    summary = {
        "format_version": FORMAT_VERSION,
        "source": trace.source,
        "window": options.window,
        "bucket_ns": options.bucket_ns,
        "processes": [
            {"process": i, "trace": p.trace, "pid": p.pid, "rank": p.rank, "world_size": p.world_size}
            for i, p in enumerate(trace.processes)
        ],
        "devices": result.devices,
        "host_phases": host_phases,
        "imbalance": imbalance(result.devices),
        "notes": result.notes,
    }
    tables = {
        name: {column: [row.get(column) for row in result.tables[name]] for column in columns}
        for name, columns in COLUMNS.items()
    }
    return Facts(summary, tables)


def _device(
    trace: Trace,
    categories: Categories,
    host: Host,
    options: FactOptions,
    process: dict[str, Any],
    device: int,
    rows: tuple[Array, Array],
    result: _Collected,
) -> None:
    """Facts of one device of one process, added to `result`."""
    on_cpu = device == CPU_DEVICE
    where = process | {"device": "cpu" if on_cpu else device}
    kernels, copies = trace.kernels.take(rows[0]), trace.copies.take(rows[1])
    by_start = order(kernels.start_ns, kernels.end_ns, categories.rank(kernels.name), kernels.correlation)
    kernel_index, kernels = rows[0][by_start], kernels.take(by_start)
    copies = copies.take(order(copies.start_ns, copies.end_ns, copies.kind, copies.bytes, copies.correlation))
    begin, end, window = _window(kernels, copies, host, options, where, result.notes)
    if window == "steps":
        inside = (kernels.start_ns < end) & (kernels.end_ns > begin)
        if not inside.all():
            result.notes.append(f"{_label(where)}: {int((~inside).sum())} kernels outside of the steps were left out")
        kernel_index, kernels, copies = kernel_index[inside], _clip(kernels, begin, end), _clip(copies, begin, end)
        if len(kernels) + len(copies) == 0:
            return
    category = categories.of(kernels.name, on_cpu)
    communicates = category == categories.communication

    waits = categories.may_wait(category, on_cpu)
    computes = ~communicates & ~waits
    computing = union(kernels.start_ns[computes], kernels.end_ns[computes])
    communicating = union(kernels.start_ns[communicates], kernels.end_ns[communicates])
    copying = union(copies.start_ns, copies.end_ns)
    running = union(kernels.start_ns, kernels.end_ns) if waits.any() else join(computing, communicating)
    wall = np.empty(len(kernels), np.int64)
    for mine, hidden in ((computes, None), (communicates, computing), (waits, join(computing, communicating))):
        wall[mine] = contributions(kernels.start_ns[mine], kernels.end_ns[mine], hidden)
    copy_wall = contributions(copies.start_ns, copies.end_ns, running)
    idle = gaps(join(running, copying), begin, end)
    exposed = int(wall[communicates].sum())
    duration = kernels.end_ns - kernels.start_ns
    totals = {
        "window_ns": end - begin,
        "compute_ns": int(wall[~communicates].sum()),
        "communication_ns": communicating.total,
        "overlap_ns": communicating.total - exposed,
        "exposed_communication_ns": exposed,
        "copy_ns": copying.total,
        "exposed_copy_ns": int(copy_wall.sum()),
        "idle_ns": idle.total,
        "kernel_busy_ns": running.total,
        "kernel_count": int(kernels.counted.sum()),
        "kernel_time_sum_ns": int(duration.sum()),
        "communication_time_sum_ns": int(duration[communicates].sum()),
    }
    parts = sum(totals[k] for k in ("compute_ns", "exposed_communication_ns", "exposed_copy_ns", "idle_ns"))
    assert parts == totals["window_ns"], f"the partition of {_label(where)} is not exact: {totals}"

    launches, copy_launch = kernel_launches(host, kernels, on_cpu), copy_launches(host, copies)
    result.devices.append(
        _identity(trace, where, device)
        | {"window": window, "window_start_ns": begin, **_steps(host)}
        | _shares(totals, on_cpu)
        | {"launch": launch_facts(kernels, launches, on_cpu, totals["window_ns"])}
        | other_facts(categories, kernels, category, duration)
    )
    tables = result.tables
    tables["kernels"] += kernel_rows(where, categories, kernels, category, wall, on_cpu)
    tables["categories"] += category_rows(where, categories, kernels, category, wall)
    tables["phases"] += phase_rows(where, categories, host, kernels, category, launches.phase, wall)
    tables["copies"] += copy_rows(where, host, copies, copy_launch.phase, copy_wall)
    tables["copy_timeline"] += copy_timeline_rows(where, copies, begin, options.bucket_ns)
    tables["gaps"] += gap_rows(where, host, idle, kernels, launches, copies, copy_launch, on_cpu)
    if communicates.any():
        own = np.flatnonzero(communicates)
        result.communications.append(Communications.of(trace, where, device, kernels, kernel_index, own, wall))


def _label(where: dict[str, Any]) -> str:
    return f"pid {where['pid']} device {where['device']}"


def _window(
    kernels: Kernels, copies: Copies, host: Host, options: FactOptions, where: dict[str, Any], notes: list[str]
) -> tuple[int, int, str]:
    """(start_ns, end_ns, what it is)."""
    if options.window == "steps":
        if len(host.steps):
            return int(host.steps.start_ns.min()), int(host.steps.end_ns.max()), "steps"
        notes.append(f"{_label(where)}: no step ranges in this process; the window is the device work")
    starts = [part.start_ns[0] for part in (kernels, copies) if len(part)]
    ends = [part.end_ns.max() for part in (kernels, copies) if len(part)]
    return int(min(starts)), int(max(ends)), "gpu"


def _clip(rows: _Work, begin: int, end: int) -> _Work:
    kept = rows.take((rows.start_ns < end) & (rows.end_ns > begin))
    return dataclasses.replace(kept, start_ns=np.maximum(kept.start_ns, begin), end_ns=np.minimum(kept.end_ns, end))


def _identity(trace: Trace, where: dict[str, Any], device: int) -> dict[str, Any]:
    process = trace.processes[where["process"]]
    return where | {
        "trace": process.trace,
        "rank": process.rank,
        "device_name": process.device_names.get(device),
    }


def _steps(host: Host) -> dict[str, Any]:
    length = host.steps.end_ns - host.steps.start_ns
    if len(length) == 0:
        return {"step_count": 0, "step_median_ns": None}
    return {"step_count": len(length), "step_median_ns": int(np.median(length))}


def _shares(totals: dict[str, int], on_cpu: bool) -> dict[str, Any]:
    """The totals with the shares made from them; a share without a meaning is None, with its reason."""
    shares: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def share(name: str, part: int, whole: int, reason: str) -> None:
        shares[name] = part / whole if whole else None
        if not whole:
            reasons[name] = reason

    kernels, window = totals["kernel_time_sum_ns"], totals["window_ns"]
    share("nccl_time_sum_share", totals["communication_time_sum_ns"], kernels, "no kernel time in the window")
    share("nccl_busy_share", totals["communication_ns"], window, "the window is empty")
    share("nccl_exposed_share", totals["exposed_communication_ns"], window, "the window is empty")
    share("overlap_ratio", totals["overlap_ns"], totals["communication_ns"], f"no {COMMUNICATION} in the window")
    values: dict[str, Any] = totals | shares
    if on_cpu:
        values |= {"operator_count": totals["kernel_count"], "operator_time_sum_ns": totals["kernel_time_sum_ns"]}
        for name in ("kernel_count", "kernel_time_sum_ns"):
            values[name], reasons[name] = None, "no GPU in this trace: see operator_count and operator_time_sum_ns"
        for name in ("nccl_time_sum_share", "nccl_busy_share", "nccl_exposed_share"):
            values[name], reasons[name] = None, "no NCCL on a CPU: see communication_ns and exposed_communication_ns"
    return values | {"reasons": reasons}
