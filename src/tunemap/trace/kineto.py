"""Reader for Kineto traces (torch.profiler's Chrome JSON, plain or gzip), 2021 to today.

An event, one line of `traceEvents`:

    {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_AllReduce_…", "pid": 0, "tid": 40, "ts": 4458677009853.422,
     "dur": 2636.669, "args": {"device": 0, "stream": 40, "correlation": 60047, "Collective name": "allreduce", …}}

Times are decimal microseconds: they are turned into integer nanoseconds digit by digit, because a double cannot hold
them. The `pid` of a GPU event is its device, not a process; the process is the file. The file is parsed event by
event, so memory grows with what is kept, not with the size of the JSON. User and host names in it are never kept.

A trace without GPU work is read as if its CPU were the device: each operator becomes a kernel on `CPU_DEVICE`, cut
into the pieces in which it was the innermost operator of its thread, and each collective of gloo becomes a
communication kernel on the backend's own thread.
"""

import gzip
import json
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any

import numpy as np

from tunemap.errors import UserError
from tunemap.trace.arrays import (
    CPU_DEVICE,
    MEMORY_KINDS,
    MEMSET,
    NO_CORRELATION,
    UNKNOWN_MEMORY,
    Array,
    Calls,
    Copies,
    Group,
    Kernels,
    Messages,
    Process,
    Ranges,
    Trace,
)

_CHUNK_CHARACTERS = 1 << 22
_LARGEST_EVENT_CHARACTERS = 1 << 26

# Categories in lower case; the first name of each is today's, the others are from 2021 and from ROCm.
_KERNEL = {"kernel"}
_MEMCPY = {"gpu_memcpy", "memcpy"}
_MEMSET = {"gpu_memset", "memset"}
_CALL = {"cuda_runtime", "cuda_driver", "runtime", "driver", "hip_runtime", "hip_driver", "xpu_runtime"}
_OPERATOR = {"cpu_op", "operator"}
_ANNOTATION = {"user_annotation"}

_CPU_COLLECTIVE = re.compile(r"^(gloo|mpi|ucc|xccl):")
_MEMCPY_NAME = re.compile(r"(\w+?)to(\w+)\s*\(([\w ]+?) -> ([\w ]+?)\)", re.IGNORECASE)
_MEMSET_NAME = re.compile(r"\(([\w ]+)\)")
_COPY_CODES = {
    "htod": 1, "dtoh": 2, "htoa": 3, "atoh": 4, "atoa": 5, "atod": 6, "dtoa": 7, "dtod": 8, "htoh": 9, "ptop": 10,
}  # fmt: skip
_MEMORY_CODES = {name: code for code, name in MEMORY_KINDS.items()}

_ELEMENT_BYTES = {
    "float": 4, "float32": 4, "double": 8, "float64": 8, "half": 2, "float16": 2, "bfloat16": 2, "c10::half": 2,
    "c10::bfloat16": 2, "int": 4, "int32": 4, "long": 8, "long int": 8, "int64": 8, "short": 2, "byte": 1, "char": 1,
    "signed char": 1, "unsigned char": 1, "uint8": 1, "int8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip


def read_kineto(path: Path, keep_range: Callable[[str], bool]) -> Trace:
    """Read one trace; `keep_range` says by name which annotations are phases or steps.

    Raises `UserError` for a file that is truncated, damaged, or no Chrome trace.
    """
    reader = _Reader(path, keep_range)
    try:
        with _open(path) as text:
            for key, value in top_level(text):
                if key is None:
                    reader.add(value)
                else:
                    reader.header[key] = value
        return reader.trace()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: truncated or damaged gzip file ({error})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: truncated or damaged JSON ({error.msg}); write the trace again") from error
    except RecursionError:
        raise UserError(f"{path}: damaged JSON (nested too deeply)") from None
    except KeyError as error:
        raise UserError(f"{path}: an event of this trace has no field {error}; write the trace again") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: an event of this trace has a field of the wrong type ({str(error)[:200]}); write the trace again"
        ) from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if zipped else open
    return opener(path, "rt", encoding="utf-8", errors="replace")


# -- streaming JSON --------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]*")
_SEPARATOR = re.compile(r"[ \t\n\r,]*")


class _Scanner:
    """Values of a JSON text one after the other, with a buffer that holds a few events."""

    def __init__(self, text: IO[str]) -> None:
        self.text = text
        self.buffer = ""
        self.at = 0
        self.ended = False
        # Numbers with a point stay text: a double would lose the nanoseconds.
        self.decode = json.JSONDecoder(parse_float=str, strict=False).raw_decode

    def _fill(self) -> bool:
        if self.ended:
            return False
        more = self.text.read(_CHUNK_CHARACTERS)
        self.buffer = self.buffer[self.at :] + more
        self.at = 0
        self.ended = not more
        return not self.ended

    def peek(self, skip: re.Pattern[str] = _SPACE) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = skip.match(self.buffer, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.buffer) or not self._fill():
                return self.buffer[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise json.JSONDecodeError(f"expected {expected!r}", "", 0)
        self.at += 1

    def value(self) -> Any:
        while True:
            try:
                value, end = self.decode(self.buffer, self.at)
                # a number or a word at the very end of the buffer may go on
                if end < len(self.buffer) or self.buffer[end - 1] in '}]"' or not self._fill():
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if len(self.buffer) - self.at > _LARGEST_EVENT_CHARACTERS or not self._fill():
                    raise


def top_level(text: IO[str]) -> Iterator[tuple[str | None, Any]]:
    """(None, event) for each entry of `traceEvents`, (key, value) for everything else at the top level.

    A file that is a bare list is a list of events. Numbers with a decimal point come as text.
    """
    scanner = _Scanner(text)
    first = scanner.peek()
    if first == "[":
        yield from _events(scanner)
        return
    scanner.take("{")
    while scanner.peek(_SEPARATOR) != "}":
        key = scanner.value()
        scanner.take(":")
        if key == "traceEvents" and scanner.peek() == "[":
            yield from _events(scanner)
        else:
            scanner.peek()
            yield key, scanner.value()


def _events(scanner: _Scanner) -> Iterator[tuple[None, Any]]:
    scanner.take("[")
    while scanner.peek(_SEPARATOR) != "]":
        yield None, scanner.value()
    scanner.at += 1


def nanoseconds(microseconds: int | str) -> int:
    """Decimal microseconds to integer nanoseconds, half away from zero, without a float in between.

    >>> nanoseconds("4458677009853.422")
    4458677009853422
    """
    if isinstance(microseconds, int):
        return microseconds * 1000
    try:
        if microseconds[-4:-3] == ".":  # three decimals, as torch.profiler writes them
            return int(microseconds[:-4] + microseconds[-3:])
    except ValueError:
        pass
    try:
        return int((Decimal(microseconds) * 1000).to_integral_value(rounding="ROUND_HALF_UP"))
    except InvalidOperation:
        raise ValueError(f"{microseconds!r} is not a time") from None


# -- events to arrays ------------------------------------------------------------------------------------------


class _Reader:
    """Collects the events of one file."""

    def __init__(self, path: Path, keep_range: Callable[[str], bool]) -> None:
        self.path = path
        self.keep_range = keep_range
        self.header: dict[str, Any] = {}
        self.names: dict[str, int] = {}
        self.kept: dict[str, bool] = {}
        self.threads: dict[str, int] = {}
        self.groups: dict[Group, int] = {}
        self.pids: Counter[int] = Counter()
        self.invalid = 0
        # each is a flat array of integers, one row after the other; widths in the names of the row builders
        self.kernels, self.copies, self.calls = array("q"), array("q"), array("q")
        self.operators, self.collectives, self.ranges = array("q"), array("q"), array("q")
        self.messages, self.cpu_messages = array("q"), array("q")

    def add(self, event: dict[str, Any]) -> None:
        if event.get("ph") != "X":
            return
        category = event.get("cat")
        if category is None:
            return
        category = category.lower()
        if category in _OPERATOR:
            if (span := self._span(event)) is not None:
                name = event["name"]
                self.pids[self._pid(event)] += 1
                self.operators.extend((*span, self._thread(event), self._name(name)))
                if category == "operator" and self._keeps(name):  # 2021: annotations were operators
                    self.ranges.extend((*span, self._thread(event), self._name(name)))
        elif category in _CALL:
            if (span := self._span(event)) is not None:
                self.pids[self._pid(event)] += 1
                correlation = event.get("args", {}).get("correlation", NO_CORRELATION)
                self.calls.extend((*span, self._thread(event), self._name(event["name"]), int(correlation)))
        elif category in _KERNEL:
            self._kernel(event)
        elif category in _MEMCPY or category in _MEMSET:
            self._copy(event, category in _MEMSET)
        elif category in _ANNOTATION:
            self._annotation(event)

    def _kernel(self, event: dict[str, Any]) -> None:
        if (span := self._span(event)) is None:
            return
        args = event.get("args", {})
        row = len(self.kernels) // 6
        self.kernels.extend((*span, *self._place(event, args), self._name(event["name"])))
        if "Collective name" in args or "In msg nelems" in args:
            width = _ELEMENT_BYTES.get(str(args.get("dtype", "")).lower())
            sent, received = (
                int(args[key]) * width if width and args.get(key) is not None else -1
                for key in ("In msg nelems", "Out msg nelems")
            )
            self.messages.extend((row, self._group(args), sent, received))

    def _copy(self, event: dict[str, Any], memset: bool) -> None:
        if (span := self._span(event)) is None:
            return
        args = event.get("args", {})
        device, stream, correlation = self._place(event, args)
        kind, source, target = (MEMSET, *_memset_memory(event["name"])) if memset else _copy_kind(event["name"])
        source_device = int(args.get("fromDevice", device if kind in (8, MEMSET) else -1))
        target_device = int(args.get("toDevice", device if kind in (8, MEMSET) else -1))
        size = int(args.get("bytes", 0))
        self.copies.extend(
            (*span, device, stream, correlation, size, kind, source, target, source_device, target_device)
        )

    def _annotation(self, event: dict[str, Any]) -> None:
        name = event["name"]
        if _CPU_COLLECTIVE.match(name):
            if (span := self._span(event)) is not None:
                self.pids[self._pid(event)] += 1
                row = len(self.collectives) // 4
                self.collectives.extend((*span, self._thread(event), self._name(name)))
                size = _input_bytes(event.get("args", {}))
                self.cpu_messages.extend((row, -1, size, -1))
        elif self._keeps(name) and (span := self._span(event)) is not None:
            self.pids[self._pid(event)] += 1
            self.ranges.extend((*span, self._thread(event), self._name(name)))

    # -- fields ------------------------------------------------------------------------------------------------

    def _span(self, event: dict[str, Any]) -> tuple[int, int] | None:
        duration = event.get("dur")
        if duration is None or event.get("ts") is None:
            self.invalid += 1
            return None
        start = nanoseconds(event["ts"])
        length = nanoseconds(duration)
        if length < 0:
            self.invalid += 1
            return None
        return start, start + length

    def _place(self, event: dict[str, Any], args: dict[str, Any]) -> tuple[int, int, int]:
        device = args.get("device", event.get("pid", 0))
        stream = args.get("stream", event.get("tid", 0))
        correlation = args.get("correlation", NO_CORRELATION)
        return int(device), int(re.sub(r"\D", "", str(stream)) or 0), int(correlation)

    def _pid(self, event: dict[str, Any]) -> int:
        pid = event.get("pid")
        return pid if isinstance(pid, int) else int(re.sub(r"\D", "", str(pid)) or 0)

    def _thread(self, event: dict[str, Any]) -> int:
        thread = event.get("tid")
        return thread if isinstance(thread, int) else -2 - self.threads.setdefault(str(thread), len(self.threads))

    def _name(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def _keeps(self, name: str) -> bool:
        if name not in self.kept:
            self.kept[name] = self.keep_range(name)
        return self.kept[name]

    def _group(self, args: dict[str, Any]) -> int:
        name = args.get("Process Group Name")
        if name is None:
            return -1
        size = args.get("Group size")
        ranks = str(args.get("Process Group Ranks", "")).strip()
        group = Group(f"{name} {ranks}".strip(), None if size is None else int(size))
        return self.groups.setdefault(group, len(self.groups))

    # -- result ------------------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        notes: list[str] = []
        if self.invalid:
            notes.append(f"{self.path.name}: {self.invalid} events without a valid duration were left out")
        if len(self.pids) > 1 and self.calls:
            notes.append(f"{self.path.name}: host events of {len(self.pids)} processes; they are read as one")
        kernels, messages = self._device_work(notes)
        copies = _table(self.copies, 11)
        calls, ranges = _table(self.calls, 5), _table(self.ranges, 4)
        return Trace(
            source="kineto",
            processes=(self._process(),),
            names=tuple(self.names),
            kernels=kernels,
            copies=Copies.build(
                process=np.zeros(copies.shape[1], np.int16),
                **dict(
                    zip(
                        ("start_ns", "end_ns", "device", "stream", "correlation", "bytes", "kind", "source_memory",
                         "target_memory", "source_device", "target_device"),
                        copies,
                        strict=True,
                    )
                ),
            ),
            calls=Calls.build(
                process=np.zeros(calls.shape[1], np.int16),
                **dict(zip(("start_ns", "end_ns", "thread", "name", "correlation"), calls, strict=True)),
            ),
            ranges=Ranges.build(
                process=np.zeros(ranges.shape[1], np.int16),
                **dict(zip(("start_ns", "end_ns", "thread", "name"), ranges, strict=True)),
            ),
            messages=messages,
            groups=tuple(self.groups),
            notes=tuple(notes),
        )  # fmt: skip

    def _device_work(self, notes: list[str]) -> tuple[Kernels, Messages]:
        if self.kernels or self.copies:
            start, end, device, stream, correlation, name = _table(self.kernels, 6)
            kernels = Kernels.build(
                process=np.zeros(len(start), np.int16), device=device, stream=stream, start_ns=start, end_ns=end,
                name=name, correlation=correlation, counted=np.ones(len(start), bool),
            )  # fmt: skip
            return kernels, _messages(self.messages)
        if not self.operators and not self.collectives:
            notes.append(f"{self.path.name}: neither GPU events nor operators in this trace")
            return Kernels.empty(), Messages.empty()
        notes.append(f"{self.path.name}: no GPU events; operators and collectives of the CPU are analysed instead")
        return cpu_kernels(_table(self.collectives, 4), _table(self.operators, 4)), _messages(self.cpu_messages)

    def _process(self) -> Process:
        distributed = self.header.get("distributedInfo") or {}
        devices = self.header.get("deviceProperties") or []
        return Process(
            trace=self.path.name,
            pid=self.pids.most_common(1)[0][0] if self.pids else 0,
            rank=_integer(distributed.get("rank")),
            world_size=_integer(distributed.get("world_size")),
            device_names={int(d["id"]): str(d["name"]) for d in devices if "id" in d and "name" in d},
        )


def _integer(value: Any) -> int | None:
    return None if value is None else int(value)


def _table(values: array, width: int) -> Array:
    """Columns (width, rows) of rows that were appended one after the other."""
    return np.frombuffer(values, np.int64).reshape(-1, width).T if values else np.empty((width, 0), np.int64)


def _messages(values: array) -> Messages:
    kernel, group, sent, received = _table(values, 4)
    return Messages.build(kernel=kernel, group=group, in_bytes=sent, out_bytes=received)


def _copy_kind(name: str) -> tuple[int, int, int]:
    """(copyKind, source memory, target memory) of "Memcpy HtoD (Pinned -> Device)"."""
    match = _MEMCPY_NAME.search(name)
    if match is None:
        return 0, UNKNOWN_MEMORY, UNKNOWN_MEMORY
    source, target, source_memory, target_memory = (part.lower() for part in match.groups())
    return (
        _COPY_CODES.get(f"{source[-1]}to{target[0]}", 0),
        _MEMORY_CODES.get(source_memory.replace(" ", "_"), UNKNOWN_MEMORY),
        _MEMORY_CODES.get(target_memory.replace(" ", "_"), UNKNOWN_MEMORY),
    )


def _memset_memory(name: str) -> tuple[int, int]:
    match = _MEMSET_NAME.search(name)
    code = _MEMORY_CODES.get(match[1].lower().replace(" ", "_"), UNKNOWN_MEMORY) if match else UNKNOWN_MEMORY
    return code, code


def _input_bytes(args: dict[str, Any]) -> int:
    """Bytes of the tensors that a CPU collective was given ("Input Dims", "Input type"); -1 when not recorded."""
    total = 0
    shapes, types = args.get("Input Dims"), args.get("Input type")
    if not shapes or not types:
        return -1
    for shape, kind in zip(shapes, types, strict=False):
        width = _ELEMENT_BYTES.get(str(kind).lower())
        if width is None or not all(isinstance(n, int) for n in shape):
            return -1
        total += width * int(np.prod(shape, dtype=np.int64))
    return total


def cpu_kernels(collectives: Array, operators: Array) -> Kernels:
    """Collectives, then operators cut to the pieces in which they were innermost, as kernels of `CPU_DEVICE`.

    Both arguments are columns (start_ns, end_ns, thread, name). Operators inside a collective of their own thread
    (the copies with which gloo does its work) belong to it and are left out.
    """
    pieces = array("q")
    threads = np.unique(operators[2])
    for thread in threads:
        mine = operators[:, operators[2] == thread]
        busy = collectives[:, collectives[2] == thread]
        if busy.shape[1]:
            busy = busy[:, np.argsort(busy[0], kind="stable")]
            index = np.searchsorted(busy[0], mine[0], side="right") - 1
            mine = mine[:, (index < 0) | (mine[0] >= busy[1][index])]
        _innermost(mine, pieces)
    start, end, thread_of, name, first = _table(pieces, 5)
    return Kernels.build(
        process=np.zeros(collectives.shape[1] + len(start), np.int16),
        device=np.full(collectives.shape[1] + len(start), CPU_DEVICE),
        stream=np.concatenate([collectives[2], thread_of]),
        start_ns=np.concatenate([collectives[0], start]),
        end_ns=np.concatenate([collectives[1], end]),
        name=np.concatenate([collectives[3], name]),
        correlation=np.full(collectives.shape[1] + len(start), NO_CORRELATION),
        counted=np.concatenate([np.ones(collectives.shape[1], bool), first.astype(bool)]),
    )


def _innermost(operators: Array, pieces: Any) -> None:
    """Append (start, end, thread, name, first piece?) for the nested operators of one thread.

    Every operator gives at least one piece, of length zero if its children fill it, so that counts stay right. A
    child that rounding lets outlast its parent is cut to it.
    """
    rows = np.lexsort((-operators[1], operators[0]))
    stack: list[list[int]] = []  # [end, thread, name, first, resume_at]

    def close(until: int) -> None:
        while stack and stack[-1][0] <= until:
            end, thread, name, first, resume = stack.pop()
            if end > resume or first:
                pieces.extend((resume, end, thread, name, first))
            if stack:
                stack[-1][4] = max(stack[-1][4], end)

    for start, end, thread, name in operators[:, rows].T.tolist():
        close(start)
        if stack:
            top = stack[-1]
            end = min(end, top[0])
            if start > top[4]:
                pieces.extend((top[4], start, top[1], top[2], top[3]))
                top[3] = 0
            top[4] = start
        stack.append([end, thread, name, 1, start])
    close(2**63 - 1)
