"""Reports of several nodes on one clock: by their start in UTC, and by collectives that end together."""

import dataclasses
import sqlite3

import numpy as np
import pytest
import trace_generator
from test_facts import NCCL, make

from tunemap.trace.categories import load_rules
from tunemap.trace.clocks import on_one_clock
from tunemap.trace.command import read_traces

RULES = load_rules()
ENDS = (1_000_000, 2_000_000, 3_500_000, 9_000_000)
UTC = 1_750_000_000_000_000_000


def report(began_ns, ahead_ns, ends=ENDS, work=300_000):
    """A node's report: collectives that end at `ends` of the true clock, on a clock that is ahead by so much."""
    shift = UTC + ahead_ns - began_ns
    kernels = [(NCCL, end - work - i + shift, end + shift) for i, end in enumerate(ends)]
    return dataclasses.replace(make([*kernels, ("gemm", ENDS[0] + shift, ENDS[0] + 50 + shift)]), began_ns=began_ns)


def test_collectives_show_what_the_clocks_are_apart():
    first = report(UTC, 0)
    other = report(UTC + 5_000_000_000, 734_211, work=100_000)  # began 5 s later, its clock 734 µs ahead, arrives late
    same, shifted = on_one_clock([first, other], RULES)
    assert same is first
    assert shifted.kernels.end_ns.tolist() == first.kernels.end_ns.tolist()
    durations = [(rows.end_ns - rows.start_ns).tolist() for rows in (other.kernels, shifted.kernels)]
    assert durations[0] == durations[1]
    (note,) = shifted.notes
    assert "its clock was 734.2 µs ahead of the first report's, by the ends of 4 collectives" in note
    assert "they are 0.0 µs apart" in note


def test_an_outlier_moves_nothing():
    late = (ENDS[0] + 40_000, *ENDS[1:])
    _, shifted = on_one_clock([report(UTC, 0), report(UTC, -90_000, ends=late)], RULES)
    assert shifted.kernels.end_ns[1:4].tolist() == list(ENDS[1:])


@pytest.mark.parametrize("ends", [ENDS[:2], (5_000_000, 18_000_000, 40_000_000, 77_000_000)], ids=["few", "unrelated"])
def test_where_collectives_do_not_belong_together_utc_decides(ends):
    _, shifted = on_one_clock([report(UTC, 0), report(UTC + 1000, 0, ends=ends)], RULES)
    assert shifted.kernels.end_ns[: len(ends)].tolist() == list(ends)
    assert "by its start in UTC alone" in shifted.notes[0]


def test_reports_that_do_not_say_when_they_began_stay_as_they_are():
    traces = [report(UTC, 0), dataclasses.replace(report(UTC, 5), began_ns=None)]
    assert on_one_clock(traces, RULES) == traces


def test_two_exports_of_one_job_are_read_as_if_they_were_one(tmp_path):
    """The ranks of a made job in one file, and one file for each with another zero."""
    ranks = trace_generator.generate(2000, processes=2, steps=2)
    trace_generator.write_nsys(tmp_path / "both.sqlite", ranks)
    zeros = (0, 40_000_000_123)
    for index, (rank, zero) in enumerate(zip(ranks, zeros, strict=True)):
        path = tmp_path / f"node{index}.sqlite"
        trace_generator.write_nsys(path, [rank])
        with sqlite3.connect(path) as database:
            for table in ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET",
                          "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"):  # fmt: skip
                database.execute(f'UPDATE {table} SET start = start - {zero}, "end" = "end" - {zero}')
            database.execute("CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT)")
            database.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?, '')", [UTC + zero])
    one = read_traces([tmp_path / "both.sqlite"])
    two = read_traces([tmp_path / "node0.sqlite", tmp_path / "node1.sqlite"])
    for name in ("kernels", "copies", "calls", "ranges"):
        for column in ("start_ns", "end_ns"):
            assert np.array_equal(
                np.sort(getattr(getattr(one, name), column)), np.sort(getattr(getattr(two, name), column))
            )
