"""Mutated traces: damaged bytes, odd cells and fields, missing columns in nsys SQLite and Kineto JSON."""

import gzip
import json
import math
import random
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from tunemap.trace.command import read_traces
from tunemap.trace.facts import Facts, compute_facts

from .judge import FaultError, Verdict, judge

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "trace"))
import trace_generator as generator

ODD_CELLS: list[Any] = [None, 0, -1, 1, 2**31, 2**62, -(2**62), 2**63 - 1, 1.5, "x", "12", b"\xff\xfe", ""]
ODD_JSON: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**62, 10**30, 1e300, "", "x", "1.5", "nan", "1e999", [], {}, [1], {"a": 1},
    "a" * 10_000, "\x00", "\ud800",
]  # fmt: skip
PARTS = ("compute_ns", "exposed_communication_ns", "exposed_copy_ns", "idle_ns")


def originals(folder: Path) -> dict[str, bytes]:
    """One small export and one small Kineto trace, as bytes by suffix."""
    ranks = generator.generate(120, processes=2, steps=2)
    generator.write_nsys(folder / "report.sqlite", ranks)
    generator.write_kineto(folder / "rank0.json", ranks[0], 2)
    return {
        suffix: (folder / name).read_bytes() for suffix, name in ((".sqlite", "report.sqlite"), (".json", "rank0.json"))
    }


def attempt(seed: int, traces: dict[str, bytes], folder: Path) -> Verdict:
    """Write one mutated trace, compute its facts, and judge what happened."""
    rng = random.Random(seed)
    suffix = rng.choice(list(traces))
    path = folder / f"mutated{suffix}"
    data = traces[suffix]
    if rng.random() < 0.35:
        data = damaged(data, rng)
    elif suffix == ".json":
        data = _odd_events(data, rng)
    if suffix == ".json" and rng.random() < 0.3:
        data = gzip.compress(data)
        if rng.random() < 0.5:
            data = damaged(data, rng)
    path.write_bytes(data)
    if suffix == ".sqlite" and data == traces[suffix]:
        _odd_rows(path, rng)
    return judge(lambda: _read(path), path)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with some bytes replaced by any other or by one that means something in JSON."""
    if rng.random() < 0.15:
        return data[: rng.randrange(1, len(data))]
    changed, any_byte = bytearray(data), rng.random() < 0.5
    for _ in range(rng.choice([1, 3, 20, 200])):
        changed[rng.randrange(len(data))] = rng.randrange(256) if any_byte else rng.choice(b'0123456789-.,"{}[]:e')
    return bytes(changed)


def _read(path: Path) -> None:
    facts = compute_facts(read_traces([path]))
    check(facts)


def check(facts: Facts) -> None:
    """Facts that are taken must add up, and be JSON."""
    json.dumps(facts.summary, allow_nan=False)
    for device in facts.summary["devices"]:
        parts = [device[name] for name in PARTS]
        if min(parts) < 0 or sum(parts) != device["window_ns"]:
            raise FaultError(f"parts {parts} do not add up to {device['window_ns']}")
    for name, table in facts.tables.items():
        for column, values in table.items():
            for value in values:
                if isinstance(value, float) and not math.isfinite(value):
                    raise FaultError(f"{name}.{column} is {value}")
                if isinstance(value, int) and not isinstance(value, bool) and value < 0 and column.endswith("_ns"):
                    raise FaultError(f"{name}.{column} is {value}")


def _odd_rows(path: Path, rng: random.Random) -> None:
    """Odd values in cells, repeated or missing rows, columns and tables."""
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for _ in range(rng.randint(1, 4)):
            table = rng.choice(tables)
            columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
            if not columns:
                continue
            column, change = rng.choice(columns), rng.random()
            rows = [row for (row,) in database.execute(f'SELECT rowid FROM "{table}"')]
            try:
                if change < 0.7 and rows:
                    chosen = rng.choice([rows, rng.sample(rows, min(3, len(rows)))])
                    value = rng.choice(ODD_CELLS)
                    marks = [(value, row) for row in chosen]
                    database.executemany(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', marks)
                elif change < 0.8:
                    database.execute(f'ALTER TABLE "{table}" DROP COLUMN "{column}"')
                elif change < 0.9:
                    database.execute(f'DROP TABLE "{table}"')
                else:
                    database.execute(f'DELETE FROM "{table}" WHERE rowid % 2')
            except (sqlite3.Error, OverflowError):
                pass  # a constraint of the table forbids it; the next change may go
        database.commit()


def _odd_events(data: bytes, rng: random.Random) -> bytes:
    """Odd values in fields of events, and fields and events that are gone or there twice."""
    trace = json.loads(data)
    events = trace["traceEvents"]
    for _ in range(rng.choice([1, 2, 10])):
        event = rng.choice(events)
        if not isinstance(event, dict) or not event:
            continue
        inside = (
            event["args"] if isinstance(event.get("args"), dict) and event["args"] and rng.random() < 0.4 else event
        )
        key, change = rng.choice(list(inside)), rng.random()
        if change < 0.7:
            inside[key] = rng.choice(ODD_JSON)
        elif change < 0.85:
            del inside[key]
        else:
            events[rng.randrange(len(events))] = rng.choice(ODD_JSON)
    if rng.random() < 0.1:
        trace[rng.choice(list(trace))] = rng.choice(ODD_JSON)
    return json.dumps(trace).encode()
