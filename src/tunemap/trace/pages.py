"""Integer columns of an SQLite table straight from the pages of the file, with numpy.

Reading millions of rows through sqlite3 costs a Python integer per value: about a second per million rows of seven
columns. Decoding the b-tree pages as arrays takes a small fraction of that and gives the same numbers in the same
order. It knows only what profiler tables need (rowid tables of short integer rows); for anything else, an overflow
page, a float, a text in a wanted column, a row with fewer columns, a damaged page, `integer_columns` returns None
and the caller asks sqlite3, which then also words the error.

Format: https://www.sqlite.org/fileformat2.html sections 1.6 (b-tree pages) and 2.1 (records). The caller holds a read
transaction, so that no writer changes the pages meanwhile.
"""

import os
from collections.abc import Sequence

import numpy as np

from tunemap.trace.arrays import Array

_INTERIOR, _LEAF = 0x05, 0x0D
_BATCH_BYTES = 1 << 24
_PAD = 8  # a value is read as the 8 bytes that end with it

_BYTES = np.array([0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0, *((t - 12) // 2 for t in range(12, 128))])
"""Length of a value by its serial type, for the types of one byte."""
_IS_INTEGER = np.isin(np.arange(128), [0, 1, 2, 3, 4, 5, 6, 8, 9])


class _UnsupportedError(Exception):
    """This table needs a real SQLite."""


def integer_columns(descriptor: int, root: int, columns: Sequence[int], defaults: Sequence[int]) -> list[Array] | None:
    """The values of some columns, in the order of the rows.

    Args:
        descriptor: the database file, open for reading. It must stay open as long as the transaction of the caller:
            on POSIX, closing any descriptor of a file gives up all locks that the process has on it.
        root: root page of the table (`sqlite_master.rootpage`).
        columns: positions of the wanted columns in the table; none may be an alias of the rowid.
        defaults: what a NULL in each wanted column means.

    Returns:
        One int64 array per column, or None when the table is not as simple as that.
    """
    header = os.pread(descriptor, 100, 0)
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    try:
        return _Table(descriptor, page_bytes, page_bytes - header[20]).read(root, columns, defaults)
    except (_UnsupportedError, IndexError, ValueError, ZeroDivisionError):
        return None


class _Table:
    def __init__(self, descriptor: int, page_bytes: int, usable_bytes: int) -> None:
        self.descriptor = descriptor
        self.page_bytes = page_bytes
        self.usable_bytes = usable_bytes
        self.page_count = os.fstat(descriptor).st_size // page_bytes

    def read(self, root: int, columns: Sequence[int], defaults: Sequence[int]) -> list[Array]:
        leaves = self._leaves(root)
        batch = max(1, _BATCH_BYTES // self.page_bytes)
        result: list[Array] = []
        rows = 0
        for at in range(0, len(leaves), batch):
            pages = leaves[at : at + batch]
            part = _decode(self._load(pages), len(pages), self.page_bytes, self.usable_bytes, columns, defaults)
            end = rows + len(part[0])
            if not result or end > len(result[0]):  # room for all rows, if the pages to come are as full as these
                capacity = end + (len(leaves) - at - len(pages)) * (len(part[0]) // len(pages) + 2)
                grown = [np.empty(capacity, np.int64) for _ in columns]
                for new, old in zip(grown, result, strict=False):
                    new[:rows] = old[:rows]
                result = grown
            for values, more in zip(result, part, strict=True):
                values[rows:end] = more
            rows = end
        return [values[:rows] for values in result]

    def _load(self, pages: Array) -> Array:
        """The pages behind each other, after `_PAD` bytes that make room for the 8 bytes before a value."""
        buffer = np.zeros(_PAD + len(pages) * self.page_bytes, np.uint8)
        view = buffer[_PAD:].data
        runs = np.flatnonzero(np.diff(pages) != 1) + 1
        for first, last in zip([0, *runs.tolist()], [*runs.tolist(), len(pages)], strict=True):
            target = view[first * self.page_bytes : last * self.page_bytes]
            if os.preadv(self.descriptor, [target], (int(pages[first]) - 1) * self.page_bytes) != len(target):
                raise _UnsupportedError
        return buffer

    def _leaves(self, root: int) -> Array:
        """Page numbers of the leaves from left to right."""
        level = np.array([root])
        for _ in range(20):  # deeper than any file can be
            if len(level) > self.page_count or level.min() < 1 or level.max() > self.page_count:
                raise _UnsupportedError
            kinds = {self._kind(int(level[0])), self._kind(int(level[-1]))}
            if kinds == {_LEAF}:
                return level
            if kinds != {_INTERIOR}:
                raise _UnsupportedError
            level = np.concatenate([self._children(int(page)) for page in level])
        raise _UnsupportedError

    def _kind(self, page: int) -> int:
        return self._page(page)[100 if page == 1 else 0]

    def _page(self, page: int) -> bytes:
        data = os.pread(self.descriptor, self.page_bytes, (page - 1) * self.page_bytes)
        if len(data) != self.page_bytes:
            raise _UnsupportedError
        return data

    def _children(self, page: int) -> Array:
        data = np.frombuffer(self._page(page), np.uint8)
        if page == 1 or data[0] != _INTERIOR:
            raise _UnsupportedError
        cells = _big16(data, np.array([3]))[0]
        pointers = _big16(data, 12 + 2 * np.arange(cells))
        left = (_big16(data, pointers) << 16) | _big16(data, pointers + 2)
        right = (_big16(data, np.array([8])) << 16) | _big16(data, np.array([10]))
        return np.concatenate([left, right])


def _big16(data: Array, at: Array) -> Array:
    return (data[at].astype(np.int64) << 8) | data[at + 1]


def _decode(
    buffer: Array, pages: int, page_bytes: int, usable_bytes: int, columns: Sequence[int], defaults: Sequence[int]
) -> list[Array]:
    """The wanted columns of all cells of some leaf pages."""
    bases = _PAD + np.arange(pages) * page_bytes
    if (buffer[bases] != _LEAF).any():
        raise _UnsupportedError
    cells = _big16(buffer, bases + 3)
    total = int(cells.sum())
    base = np.repeat(bases, cells)
    index = np.arange(total) - np.repeat(np.cumsum(cells) - cells, cells)
    at = base + _big16(buffer, base + 8 + 2 * index)

    payload, second = buffer[at].astype(np.int64), buffer[at + 1]
    long = payload >= 128
    payload = np.where(long, ((payload & 127) << 7) | second, payload)
    if (second[long] >= 128).any() or (payload > usable_bytes - 35).any():
        raise _UnsupportedError  # a payload of more than two bytes of length, or on overflow pages
    at += 1 + long
    running = np.ones(total, bool)
    for _ in range(9):  # past the rowid, whose length differs between rows
        more = buffer[at] >= 128
        at += running
        running &= more
        if not running.any():
            break

    header_bytes = buffer[at].astype(np.int64)
    last = max(columns)
    if (header_bytes >= 128).any() or (header_bytes - 1 <= last).any():
        raise _UnsupportedError
    end = at + header_bytes  # of the value before the first column
    values: dict[int, Array] = {}
    for column in range(last + 1):
        at += 1
        kind = buffer[at]
        if (kind >= 128).any():
            raise _UnsupportedError
        length = _BYTES[kind]
        end += length
        if column in columns:
            if not _IS_INTEGER[kind].all():
                raise _UnsupportedError
            values[column] = _integers(buffer, end, length, kind, defaults[columns.index(column)])
    if (end > len(buffer)).any():
        raise _UnsupportedError
    return [values[column] for column in columns]


def _integers(buffer: Array, end: Array, length: Array, kind: Array, default: int) -> Array:
    """Big-endian two's complement integers of `length` bytes that end before `end`."""
    eight: Array = np.ndarray((len(buffer) - 7,), ">i8", buffer=buffer.data, strides=(1,))
    value = eight[end - 8].astype(np.int64)
    shift = (64 - 8 * np.maximum(length, 1)).astype(np.int64)
    value = (value << shift) >> shift
    if (length == 0).any():
        constant = np.where(kind == 9, 1, np.where(kind == 8, 0, default))
        value = np.where(length == 0, constant, value)
    return value
