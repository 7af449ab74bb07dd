"""The arrays that every trace is read into, whatever tool wrote it: one row per kernel, copy, API call and range.

Times are integer nanoseconds on the clock of the file, intervals are half-open [start_ns, end_ns). A row belongs to
a process (an index into `Trace.processes`), never to a device alone: with one visible GPU per rank every process
calls its device 0.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CPU_DEVICE = -1
"""Device of the rows of a trace without GPU work, where operators take the place of kernels."""

NO_CORRELATION = -1

MEMSET = 100
"""`Copies.kind` of a memset; the other values are CUPTI's copyKind."""

COPY_KINDS = {
    0: "unknown", 1: "htod", 2: "dtoh", 3: "htoa", 4: "atoh", 5: "atoa", 6: "atod", 7: "dtoa", 8: "dtod", 9: "htoh",
    10: "ptop", 11: "unified_htod", 12: "unified_dtoh", 13: "unified_dtod", MEMSET: "memset",
}  # fmt: skip
"""CUPTI's copyKind (cupti_activity.h, CUpti_ActivityMemcpyKind), kept here because old exports have no ENUM table."""

MEMORY_KINDS = {
    0: "pageable", 1: "pinned", 2: "device", 3: "array", 4: "managed", 5: "device_static", 6: "managed_static",
    7: "unknown",
}  # fmt: skip
"""nsys' memory kinds (ENUM_CUDA_MEM_KIND)."""

UNKNOWN_MEMORY = 7


Int16 = Annotated[Array, "int16"]
Int32 = Annotated[Array, "int32"]
Int64 = Annotated[Array, "int64"]
Bool = Annotated[Array, "bool"]


def _type(column: dataclasses.Field[Any]) -> str:
    """The type of the array in a field of `Rows`."""
    name: str = get_args(column.type)[1]
    return name


@dataclass(frozen=True)
class Rows:
    """Columns of equal length."""

    def __len__(self) -> int:
        return len(getattr(self, dataclasses.fields(self)[0].name))

    @classmethod
    def build(cls, **columns: Any) -> Self:
        """Cast each column (array, list or one value for every row) to its declared type."""
        length = max((len(values) for values in columns.values() if not np.isscalar(values)), default=0)
        return cls(
            **{
                f.name: np.full(length, columns[f.name], _type(f))
                if np.isscalar(columns[f.name])
                else np.asarray(columns[f.name], _type(f))
                for f in dataclasses.fields(cls)
            }
        )

    @classmethod
    def empty(cls) -> Self:
        return cls(**{f.name: np.empty(0, _type(f)) for f in dataclasses.fields(cls)})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts; a single part that has any is returned as it is."""
        parts = [part for part in parts if len(part)] or list(parts[:1])
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names}) if parts else cls.empty()

    def take(self, rows: Array | slice) -> Self:
        """The rows at these positions, or where this mask is true."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Kernels(Rows):
    """What ran on a device. On `CPU_DEVICE`: operators, cut into the pieces in which they were the innermost one."""

    process: Int16
    device: Int16
    stream: Int64  # on CPU_DEVICE the thread
    start_ns: Int64
    end_ns: Int64
    name: Int32  # index into Trace.names
    correlation: Int64
    counted: Bool  # false for the second and later pieces of one operator


@dataclass(frozen=True)
class Copies(Rows):
    """Copies and memsets on a device."""

    process: Int16
    device: Int16
    stream: Int64
    start_ns: Int64
    end_ns: Int64
    correlation: Int64
    bytes: Int64
    kind: Int16  # key of COPY_KINDS
    source_memory: Int16  # key of MEMORY_KINDS
    target_memory: Int16
    source_device: Int16  # -1 unknown
    target_device: Int16


@dataclass(frozen=True)
class Calls(Rows):
    """CUDA runtime and driver calls on the host."""

    process: Int16
    thread: Int64
    start_ns: Int64
    end_ns: Int64
    name: Int32
    correlation: Int64


@dataclass(frozen=True)
class Ranges(Rows):
    """Annotated host ranges (NVTX, record_function) whose name says a phase or a step."""

    process: Int16
    thread: Int64
    start_ns: Int64
    end_ns: Int64
    name: Int32


@dataclass(frozen=True)
class Messages(Rows):
    """What a trace says about the collective that a communication kernel carried out."""

    kernel: Int64  # row of Trace.kernels
    group: Int32  # index into Trace.groups, -1 unknown
    in_bytes: Int64  # -1 unknown
    out_bytes: Int64  # -1 unknown


@dataclass(frozen=True)
class Process:
    """One process of a trace. Nothing here can hold a user, host or command name."""

    trace: str  # file name without its folder
    pid: int
    rank: int | None = None
    world_size: int | None = None
    device_names: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A process group: its name in the trace and the global ranks in it, as far as known."""

    name: str
    size: int | None


@dataclass(frozen=True)
class Trace:
    """One or several files, read."""

    source: str  # "nsys", "kineto", or "mixed"
    processes: tuple[Process, ...]
    names: tuple[str, ...]
    kernels: Kernels
    copies: Copies
    calls: Calls
    ranges: Ranges
    messages: Messages
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()
    began_ns: int | None = None  # UTC of the file's time 0, nanoseconds since 1970; None where it does not say it


def dense(ids: Array) -> tuple[Array, Array]:
    """The distinct values of `ids`, and for each row the position of its value among them (int32)."""
    if len(ids) == 0:
        return ids, np.empty(0, np.int32)
    low, high = int(ids.min()), int(ids.max())
    if high - low >= max(1 << 20, 4 * len(ids)):
        distinct, position = np.unique(ids, return_inverse=True)
        return distinct, position.astype(np.int32)
    seen = np.zeros(high - low + 1, bool)
    seen[ids - low] = True
    distinct = np.flatnonzero(seen)
    lookup = np.zeros(high - low + 1, np.int32)
    lookup[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct + low, lookup[ids - low]


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """Put several files beside each other; the processes stay apart even when their pids and devices are equal."""
    if len(traces) == 1:
        return traces[0]
    names: dict[str, int] = {}
    groups: dict[Group, int] = {}
    parts: dict[str, list[Any]] = {"kernels": [], "copies": [], "calls": [], "ranges": [], "messages": []}
    processes: list[Process] = []
    rows = 0
    for trace in traces:
        name_of = np.array([names.setdefault(name, len(names)) for name in trace.names], np.int32)
        group_of = np.array([*(groups.setdefault(g, len(groups)) for g in trace.groups), -1], np.int32)
        for key in ("kernels", "copies", "calls", "ranges"):
            part = getattr(trace, key)
            changes = {"process": (part.process + len(processes)).astype(np.int16)}
            if hasattr(part, "name"):
                changes["name"] = name_of[part.name]
            parts[key].append(dataclasses.replace(part, **changes))
        m = trace.messages
        parts["messages"].append(dataclasses.replace(m, kernel=m.kernel + rows, group=group_of[m.group]))
        rows += len(trace.kernels)
        processes += trace.processes
    return Trace(
        source=traces[0].source if len({t.source for t in traces}) == 1 else "mixed",
        processes=tuple(processes),
        names=tuple(names),
        kernels=Kernels.concatenate(parts["kernels"]),
        copies=Copies.concatenate(parts["copies"]),
        calls=Calls.concatenate(parts["calls"]),
        ranges=Ranges.concatenate(parts["ranges"]),
        messages=Messages.concatenate(parts["messages"]),
        groups=tuple(groups),
        notes=tuple(note for trace in traces for note in trace.notes),
    )
