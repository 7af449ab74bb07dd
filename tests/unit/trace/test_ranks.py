"""Waiting and transfer of collectives across ranks, and the reasons why they cannot be told apart."""

import dataclasses
import re

import pytest
from test_facts import NCCL, make
from test_real_traces import rows

from tunemap.trace.arrays import Group, Messages
from tunemap.trace.facts import FactOptions, compute_facts

GATHER = "ncclDevKernel_AllGather_RING_LL"


def collectives(trace):
    return rows(compute_facts(trace).tables["collectives"])


def test_the_shortest_of_the_ranks_is_the_transfer():
    trace = make(
        kernels=[
            (NCCL, 0, 100, -1, 0), (NCCL, 60, 100, -1, 1),  # rank 1 comes late
            (NCCL, 200, 230, -1, 0), (NCCL, 150, 230, -1, 1),  # rank 0 comes late
            (GATHER, 300, 320, -1, 0), (GATHER, 300, 320, -1, 1),
        ],
        processes=2,
    )  # fmt: skip
    found = {
        (r["process"], r["collective"]): (r["count"], r["transfer_ns"], r["waiting_ns"]) for r in collectives(trace)
    }
    assert found == {
        (0, "allreduce"): (2, 70, 60), (1, "allreduce"): (2, 70, 50),
        (0, "allgather"): (1, 20, 0), (1, "allgather"): (1, 20, 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernels", "world_size", "reason"),
    [
        ([(NCCL, 0, 10, -1, 0)], None, "only one is here"),
        ([(NCCL, 0, 10, -1, 0), (NCCL, 0, 10, -1, 1)], 4, "2 of 4 are here"),
        ([(NCCL, 0, 10, -1, 0), (NCCL, 20, 30, -1, 0), (NCCL, 0, 10, -1, 1)], None, "different numbers of calls"),
        ([(NCCL, 0, 10, -1, 0), (NCCL, 20, 30, -1, 1)], None, "do not overlap in time"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_empty_with_the_reason(kernels, world_size, reason):
    trace = make(kernels=kernels, processes=2)
    processes = tuple(dataclasses.replace(p, world_size=world_size) for p in trace.processes)
    for row in collectives(dataclasses.replace(trace, processes=processes)):
        assert row["transfer_ns"] is None
        assert row["waiting_ns"] is None
        assert row["time_ns"] > 0
        assert re.search(reason, row["reason"])


def test_an_unknown_world_size_is_noted_and_can_be_given():
    trace = make(kernels=[(NCCL, 0, 10, -1, 0), (NCCL, 4, 10, -1, 1)], processes=2)
    assumed = compute_facts(trace)
    assert assumed.summary["notes"] == ["world size unknown: waiting and transfer hold if the 2 ranks here are all"]
    assert assumed.tables["collectives"]["transfer_ns"] == [6, 6]
    known = compute_facts(trace, options=FactOptions(world_size=2))
    assert (known.summary["notes"], known.tables["collectives"]["transfer_ns"]) == ([], [6, 6])
    more = compute_facts(trace, options=FactOptions(world_size=8))
    assert more.tables["collectives"]["reason"] == ["needs every rank: 2 of 8 are here"] * 2


def test_groups_are_matched_on_their_own():
    """Two process groups in one trace: the pairs are (0, 1) in the first, and process 0 alone has the second."""
    trace = make(kernels=[(NCCL, 0, 10, -1, 0), (NCCL, 20, 50, -1, 0), (NCCL, 4, 10, -1, 1)], processes=2)
    trace = dataclasses.replace(
        trace,
        groups=(Group("0 [0, 1]", 2), Group("1 [0]", 1)),
        messages=Messages.build(kernel=[0, 1, 2], group=[0, 1, 0], in_bytes=[64, 8, 64], out_bytes=[64, 8, 64]),
    )
    found = [(r["process"], r["group"], r["transfer_ns"], r["bytes"]) for r in collectives(trace)]
    assert found == [(0, "1 [0]", None, 8), (0, "0 [0, 1]", 6, 64), (1, "0 [0, 1]", 6, 64)]
