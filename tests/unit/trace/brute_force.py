"""An oracle that shares no code with the package: plain rows, pure Python, one elementary interval at a time.

It reads the raw file itself, cuts time at every start and end, and asks for each piece between two cuts what was
running. Names are classified by the package's rules where a category is asked for; everything else is its own.
"""

import gzip
import json
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

CPU = "cpu"


@dataclass(frozen=True)
class Op:
    process: int
    device: Any
    start: int
    end: int
    name: str
    correlation: int
    thread: Any = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Raw:
    kernels: list[Op] = field(default_factory=list)
    copies: list[Op] = field(default_factory=list)
    calls: list[Op] = field(default_factory=list)
    ranges: list[Op] = field(default_factory=list)
    operators: list[Op] = field(default_factory=list)


def read(path: Path) -> Raw:
    return _read_nsys(path) if path.suffix == ".sqlite" else _read_kineto(path)


def _read_nsys(path: Path) -> Raw:
    c = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    c.row_factory = sqlite3.Row
    c.text_factory = lambda b: b.decode("utf-8", "replace")
    strings = dict(c.execute("SELECT id, value FROM StringIds").fetchall())
    tables = {r[0] for r in c.execute("SELECT name FROM sqlite_master")}
    raw = Raw()

    def rows(table: str) -> list[sqlite3.Row]:
        return c.execute(f"SELECT * FROM {table}").fetchall() if table in tables else []

    for r in rows("CUPTI_ACTIVITY_KIND_KERNEL"):
        pid = r["globalPid"] >> 24 & 0xFFFFFF
        raw.kernels.append(
            Op(pid, r["deviceId"], r["start"], r["end"], strings[r["demangledName"]], r["correlationId"])
        )
    for table in ("CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET"):
        for r in rows(table):
            kind = r["copyKind"] if "copyKind" in r.keys() else "memset"  # noqa: SIM118
            pid = r["globalPid"] >> 24 & 0xFFFFFF
            raw.copies.append(
                Op(pid, r["deviceId"], r["start"], r["end"], str(kind), r["correlationId"], None, {"bytes": r["bytes"]})
            )
    for r in rows("CUPTI_ACTIVITY_KIND_RUNTIME"):
        pid, tid = r["globalTid"] >> 24 & 0xFFFFFF, r["globalTid"] & 0xFFFFFF
        name = strings[r["nameId"]]
        raw.calls.append(Op(pid, None, r["start"], r["end"], name, r["correlationId"], tid))
    for r in rows("NVTX_EVENTS"):
        name = r["text"] if r["text"] is not None else strings.get(r["textId"])
        if r["eventType"] in (59, 60) and name is not None and r["end"] is not None:
            pid, tid = r["globalTid"] >> 24 & 0xFFFFFF, r["globalTid"] & 0xFFFFFF
            raw.ranges.append(Op(pid, None, r["start"], r["end"], name, 0, tid))
    return raw


def _ns(value: Any) -> int:
    return int((Decimal(str(value)) * 1000).quantize(Decimal(1), ROUND_HALF_UP))


def _read_kineto(path: Path) -> Raw:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    raw = Raw()
    for e in json.loads(data, parse_float=Decimal)["traceEvents"]:
        if e.get("ph") != "X" or "dur" not in e or e.get("cat") == "Trace":
            continue
        start, args = _ns(e["ts"]), e.get("args", {})
        end = start + _ns(e["dur"])
        correlation = args.get("correlation", -1)
        match e["cat"]:
            case "kernel":
                raw.kernels.append(Op(0, args["device"], start, end, e["name"], correlation))
            case "gpu_memcpy" | "gpu_memset":
                raw.copies.append(
                    Op(0, args["device"], start, end, e["name"], correlation, None, {"bytes": args["bytes"]})
                )
            case "cuda_runtime" | "cuda_driver":
                raw.calls.append(Op(0, None, start, end, e["name"], correlation, e["tid"]))
            case "user_annotation":
                raw.ranges.append(Op(0, None, start, end, e["name"], -1, e["tid"]))
            case "cpu_op":
                raw.operators.append(Op(0, CPU, start, end, e["name"], -1, e["tid"]))
    return raw


def partition(kernels: list[Op], copies: list[Op]) -> dict[str, int]:
    """Parts of the window of one device: what is active in each elementary interval."""
    ops = [(k.start, k.end, 1 if "nccl" in k.name.lower() else 0) for k in kernels] + [
        (c.start, c.end, 2) for c in copies
    ]
    cuts = sorted({t for start, end, _ in ops for t in (start, end)})
    delta: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for start, end, kind in ops:
        delta[start][kind] += 1
        delta[end][kind] -= 1
    total: dict[str, int] = defaultdict(int)
    active = [0, 0, 0]
    for at, until in pairwise(cuts):
        active = [a + d for a, d in zip(active, delta[at], strict=True)]
        length = until - at
        compute, communicate, copy = (a > 0 for a in active)
        total["compute_ns"] += length * compute
        total["communication_ns"] += length * communicate
        total["overlap_ns"] += length * (compute and communicate)
        total["exposed_communication_ns"] += length * (communicate and not compute)
        total["copy_ns"] += length * copy
        total["exposed_copy_ns"] += length * (copy and not compute and not communicate)
        total["idle_ns"] += length * (not copy and not compute and not communicate)
        total["kernel_busy_ns"] += length * (compute or communicate)
    total["window_ns"] = cuts[-1] - cuts[0]
    return dict(total)


def phases(
    raw: Raw, kernels: list[Op], phase_of: Any, category_of: Any, thread_phases: set[str]
) -> dict[Any, list[int]]:
    """(phase, category) -> [count, time]: for each kernel all ranges of its process are looked at."""
    launches: dict[tuple[int, int], Op] = {}
    for call in raw.calls:
        key = call.process, call.correlation
        if call.correlation > 0 and (key not in launches or call.start < launches[key].start):
            launches[key] = call
    named = [(r, label) for r in raw.ranges if (label := phase_of(r.name)) is not None]
    result: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for kernel in kernels:
        call = launches.get((kernel.process, kernel.correlation))
        label = "unattributed"
        if call is not None:
            around = [(r, p) for r, p in named if r.process == kernel.process and r.start <= call.start < r.end]
            own = [(r, p) for r, p in around if r.thread == call.thread]
            shared = [(r, p) for r, p in around if p not in thread_phases]
            if own or shared:
                label = max(own or shared, key=lambda rp: (rp[0].start, -rp[0].end))[1]
        row = result[label, category_of(kernel.name)]
        row[0] += 1
        row[1] += kernel.end - kernel.start
    return dict(result)


def cpu_partition(raw: Raw, category_of: Any, waits: set[str]) -> dict[str, int]:
    """Parts of the window of a trace without a GPU, from the innermost operator of each thread at each moment."""
    collectives = [r for r in raw.ranges if r.name.startswith("gloo:")]
    inside = [
        o for o in raw.operators if not any(c.thread == o.thread and c.start <= o.start < c.end for c in collectives)
    ]
    everything = inside + collectives
    cuts = sorted({t for o in everything for t in (o.start, o.end)})
    begins: dict[int, list[Op]] = defaultdict(list)
    for o in everything:
        begins[o.start].append(o)
    active: list[Op] = []
    total = {"compute_ns": 0, "communication_ns": 0, "exposed_communication_ns": 0, "idle_ns": 0}
    for at, until in pairwise(cuts):
        active = [o for o in active if o.end > at] + begins[at]
        length = until - at
        innermost: dict[Any, Op] = {}
        for o in sorted(active, key=lambda o: (o.start, -o.end)):
            if o.end > at and not o.name.startswith("gloo:"):
                innermost[o.thread] = o
        categories = {category_of(o.name) for o in innermost.values()}
        communicates = any(o.name.startswith("gloo:") and o.end > at for o in active)
        computes = bool(categories - waits)
        total["communication_ns"] += length * communicates
        total["exposed_communication_ns"] += length * (communicates and not computes)
        total["compute_ns"] += length * (computes or (bool(categories) and not communicates))
        total["idle_ns"] += length * (not categories and not communicates)
    total["window_ns"] = cuts[-1] - cuts[0]
    return total
