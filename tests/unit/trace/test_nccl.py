"""Sizes of NCCL's messages: read from payloads, and given to the kernels that carried them."""

import sqlite3
from struct import pack

import pytest

from tunemap.trace.command import read_traces
from tunemap.trace.nccl import SIZE_FIELD, payload_bytes

DOMAIN, SCHEMA = 1, 16777223


def blob(size, domain=DOMAIN, schema=SCHEMA):
    """As nsys writes it: header, communicator id, message size, operation."""
    payload = pack("<QQQ", 0xABCD, size, 0)
    return pack("<4IQQ", domain, 0, schema, 0, len(payload), 32 + len(payload)) + payload


def test_a_size_is_read_where_the_schema_puts_it():
    offsets = {(DOMAIN, SCHEMA): 8}
    assert payload_bytes(blob(4096), offsets) == 4096
    assert payload_bytes(blob(2**40), offsets) == 2**40
    assert payload_bytes(blob(4096, schema=1), offsets) is None
    assert payload_bytes(blob(4096)[:40], offsets) is None
    assert payload_bytes(b"", offsets) is None


@pytest.fixture
def export(tmp_path):
    """A process with one all-reduce inside its call, a group of two messages in one kernel, and a reduce-scatter."""
    path, thread = tmp_path / "report.sqlite", (7 << 24) + 9
    launches = [(15, 1), (45, 2), (55, 3), (65, 4)]  # (time of launch, correlation)
    names = {1: "ncclDevKernel_AllReduce", 2: "ncclDevKernel_SendRecv", 3: "gemm", 4: "ncclDevKernel_ReduceScatter"}
    events = [(10, 20, "ncclAllReduce", 100), (30, 32, "ncclSend", 7), (33, 35, "ncclRecv", 8),
              (60, 64, "ncclReduceScatter", 50)]  # fmt: skip
    with sqlite3.connect(path) as connection:
        connection.executescript("""
            CREATE TABLE StringIds (id INTEGER, value TEXT);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER, streamId INTEGER,
                correlationId INTEGER, globalPid INTEGER, demangledName INTEGER, shortName INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
                correlationId INTEGER, nameId INTEGER);
            CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER,
                globalTid INTEGER, domainId INTEGER, binaryData BLOB);
            CREATE TABLE NVTX_PAYLOAD_SCHEMA_ENTRIES (domainId INTEGER, schemaId INTEGER, idx INTEGER, name TEXT,
                offset INTEGER);""")
        strings = {**names, 9: "cudaLaunchKernel"}
        connection.executemany("INSERT INTO StringIds VALUES (?, ?)", strings.items())
        connection.execute(
            "INSERT INTO NVTX_PAYLOAD_SCHEMA_ENTRIES VALUES (?, ?, 1, ?, 8)", (DOMAIN, SCHEMA, SIZE_FIELD)
        )
        for time, correlation in launches:
            kernel = (time + 100, time + 105, 0, 7, correlation, 7 << 24, correlation, correlation)
            connection.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?, ?)", kernel)
            call = (time, time + 1, thread, correlation, 9)
            connection.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?)", call)
        for start, end, text, size in events:
            row = (start, end, 59, text, thread, DOMAIN, blob(size))
            connection.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, NULL, ?, ?, ?)", row)
    connection.close()
    return path


def test_messages_belong_to_the_kernel_that_carried_them(export):
    trace = read_traces([export])
    found = {
        trace.names[trace.kernels.name[kernel]]: (int(given), int(received))
        for kernel, given, received in zip(
            trace.messages.kernel, trace.messages.in_bytes, trace.messages.out_bytes, strict=True
        )
    }
    assert found == {
        "ncclDevKernel_AllReduce": (100, -1),
        "ncclDevKernel_SendRecv": (15, -1),  # both messages of the group
        "ncclDevKernel_ReduceScatter": (-1, 50),
    }
