"""Reading nsys exports of every kind of schema, and every kind of bad file."""

import hashlib
import os
import sqlite3

import pytest
import trace_generator as generator

from tunemap.errors import UserError
from tunemap.trace.arrays import MEMSET
from tunemap.trace.categories import load_rules
from tunemap.trace.nsys import GRAPH_NAME, read_nsys

KEEP = load_rules().keeps_range


@pytest.fixture
def export(tmp_path):
    path = tmp_path / "report.sqlite"
    generator.write_nsys(path, generator.generate(800, processes=2, steps=3))
    return path


def change(path, *statements):
    with sqlite3.connect(path) as database:
        for statement in statements:
            database.execute(statement)


@pytest.mark.parametrize("version", [2022, 2023, 2024, 2025, 2026])
def test_every_schema_gives_the_same_rows(tmp_path, version):
    ranks = generator.generate(800, processes=2, steps=3)
    path = tmp_path / "report.sqlite"
    generator.write_nsys(path, ranks, version)
    trace = read_nsys(path, KEEP)
    assert [p.pid for p in trace.processes] == [r.pid for r in ranks]
    for index, rank in enumerate(ranks):
        mine = trace.kernels.take(trace.kernels.process == index)
        assert (mine.start_ns.tolist(), mine.end_ns.tolist()) == (
            rank.kernels.start.tolist(),
            rank.kernels.end.tolist(),
        )
        assert [trace.names[i] for i in mine.name] == [generator.NAMES[i] for i in rank.kernels.name]
        assert mine.correlation.tolist() == rank.kernels.correlation.tolist()
        copies = trace.copies.take((trace.copies.process == index) & (trace.copies.kind != MEMSET))
        own = rank.copies.name != 4
        assert copies.bytes.tolist() == rank.copy_bytes[own].tolist()
        ranges = trace.ranges.take(trace.ranges.process == index)
        assert sorted(trace.names[i] for i in ranges.name) == sorted(name for _, _, name, _ in rank.ranges)
    assert {trace.names[i] for i in trace.calls.name} == {
        "cudaLaunchKernel",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
    }


def test_the_file_is_not_modified(export):
    def state():
        return (
            hashlib.sha256(export.read_bytes()).hexdigest(),
            export.stat().st_mtime_ns,
            sorted(os.listdir(export.parent)),
        )

    before = state()
    read_nsys(export, KEEP)
    assert state() == before


def test_a_read_only_file_in_a_read_only_folder(export):
    export.chmod(0o444)
    export.parent.chmod(0o555)
    try:
        assert len(read_nsys(export, KEEP).kernels)
    finally:
        export.parent.chmod(0o755)


def test_a_path_with_characters_of_uris(export):
    odd = export.with_name("50% of #1? a b.sqlite")
    export.rename(odd)
    assert len(read_nsys(odd, KEEP).kernels)


def test_a_write_ahead_log_database_leaves_no_files_behind(export):
    change(export, "PRAGMA journal_mode = WAL")
    assert not export.with_name("report.sqlite-wal").exists()
    assert len(read_nsys(export, KEEP).kernels)
    assert sorted(os.listdir(export.parent)) == ["report.sqlite"]


def test_a_file_that_is_being_written_is_refused(export):
    with sqlite3.connect(export, isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="another program is writing this file"):
            read_nsys(export, KEEP)


def test_an_unfinished_journal_is_refused(export):
    export.with_name("report.sqlite-wal").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"report.sqlite-wal beside it holds unfinished changes"):
        read_nsys(export, KEEP)


def test_a_truncated_file_says_how_much_is_missing(export):
    data = export.read_bytes()
    export.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        UserError, match=f"truncated: its header announces {len(data)} bytes, the file has {len(data) // 2}"
    ):
        read_nsys(export, KEEP)


def test_a_damaged_page_is_no_traceback(export):
    data = bytearray(export.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    export.write_bytes(data)
    with pytest.raises(UserError, match="damaged or truncated SQLite file"):
        read_nsys(export, KEEP)


def test_another_database_is_no_export(tmp_path):
    path = tmp_path / "other.sqlite"
    change(path, "CREATE TABLE cats (name TEXT)", "INSERT INTO cats VALUES ('Tom')")
    with pytest.raises(UserError, match="no nsys export"):
        read_nsys(path, KEEP)


def test_text_in_an_integer_column_is_no_traceback(export):
    change(export, "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET streamId = 'seven' WHERE rowid = 3")
    with pytest.raises(UserError, match="must hold integers"):
        read_nsys(export, KEEP)


def test_an_export_from_before_2022_names_the_missing_column(tmp_path):
    path = tmp_path / "old.sqlite"
    change(
        path,
        "CREATE TABLE StringIds (id INTEGER, value TEXT)",
        "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, streamId INT, demangledName INT)",
        "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (1, 2, 0, 7, 1)",
    )
    with pytest.raises(UserError, match="CUPTI_ACTIVITY_KIND_KERNEL has no column globalPid"):
        read_nsys(path, KEEP)


def test_negative_durations_are_left_out_and_counted(export):
    before = len(read_nsys(export, KEEP).kernels)
    change(export, 'UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET "end" = start - 5 WHERE rowid IN (2, 5)')
    trace = read_nsys(export, KEEP)
    assert len(trace.kernels) == before - 2
    assert trace.notes == (
        "report.sqlite: 2 rows of CUPTI_ACTIVITY_KIND_KERNEL end before they start and were left out",
    )


def test_names_that_are_not_utf8_are_kept_readable(export):
    change(export, "UPDATE StringIds SET value = CAST(x'66ff6f' AS TEXT) WHERE value LIKE 'nvjet%'")
    assert "f\ufffdo" in read_nsys(export, KEEP).names


def test_a_name_that_is_missing_is_called_so(export):
    change(export, "DELETE FROM StringIds WHERE value LIKE 'nvjet%'")
    assert any("is not in the export" in name for name in read_nsys(export, KEEP).names)


def test_an_extra_column_and_null_values_do_no_harm(export):
    change(
        export,
        "ALTER TABLE CUPTI_ACTIVITY_KIND_MEMCPY ADD COLUMN name TEXT",
        "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET correlationId = NULL WHERE rowid = 1",
    )
    trace = read_nsys(export, KEEP)
    assert trace.kernels.correlation[0] == -1


def test_nvtx_alone_has_no_device_work(export):
    change(export, *(f"DROP TABLE CUPTI_ACTIVITY_KIND_{t}" for t in ("KERNEL", "MEMCPY", "MEMSET", "RUNTIME")))
    trace = read_nsys(export, KEEP)
    assert len(trace.kernels) == len(trace.calls) == 0
    assert len(trace.ranges)
    assert trace.notes == ("report.sqlite: no CUDA kernels, copies or memsets in this export",)


def test_an_open_range_ends_with_the_capture(export):
    change(export, 'UPDATE NVTX_EVENTS SET "end" = NULL WHERE rowid = 1')
    trace = read_nsys(export, KEEP)
    last = max(trace.kernels.end_ns.max(), trace.calls.end_ns.max(), trace.ranges.end_ns.max())
    assert trace.ranges.end_ns[0] == last
    assert "1 ranges were still open" in trace.notes[0]


def test_graphs_traced_as_a_whole_keep_the_device_busy(export):
    change(
        export,
        """CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER, deviceId INTEGER, graphId INTEGER,
           streamId INTEGER, correlationId INTEGER, globalPid INTEGER)""",
        f"INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (10, 50, 0, 1, 7, 3, {1 << 48 | 1000 << 24})",
    )
    trace = read_nsys(export, KEEP)
    assert trace.names[trace.kernels.name[-1]] == GRAPH_NAME
    assert "--cuda-graph-trace=node" in trace.notes[0]


def test_lost_events_are_mentioned_without_the_text_of_the_tool(export):
    change(
        export,
        "CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, severity INTEGER, text TEXT)",
        "INSERT INTO DIAGNOSTIC_EVENT VALUES (1, 2, 'Some events were lost: /home/alice/report')",
        "INSERT INTO DIAGNOSTIC_EVENT VALUES (1, 1, 'Process launched')",
    )
    assert read_nsys(export, KEEP).notes == (
        "report.sqlite: nsys reports lost or incomplete data in 1 diagnostic messages",
    )


def test_the_device_is_named_by_its_ordinal_not_its_id(shared_traces):
    trace = read_nsys(shared_traces / "nsys" / "synthetic_4gpu.sqlite", KEEP)
    assert [p.device_names for p in trace.processes] == [{i: "NVIDIA A100-SXM4-80GB"} for i in range(4)]


def test_a_join_needs_the_process(shared_traces):
    """correlationId alone gives 4,280 launches for the 3,986 kernels that have one."""
    trace = read_nsys(shared_traces / "nsys" / "torchrun_2xh100_sendrecv_2026.2.sqlite", KEEP)
    pairs = set(zip(trace.calls.process.tolist(), trace.calls.correlation.tolist(), strict=True))
    known = [
        pair in pairs for pair in zip(trace.kernels.process.tolist(), trace.kernels.correlation.tolist(), strict=True)
    ]
    assert sum(known) == 3986
