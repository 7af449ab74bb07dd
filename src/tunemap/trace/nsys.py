"""Reader for SQLite exports of Nsight Systems, 2022 to 2026 (`nsys export --type sqlite`).

Only the standard library and numpy. Tables and columns come and go between versions (a report without CUDA work has
no CUPTI tables at all), so every query is made from what `PRAGMA table_info` shows; an absent table reads as an empty
one. Rows come in any order. Text may not be UTF-8. The file is opened read-only and its metadata tables, which hold
the environment, user and process names, are never read.

Big tables are decoded straight from the pages of the file (`tunemap.trace.pages`), because making a Python integer of
every value would cost most of the time; what that cannot read goes through sqlite3, with the same result.
"""

import itertools
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np

from tunemap.errors import UserError
from tunemap.trace.arrays import (
    MEMSET,
    UNKNOWN_MEMORY,
    Array,
    Calls,
    Copies,
    Kernels,
    Messages,
    Process,
    Ranges,
    Trace,
    dense,
)
from tunemap.trace.nccl import SIZE_FIELD, Announced, messages_of, payload_bytes
from tunemap.trace.pages import integer_columns

GRAPH_NAME = "CUDA graph (traced as a whole)"

_CHUNK_ROWS = 1 << 18
_RANGE_EVENTS = (59, 60, 70, 71)  # push/pop and start/end, without and with the extended payload
_PLACE: dict[str, int | None] = dict.fromkeys(["start", "end", "deviceId", "streamId", "globalPid"])
_VERSION_SUFFIX = re.compile(r"_v\d+$")
_LOSS = re.compile(r"\b(lost|dropped|discard|overflow|incomplete)", re.IGNORECASE)


def read_nsys(path: Path, keep_range: Callable[[str], bool]) -> Trace:
    """Read one export.

    `keep_range` says by name which NVTX ranges to keep; the others are skipped while reading. Raises `UserError` for
    a file that is damaged, locked, or from before nsys 2022.
    """
    try:
        uri = _uri(path)
        with path.open("rb") as file, closing(sqlite3.connect(uri, uri=True, timeout=0.5)) as connection:
            return _Export(path, connection, file.fileno()).read(keep_range)
    except sqlite3.Error as error:
        raise UserError(_explain(path, error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: a column that must hold integers holds something else ({error}); export the .nsys-rep again"
        ) from error


def _explain(path: Path, error: sqlite3.Error) -> str:
    text = str(error)
    if "locked" in text or "busy" in text:
        return f"{path}: another program is writing this file (database is locked); wait until the export is done"
    if "malformed" in text or "not a database" in text or "disk I/O" in text:
        return f"{path}: damaged or truncated SQLite file ({text}); export the .nsys-rep again"
    return f"{path}: cannot read this SQLite file: {text}"


def _uri(path: Path) -> str:
    """The read-only URI under which SQLite neither writes to the file nor creates one beside it.

    `immutable=1` makes SQLite ignore locks and journals. That is wrong while an export is being written, and needed
    for write-ahead-log files, for which even a reader would create -wal and -shm beside the input.
    """
    with path.open("rb") as file:
        header = file.read(100)
    size = path.stat().st_size
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    pages, fresh = int.from_bytes(header[28:32], "big"), header[24:28] == header[92:96]
    if len(header) < 100 or (fresh and pages * page_bytes > size):
        raise UserError(
            f"{path}: truncated: its header announces {pages * page_bytes} bytes, the file has {size}; "
            "export the .nsys-rep again"
        )
    for suffix in ("-wal", "-journal"):
        journal = path.with_name(path.name + suffix)
        if journal.exists() and journal.stat().st_size:
            raise UserError(
                f"{path}: {journal.name} beside it holds unfinished changes; wait until the export is done, or "
                "export the .nsys-rep again"
            )
    write_ahead = header[18] == 2 or header[19] == 2
    return f"file:{quote(str(path.resolve()))}?mode=ro" + ("&immutable=1" if write_ahead else "")


class _Export:
    """One open export."""

    def __init__(self, path: Path, connection: sqlite3.Connection, descriptor: int) -> None:
        self.path = path
        self.connection = connection
        self.descriptor = descriptor
        self.notes: list[str] = []
        self.strings: dict[int, str] = {}
        self.names: dict[str, int] = {}
        self.processes: dict[int, int] = {}  # globalPid >> 24 -> index
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")  # with the first SELECT: nobody changes the pages until the end

    def read(self, keep_range: Callable[[str], bool]) -> Trace:
        tables = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
        if "StringIds" not in tables and not any(t.startswith("CUPTI_") for t in tables):
            raise UserError(
                f"{self.path}: an SQLite file, but no nsys export (neither StringIds nor CUPTI tables); "
                "make one with: nsys export --type sqlite REPORT.nsys-rep"
            )
        kernels = Kernels.concatenate([self._kernels(), self._graphs()])
        copies = Copies.concatenate([self._memcpy(), self._memset()])
        calls = self._calls()
        ranges = self._ranges(keep_range)
        if len(kernels) + len(copies) == 0:
            self.notes.append(f"{self.path.name}: no CUDA kernels, copies or memsets in this export")
        elif len(calls) == 0:
            self.notes.append(f"{self.path.name}: no CUDA API calls: launches and phases cannot be attributed")
        self._diagnostics()
        return Trace(
            source="nsys",
            processes=tuple(
                Process(self.path.name, key & 0xFFFFFF, device_names=self._device_names(key & 0xFFFFFF))
                for key in self.processes
            ),
            names=tuple(self.names),
            kernels=kernels,
            copies=copies,
            calls=calls,
            ranges=ranges,
            messages=self._messages(kernels, calls),
            notes=tuple(self.notes),
            began_ns=self._began(),
        )

    # -- tables ------------------------------------------------------------------------------------------------

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self.connection.execute(f'PRAGMA table_info("{table}")')}

    def _select(self, table: str, wanted: dict[str, int | None]) -> list[Array] | None:
        """Columns of integers; None when the table is absent or empty.

        `wanted` gives for each column what an absent column or a NULL means; None makes the column a must.
        """
        present = self._columns(table)
        if not present:
            return None
        missing = [name for name, default in wanted.items() if default is None and name not in present]
        if missing:
            raise UserError(
                f"{self.path}: {table} has no column {', '.join(missing)}; exports of nsys 2022 or later are supported"
            )
        defaults = {name: default or 0 for name, default in wanted.items()}
        stored = [name for name in wanted if name in present]
        values = self._pages(table, stored, defaults)
        if values is None:
            values = self._rows(table, stored, defaults)
        if len(values[0]) == 0:
            return None
        columns = dict(zip(stored, values, strict=True))
        return [columns.get(name, np.full(len(values[0]), defaults[name])) for name in wanted]

    def _pages(self, table: str, stored: list[str], defaults: dict[str, int]) -> list[Array] | None:
        """The fast way, None where it does not apply: see `tunemap.trace.pages`."""
        info = self.connection.execute(f'PRAGMA table_info("{table}")').fetchall()
        position = {name: number for number, name, *_ in info}
        if any(key for *_, key in info):
            return None
        (root,) = self.connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()
        return integer_columns(self.descriptor, root, [position[n] for n in stored], [defaults[n] for n in stored])

    def _rows(self, table: str, stored: list[str], defaults: dict[str, int]) -> list[Array]:
        """The same through sqlite3, a chunk of Python integers at a time."""
        expressions = ", ".join(f"COALESCE({name}, {defaults[name]})" for name in stored)
        flat = itertools.chain.from_iterable(self.connection.execute(f'SELECT {expressions} FROM "{table}"'))
        parts = []
        while len(chunk := np.fromiter(itertools.islice(flat, len(stored) * _CHUNK_ROWS), np.int64)):
            parts.append(chunk.reshape(-1, len(stored)))
        rows = np.concatenate(parts) if parts else np.empty((0, len(stored)), np.int64)
        return list(rows.T)

    def _valid(self, columns: list[Array], table: str) -> list[Array]:
        """Without the rows that end before they start; start and end are the first two columns."""
        good = columns[1] >= columns[0]
        if good.all():
            return columns
        self.notes.append(
            f"{self.path.name}: {int((~good).sum())} rows of {table} end before they start and were left out"
        )
        return [column[good] for column in columns]

    def _process(self, keys: Array) -> Array:
        distinct, position = dense(keys)
        index = np.array([self.processes.setdefault(int(k), len(self.processes)) for k in distinct], np.int16)
        return index[position] if len(keys) else np.empty(0, np.int16)

    def _name(self, ids: Array, clean: Callable[[str], str] = lambda text: text) -> Array:
        distinct, position = dense(ids)
        wanted = [int(i) for i in distinct if int(i) not in self.strings]
        for at in range(0, len(wanted), 500):
            part = wanted[at : at + 500]
            marks = ",".join("?" * len(part))
            self.strings.update(self.connection.execute(f"SELECT id, value FROM StringIds WHERE id IN ({marks})", part))
        texts = [clean(self.strings.get(int(i)) or f"<name {int(i)} is not in the export>") for i in distinct]
        index = np.array([self.names.setdefault(text, len(self.names)) for text in texts], np.int32)
        return index[position] if len(ids) else np.empty(0, np.int32)

    # -- device work -------------------------------------------------------------------------------------------

    def _kernels(self) -> Kernels:
        table = "CUPTI_ACTIVITY_KIND_KERNEL"
        name = "demangledName" if "demangledName" in self._columns(table) else "shortName"
        columns = self._select(table, _PLACE | {"correlationId": -1, name: None})
        if columns is None:
            return Kernels.empty()
        start, end, device, stream, pid, correlation, names = self._valid(columns, table)
        columns.clear()
        return Kernels.build(
            process=self._process(pid >> 24),
            device=device,
            stream=stream,
            start_ns=start,
            end_ns=end,
            name=self._name(names),
            correlation=correlation,
            counted=True,
        )

    def _graphs(self) -> Kernels:
        """Graphs traced as a whole keep the device busy, but hide their kernels."""
        table = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
        rows = self._select(table, _PLACE | {"correlationId": -1})
        if rows is None:
            return Kernels.empty()
        self.notes.append(
            f"{self.path.name}: {len(rows[0])} CUDA graphs were traced as a whole, without their kernels; "
            "capture with --cuda-graph-trace=node to see them"
        )
        start, end, device, stream, pid, correlation = self._valid(rows, table)
        return Kernels.build(
            process=self._process(pid >> 24),
            device=device,
            stream=stream,
            start_ns=start,
            end_ns=end,
            name=np.full(len(start), self.names.setdefault(GRAPH_NAME, len(self.names))),
            correlation=correlation,
            counted=True,
        )

    def _memcpy(self) -> Copies:
        table = "CUPTI_ACTIVITY_KIND_MEMCPY"
        wanted = _PLACE | {"bytes": None, "copyKind": 0, "correlationId": -1}
        wanted |= {"srcKind": UNKNOWN_MEMORY, "dstKind": UNKNOWN_MEMORY, "srcDeviceId": -1, "dstDeviceId": -1}
        rows = self._select(table, wanted)
        if rows is None:
            return Copies.empty()
        start, end, device, stream, pid, size, kind, correlation, source, target, source_device, target_device = (
            self._valid(rows, table)
        )
        return Copies.build(
            process=self._process(pid >> 24),
            device=device,
            stream=stream,
            start_ns=start,
            end_ns=end,
            correlation=correlation,
            bytes=size,
            kind=kind,
            source_memory=source,
            target_memory=target,
            source_device=source_device,
            target_device=target_device,
        )

    def _memset(self) -> Copies:
        table = "CUPTI_ACTIVITY_KIND_MEMSET"
        rows = self._select(table, _PLACE | {"bytes": None, "correlationId": -1, "memKind": UNKNOWN_MEMORY})
        if rows is None:
            return Copies.empty()
        start, end, device, stream, pid, size, correlation, memory = self._valid(rows, table)
        return Copies.build(
            process=self._process(pid >> 24),
            device=device,
            stream=stream,
            start_ns=start,
            end_ns=end,
            correlation=correlation,
            bytes=size,
            kind=np.full(len(start), MEMSET),
            source_memory=memory,
            target_memory=memory,
            source_device=device,
            target_device=device,
        )

    # -- host side ---------------------------------------------------------------------------------------------

    def _calls(self) -> Calls:
        table = "CUPTI_ACTIVITY_KIND_RUNTIME"
        rows = self._select(table, {"start": None, "end": None, "globalTid": None, "nameId": None, "correlationId": -1})
        if rows is None:
            return Calls.empty()
        start, end, thread, name, correlation = self._valid(rows, table)
        return Calls.build(
            process=self._process(thread >> 24),
            thread=thread & 0xFFFFFF,
            start_ns=start,
            end_ns=end,
            name=self._name(name, lambda text: _VERSION_SUFFIX.sub("", text)),
            correlation=correlation,
        )

    def _ranges(self, keep_range: Callable[[str], bool]) -> Ranges:
        present = self._columns("NVTX_EVENTS")
        if not {"start", "eventType", "globalTid"} <= present:
            return Ranges.empty()
        text = "e.text" if "text" in present else "NULL"
        if "textId" in present:
            text = f"COALESCE({text}, (SELECT value FROM StringIds WHERE id = e.textId))"
        self.connection.create_function("keep_range", 1, lambda t: t is not None and keep_range(t), deterministic=True)
        rows = self.connection.execute(
            f"""SELECT e.start, {"e.end" if "end" in present else "NULL"}, e.globalTid, {text} FROM NVTX_EVENTS AS e
            WHERE e.eventType IN ({",".join(map(str, _RANGE_EVENTS))}) AND e.start IS NOT NULL
              AND e.globalTid IS NOT NULL AND keep_range({text})"""
        ).fetchall()
        open_ended = sum(end is None for _, end, _, _ in rows)
        if open_ended:
            self.notes.append(f"{self.path.name}: {open_ended} ranges were still open when the capture stopped")
        last = self._capture_end() if open_ended else 0
        start = np.array([r[0] for r in rows], np.int64)
        end = np.array([max(last, r[0]) if r[1] is None else r[1] for r in rows], np.int64)
        thread = np.array([r[2] for r in rows], np.int64)
        index = np.array([self.names.setdefault(r[3], len(self.names)) for r in rows], np.int32)
        start, end, thread, index = self._valid([start, end, thread, index], "NVTX_EVENTS")
        return Ranges.build(
            process=self._process(thread >> 24), thread=thread & 0xFFFFFF, start_ns=start, end_ns=end, name=index
        )

    def _messages(self, kernels: Kernels, calls: Calls) -> Messages:
        """Sizes of NCCL's messages, where the export has the payloads of its ranges."""
        fields = {"domainId", "schemaId", "name", "offset"}
        if not fields <= self._columns("NVTX_PAYLOAD_SCHEMA_ENTRIES") or not {
            "binaryData",
            "domainId",
        } <= self._columns("NVTX_EVENTS"):
            return Messages.empty()
        entries = self.connection.execute(
            "SELECT domainId, schemaId, offset FROM NVTX_PAYLOAD_SCHEMA_ENTRIES WHERE name = ?", (SIZE_FIELD,)
        )
        offsets = {(domain & 0xFFFFFFFF, schema & 0xFFFFFFFF): offset or 0 for domain, schema, offset in entries}
        rows = self.connection.execute(
            """SELECT e.start, e.globalTid, COALESCE(e.text, (SELECT value FROM StringIds WHERE id = e.textId)),
            e.binaryData FROM NVTX_EVENTS AS e
            WHERE e.binaryData IS NOT NULL AND e.start IS NOT NULL AND e.globalTid IS NOT NULL"""
        ).fetchall()
        if not rows:
            return Messages.empty()
        process = self._process(np.array([row[1] for row in rows], np.int64) >> 24)
        announced = []
        for index, (start, thread, name, blob) in zip(process, rows, strict=True):
            size = payload_bytes(blob, offsets) if isinstance(blob, bytes) else None
            if size is not None:
                announced.append(Announced(int(index), thread & 0xFFFFFF, start, name or "", size))
        nccl = {index for name, index in self.names.items() if "nccl" in name.lower()}
        communicates = np.flatnonzero(np.isin(kernels.name, list(nccl))).tolist()
        return messages_of(kernels, calls, communicates, announced)

    def _capture_end(self) -> int:
        """The last time in the export: where a range that was never closed must end."""
        tables = ("CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_KERNEL", "NVTX_EVENTS")
        ends = [
            self.connection.execute(f'SELECT MAX("end"), MAX(start) FROM "{table}"').fetchone()
            for table in tables
            if {"start", "end"} <= self._columns(table)
        ]
        return max((value for pair in ends for value in pair if value is not None), default=0)

    def _device_names(self, pid: int) -> dict[int, str]:
        """CUDA ordinal of this process -> model of the GPU; TARGET_INFO_GPU.id is not the ordinal."""
        gpu = self._columns("TARGET_INFO_GPU")
        if not {"id", "name"} <= gpu:
            return {}
        if {"gpuId", "cudaId", "pid"} <= self._columns("TARGET_INFO_CUDA_DEVICE"):
            rows = self.connection.execute(
                "SELECT d.cudaId, g.name FROM TARGET_INFO_CUDA_DEVICE AS d JOIN TARGET_INFO_GPU AS g ON g.id = d.gpuId "
                "WHERE d.pid = ?",
                [pid],
            ).fetchall()
        elif "cuDevice" in gpu:
            rows = self.connection.execute("SELECT cuDevice, name FROM TARGET_INFO_GPU").fetchall()
        else:
            return {}
        return {int(ordinal): name for ordinal, name in rows if ordinal is not None and name}

    def _began(self) -> int | None:
        """When the capture's clock was zero, in UTC."""
        if "utcEpochNs" not in self._columns("TARGET_INFO_SESSION_START_TIME"):
            return None
        row = self.connection.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
        return row[0] if row is not None and isinstance(row[0], int) else None

    def _diagnostics(self) -> None:
        """Say that nsys lost events, without repeating its text, which holds paths and commands."""
        if "text" not in self._columns("DIAGNOSTIC_EVENT"):
            return
        texts = [text for (text,) in self.connection.execute("SELECT text FROM DIAGNOSTIC_EVENT") if text]
        lost = sum(bool(_LOSS.search(text)) for text in texts)
        if lost:
            self.notes.append(f"{self.path.name}: nsys reports lost or incomplete data in {lost} diagnostic messages")
