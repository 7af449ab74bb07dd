"""Sizes of NCCL's messages in nsys exports, from the payloads of its own NVTX ranges (`ncclAllReduce`, ...).

A payload is a header of 32 bytes (uint32 domain, reserved, schema, reserved; uint64 size of the payload, total size)
and the fields, each at the offset that NVTX_PAYLOAD_SCHEMA_ENTRIES gives. Exports hold payloads only if they were made
with --include-blobs. A size is what one rank puts in; of a reduce-scatter it is what one rank gets.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from struct import unpack_from
from typing import NamedTuple

import numpy as np

from tunemap.trace.arrays import Calls, Kernels, Messages

SIZE_FIELD = "Message size [bytes]"
_HEADER_BYTES, _SIZE_BYTES = 32, 8


class Announced(NamedTuple):
    """A call of NCCL that announced a message."""

    process: int
    thread: int
    start_ns: int
    name: str
    bytes: int


def payload_bytes(blob: bytes, offsets: Mapping[tuple[int, int], int]) -> int | None:
    """The size of the message that a payload announces; None where its schema has no such field, or it is cut short.

    `offsets`: of SIZE_FIELD in the payload, by (domain, schema).
    """
    if len(blob) < _HEADER_BYTES:
        return None
    domain, _, schema, _ = unpack_from("<4I", blob)
    offset = offsets.get((domain, schema))
    if offset is None or len(blob) < _HEADER_BYTES + offset + _SIZE_BYTES:
        return None
    return int(unpack_from("<Q", blob, _HEADER_BYTES + offset)[0])


def messages_of(
    kernels: Kernels, calls: Calls, communicates: Iterable[int], announced: Iterable[Announced]
) -> Messages:
    """What each communication kernel sent: the messages that its thread announced since the one launched before it.

    A kernel is launched inside of the announcing call, or after several of them, when their group ends; then their
    sizes add up. `communicates`: rows of the kernels that are NCCL's.
    """
    rows = list(communicates)
    launching = np.flatnonzero(np.isin(calls.correlation, kernels.correlation[rows]))  # of millions of calls
    columns = (calls.process, calls.correlation, calls.thread, calls.start_ns)
    launches = {
        (int(process), int(correlation)): (int(thread), int(start))
        for process, correlation, thread, start in zip(*(column[launching] for column in columns), strict=True)
    }
    events: dict[tuple[int, int], list[tuple[int, int, int, str]]] = defaultdict(list)  # by (process, thread)
    for one in announced:
        events[one.process, one.thread].append((one.start_ns, -1, one.bytes, one.name))
    for row in rows:
        process = int(kernels.process[row])
        launch = launches.get((process, int(kernels.correlation[row])))
        if launch is not None:
            events[process, launch[0]].append((launch[1], int(row), 0, ""))
    found: list[tuple[int, int, int]] = []
    for of_thread in events.values():
        given = received = -1
        for _, row, size, name in sorted(of_thread):
            if row < 0 and "ReduceScatter" in name:
                received = max(received, 0) + size
            elif row < 0:
                given = max(given, 0) + size
            else:
                if max(given, received) >= 0:
                    found.append((row, given, received))
                given = received = -1
    table = np.array(sorted(found), np.int64).reshape(-1, 3)
    return Messages.build(
        kernel=table[:, 0], group=np.full(len(table), -1, np.int32), in_bytes=table[:, 1], out_bytes=table[:, 2]
    )
