"""Nsight Compute CSV to roofline points: bytes, FLOPs and time per kernel.

Two layouts are read. In those of `--page details` and of ncu's own output, a row is one metric of one kernel launch:

    "0","1740670","python3.12","127.0.0.1","gemv…","1","7","(32, 4, 1)","(224, 1, 1)","0","12.0",
    "Command line profiler metrics","dram__bytes_read.sum","Mbyte","2.33",…

In that of `--page raw` a row is a launch, a column a metric, and a row below the header has the units:

    "ID","Process ID",…,"Kernel Name",…,"dram__bytes_read.sum","gpu__time_duration.sum"
    "","",…,"",…,"byte","ns"
    "0","1740670",…,"gemv…",…,"2,330,000","23,420"

Traps: metric names repeat between sections with other units ("Memory Throughput" in % and in Gbyte/s); units are scaled
per row; numbers carry thousands separators; values may be n/a; text of the profiled program can come before the header.
A metric that the report does not have gives an empty cell, never a zero. Times under ncu are those of serialised,
replayed kernels at fixed clocks and must not be compared with the times of a trace.
"""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.trace.categories import load_rules, short_name
from tunemap.trace.counters import FLOPS_PER_INSTRUCTION, READ, TIME, WRITTEN, tensor_counters

_SCALES = {
    "": 1, "byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "tbyte": 1e12, "inst": 1,
    "ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9,
}  # fmt: skip
_TIMES = (TIME, "Duration")
_KERNEL = ("ID", "Kernel Name")
_METRIC = ("Metric Name", "Metric Unit", "Metric Value")

COLUMNS = (
    "report",
    "id",
    "name",
    "short_name",
    "category",
    "time_ns",
    "bytes",
    "flops",
    "flops_counted",
    "flops_per_byte",
    "flops_per_s",
)


def read_ncu(paths: Iterable[Path]) -> dict[str, list[Any]]:
    """One row per profiled kernel launch; `UserError` for a file that is no ncu CSV."""
    rules = load_rules()
    rows: list[dict[str, Any]] = []
    for path in paths:
        launches: dict[str, tuple[str, dict[str, float]]] = {}
        for record in _records(path):
            _, metrics = launches.setdefault(record["ID"], (record["Kernel Name"], {}))
            value = _number(record["Metric Value"], record["Metric Unit"])
            if value is not None:
                metrics.setdefault(record["Metric Name"], value)
        for launch, (name, metrics) in launches.items():
            rows.append(
                {
                    "report": path.name,
                    "id": int(launch),
                    "name": name,
                    "short_name": short_name(name),
                    "category": rules.kernel_category(name),
                    **_point(metrics),
                }
            )
    return {column: [row[column] for row in rows] for column in COLUMNS}


def _point(metrics: dict[str, float]) -> dict[str, Any]:
    time_ns = next((metrics[name] for name in _TIMES if name in metrics), None)
    moved = metrics[READ] + metrics[WRITTEN] if READ in metrics and WRITTEN in metrics else None
    scalar = sum(value * FLOPS_PER_INSTRUCTION.get(name, 0) for name, value in metrics.items())
    tensor = sum(metrics[name] for name in tensor_counters(metrics))
    flops = scalar + tensor or None  # 0 means that the report counts other operations than this kernel's
    return {
        "time_ns": time_ns,
        "bytes": moved,
        "flops": flops,
        "flops_counted": "+".join(name for name, n in (("scalar", scalar), ("tensor", tensor)) if n) or None,
        "flops_per_byte": flops / moved if flops and moved else None,
        "flops_per_s": flops / time_ns * 1e9 if flops and time_ns else None,
    }


def _records(path: Path) -> Iterable[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise UserError(
            f'{path}: no ncu CSV (no header line that starts with "ID"); make one with: ncu --import REPORT --csv'
        )
    reader = csv.DictReader(lines[header:])
    names = reader.fieldnames or ()
    metrics = [name for name in names if "__" in name]
    needed = _KERNEL if metrics else (*_KERNEL, *_METRIC)
    if missing := [name for name in needed if name not in names]:
        raise UserError(f"{path}: no column {', '.join(missing)}; export with: ncu --import REPORT --csv --page raw")
    if not metrics:
        return [row for row in reader if row["Metric Name"] and (row["ID"] or "").isdigit()]
    return list(_one_by_one(list(reader), metrics))


def _one_by_one(rows: list[dict[str, str]], metrics: list[str]) -> Iterator[dict[str, str]]:
    """The raw page as rows of the other one; its units are in the row without an ID."""
    units = next((row for row in rows if not row["ID"]), {})
    for row in rows:
        if (row["ID"] or "").isdigit():
            for name in metrics:
                values = dict(zip(_METRIC, (name, units.get(name, ""), row[name]), strict=True))
                yield values | {key: row[key] for key in _KERNEL}


def _number(text: str | None, unit: str | None) -> float | None:
    scale = _SCALES.get((unit or "").lower())
    if text is None or scale is None:
        return None
    try:
        return float(text.replace(",", "")) * scale
    except ValueError:
        return None
