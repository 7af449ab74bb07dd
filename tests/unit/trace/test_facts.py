"""Facts against the generator's truth, and against small traces that one can check by eye."""

import numpy as np
import pytest
import trace_generator as generator
from test_real_traces import check_sums, rows

from tunemap.errors import UserError
from tunemap.trace.arrays import Calls, Copies, Kernels, Messages, Process, Ranges, Trace
from tunemap.trace.command import read_traces
from tunemap.trace.facts import FactOptions, compute_facts

GEMM, ADD, NCCL = "gemm_kernel", "elementwise_kernel", "ncclDevKernel_AllReduce_Sum"


def make(kernels=(), copies=(), calls=(), ranges=(), processes=1):
    """A trace of rows: kernels (name, start, end[, correlation[, process]]), copies (kind, start, end, bytes[, corr]),
    calls (name, start, end, correlation[, thread]), ranges (name, start, end[, thread])."""
    names: dict[str, int] = {}

    def code(name):
        return names.setdefault(name, len(names))

    def column(table, index, default):
        return [row[index] if len(row) > index else default for row in table]

    return Trace(
        source="nsys",
        processes=tuple(Process("t.sqlite", 100 + i) for i in range(processes)),
        kernels=Kernels.build(
            process=column(kernels, 4, 0), device=[0] * len(kernels), stream=[7] * len(kernels),
            start_ns=column(kernels, 1, 0), end_ns=column(kernels, 2, 0), name=[code(k[0]) for k in kernels],
            correlation=column(kernels, 3, -1), counted=[True] * len(kernels),
        ),
        copies=Copies.build(
            process=[0] * len(copies), device=[0] * len(copies), stream=[7] * len(copies),
            start_ns=column(copies, 1, 0), end_ns=column(copies, 2, 0), correlation=column(copies, 4, -1),
            bytes=column(copies, 3, 0), kind=column(copies, 0, 0), source_memory=[2] * len(copies),
            target_memory=[2] * len(copies), source_device=[0] * len(copies), target_device=column(copies, 5, 0),
        ),
        calls=Calls.build(
            process=[0] * len(calls), thread=column(calls, 4, 1), start_ns=column(calls, 1, 0),
            end_ns=column(calls, 2, 0), name=[code(c[0]) for c in calls], correlation=column(calls, 3, -1),
        ),
        ranges=Ranges.build(
            process=[0] * len(ranges), thread=column(ranges, 3, 1), start_ns=column(ranges, 1, 0),
            end_ns=column(ranges, 2, 0), name=[code(r[0]) for r in ranges],
        ),
        messages=Messages.empty(),
        names=tuple(names),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[(1, False), (2, True)], ids=["own devices", "all say device 0"])
def generated(request, tmp_path_factory):
    """(ranks, folder) of one job written as nsys in order, nsys shuffled, and Kineto shuffled."""
    seed, collide = request.param
    ranks = generator.generate(6000, 4000, processes=3, seed=seed, collide=collide)
    folder = tmp_path_factory.mktemp("generated")
    generator.write_nsys(folder / "plain.sqlite", ranks, 2022)
    generator.write_nsys(folder / "shuffled.sqlite", ranks, 2026, shuffle=5)
    for rank in ranks:
        generator.write_kineto(folder / f"rank{rank.index}.json.gz", rank, len(ranks), shuffle=rank.index)
    return ranks, folder


def facts_of(folder, *names):
    return compute_facts(read_traces([folder / name for name in names]))


@pytest.mark.parametrize("name", ["plain.sqlite", "shuffled.sqlite"])
def test_the_generators_truth_is_matched_exactly(generated, name):
    ranks, folder = generated
    facts = facts_of(folder, name)
    check_sums(facts)
    assert len(facts.summary["devices"]) == len(ranks)
    for rank, device in zip(ranks, facts.summary["devices"], strict=True):
        assert (device["pid"], device["device"]) == (rank.pid, rank.device)
        found = device | device["launch"]
        assert {key: found[key] for key in rank.truth} == rank.truth
        own = {"process": rank.index}
        assert {
            (r["phase"], r["category"]): (r["count"], r["time_ns"], r["wall_ns"])
            for r in rows(facts.tables["phases"], **own)
        } == generator.true_phases(rank)
        assert {
            r["name"]: (r["count"], r["time_ns"], r["wall_ns"]) for r in rows(facts.tables["kernels"], **own)
        } == generator.true_kernels(rank)
        assert {
            (r["kind"], r["scope"], r["phase"]): (r["count"], r["bytes"], r["time_ns"], r["wall_ns"])
            for r in rows(facts.tables["copies"], **own)
        } == generator.true_copies(rank)
        peers = {(r["from_device"], r["to_device"]) for r in rows(facts.tables["copies"], **own, scope="peer")}
        assert peers == {(rank.device, generator.peer_of(rank, len(ranks)))}


def test_order_of_rows_changes_nothing(generated):
    _, folder = generated
    plain, shuffled = facts_of(folder, "plain.sqlite"), facts_of(folder, "shuffled.sqlite")
    assert shuffled.tables == plain.tables
    for a, b in zip(plain.summary["devices"], shuffled.summary["devices"], strict=True):
        assert a | {"trace": None} == b | {"trace": None}


def test_the_same_events_from_kineto_give_the_same_facts(generated):
    ranks, folder = generated
    nsys = facts_of(folder, "plain.sqlite")
    kineto = facts_of(folder, *(f"rank{rank.index}.json.gz" for rank in ranks))
    assert kineto.tables == nsys.tables
    for a, b in zip(nsys.summary["devices"], kineto.summary["devices"], strict=True):
        assert a | {"trace": None} == b | {"trace": None}


def test_partition_by_eye():
    facts = compute_facts(
        make(
            kernels=[(GEMM, 0, 100), (ADD, 50, 120), (NCCL, 110, 160), (NCCL, 200, 210)],
            copies=[(8, 150, 170, 1000), (1, 180, 190, 10)],
        )
    )
    (d,) = facts.summary["devices"]
    assert [d[k] for k in ("window_ns", "compute_ns", "communication_ns", "overlap_ns", "exposed_communication_ns",
                           "copy_ns", "exposed_copy_ns", "idle_ns", "kernel_busy_ns")] == [
        210, 120, 60, 10, 50, 30, 20, 20, 170]  # fmt: skip
    assert d["nccl_time_sum_share"] == 60 / 230
    assert d["nccl_busy_share"] == 60 / 210
    assert d["nccl_exposed_share"] == 50 / 210
    assert d["overlap_ratio"] == 10 / 60
    assert [(r["name"], r["wall_ns"]) for r in rows(facts.tables["kernels"])] == [(GEMM, 100), (ADD, 20), (NCCL, 50)]


def test_an_undefined_share_is_null_with_its_reason():
    facts = compute_facts(make(copies=[(1, 0, 10, 5)]))
    (d,) = facts.summary["devices"]
    assert d["nccl_time_sum_share"] is None
    assert d["reasons"]["nccl_time_sum_share"] == "no kernel time in the window"
    assert d["overlap_ratio"] is None
    assert d["reasons"]["overlap_ratio"] == "no communication in the window"
    assert (d["kernel_count"], d["nccl_busy_share"], d["other_time_share"]) == (0, 0.0, None)


def test_kernels_without_length_do_no_harm():
    (d,) = compute_facts(make(kernels=[(GEMM, 5, 5)])).summary["devices"]
    assert (d["window_ns"], d["kernel_count"], d["nccl_busy_share"]) == (0, 1, None)
    assert d["reasons"]["nccl_busy_share"] == "the window is empty"


def test_phase_comes_from_the_launch_and_its_process():
    facts = compute_facts(
        make(
            kernels=[(GEMM, 1000, 1010, 1), (GEMM, 1020, 1030, 2), (GEMM, 1040, 1050, 3), (GEMM, 1060, 1070, 99)],
            calls=[
                ("cudaLaunchKernel", 10, 12, 1, 1),  # main thread, forward
                ("cudaLaunchKernel", 110, 112, 2, 8),  # autograd thread, where no range is open
                ("cudaLaunchKernel", 250, 252, 3, 1),  # after all ranges
            ],
            ranges=[("forward", 0, 100), ("backward", 100, 200), ("data", 105, 190, 9)],
        )
    )
    assert {r["phase"]: r["count"] for r in rows(facts.tables["phases"])} == {
        "forward": 1, "backward": 1, "unattributed": 2}  # fmt: skip


def test_the_innermost_range_decides():
    facts = compute_facts(
        make(
            kernels=[(GEMM, 1000, 1010, 1), (GEMM, 1020, 1030, 2)],
            calls=[("cudaLaunchKernel", 50, 52, 1), ("cudaLaunchKernel", 80, 82, 2)],
            ranges=[("forward", 0, 100), ("optimizer", 40, 60)],
        )
    )
    assert {r["phase"]: r["count"] for r in rows(facts.tables["phases"])} == {"optimizer": 1, "forward": 1}


def test_launch_latency_and_queue():
    facts = compute_facts(
        make(
            kernels=[(GEMM, 100, 200, 1), (GEMM, 200, 300, 2), (GEMM, 300, 400, 3), (GEMM, 450, 500, 4)],
            calls=[("cudaLaunchKernel", 10 * i, 10 * i + 5, i) for i in (1, 2, 3)]
            + [("cudaLaunchKernel", 460, 470, 4)],
        )
    )
    launch = facts.summary["devices"][0]["launch"]
    assert (launch["matched_count"], launch["negative_latency_count"]) == (4, 1)
    assert launch["latency_sum_ns"] == 90 + 180 + 270 - 10
    assert launch["latency_median_ns"] == (90 + 180) / 2
    assert launch["queue_depth_max"] == 3
    assert launch["queue_depth_mean"] == (90 + 180 + 270) / 400


def test_gaps_say_what_the_device_waited_for():
    ms = 1_000_000
    facts = compute_facts(
        make(
            kernels=[
                (GEMM, 0, ms, 1),
                (GEMM, 2 * ms, 3 * ms, 2),  # launched after the gap began: the host was late
                (GEMM, 4 * ms, 5 * ms, 3),  # the same, while the host sat in a synchronisation
                (GEMM, 6 * ms, 7 * ms, 4),  # launched long before: it waited for something else
                (GEMM, 7 * ms + 900, 8 * ms, 5),  # the same, but only for a moment
                (GEMM, 9 * ms, 10 * ms, 77),  # the capture has no launch of it
            ],
            calls=[
                ("cudaLaunchKernel", -10, -5, 1),
                ("cudaLaunchKernel", 2 * ms - 10, 2 * ms - 5, 2),
                ("cudaStreamSynchronize", 2 * ms + 10, 3 * ms + 50, 90),
                ("cudaLaunchKernel", 4 * ms - 10, 4 * ms - 5, 3),
                ("cudaLaunchKernel", 4 * ms, 4 * ms + 5, 4),
                ("cudaLaunchKernel", 4 * ms + 10, 4 * ms + 15, 5),
            ],
            ranges=[("forward", -100, 20 * ms)],
        )
    )
    assert {r["cause"]: (r["count"], r["time_ns"], r["phase"]) for r in rows(facts.tables["gaps"])} == {
        "host": (1, ms, "forward"),
        "host_sync": (1, ms, "forward"),
        "queued": (1, ms, "forward"),
        "short": (1, 900, "forward"),
        "unknown": (1, ms, "unattributed"),
    }


def test_the_window_of_the_steps_clips_and_says_what_it_left_out():
    trace = make(
        kernels=[(GEMM, 0, 40), (GEMM, 90, 150), (ADD, 160, 190), (GEMM, 290, 400)],
        copies=[(8, 20, 30, 64), (8, 152, 158, 64)],
        ranges=[("ProfilerStep#1", 100, 200), ("ProfilerStep#2", 200, 300)],
    )
    facts = compute_facts(trace, options=FactOptions(window="steps"))
    check_sums(facts)
    (d,) = facts.summary["devices"]
    names = ("window", "window_ns", "compute_ns", "copy_ns", "idle_ns", "kernel_count", "step_count")
    assert [d[k] for k in names] == [
        "steps", 200, 90, 6, 104, 3, 2]  # fmt: skip
    assert facts.summary["notes"] == ["pid 100 device 0: 1 kernels outside of the steps were left out"]
    assert rows(facts.tables["gaps"], cause="unknown")


def test_steps_that_nobody_marked_fall_back_with_a_note():
    facts = compute_facts(make(kernels=[(GEMM, 0, 40)]), options=FactOptions(window="steps"))
    assert facts.summary["devices"][0]["window"] == "gpu"
    assert "no step ranges in this process" in facts.summary["notes"][0]


def test_copies_over_time_are_divided_exactly():
    facts = compute_facts(
        make(kernels=[(GEMM, 0, 5)], copies=[(8, 10, 35, 1000), (10, 12, 14, 7, -1, 1), (100, 0, 99, 50)]),
        options=FactOptions(bucket_ns=10),
    )
    timeline = rows(facts.tables["copy_timeline"])
    assert [(r["scope"], r["bucket_start_ns"], r["count"], r["bytes"], r["time_ns"]) for r in timeline] == [
        ("local", 10, 1, 400, 10), ("local", 20, 0, 400, 10), ("local", 30, 0, 200, 5),
        ("peer", 10, 1, 7, 2)]  # fmt: skip
    assert {(r["kind"], r["scope"]) for r in rows(facts.tables["copies"])} == {
        ("dtod", "local"), ("ptop", "peer"), ("memset", "local")}  # fmt: skip


def test_buckets_too_small_for_memory_are_refused():
    with pytest.raises(UserError, match="--bucket-ms 1e-06: copies would fall into 2000000 buckets"):
        compute_facts(make(copies=[(8, 0, 2_000_000, 5)]), options=FactOptions(bucket_ns=1))


def test_a_device_copy_between_two_devices_is_a_peer_copy():
    facts = compute_facts(make(copies=[(8, 0, 10, 5, -1, 3), (8, 20, 30, 5, -1, 0)]))
    assert [(r["kind"], r["scope"], r["to_device"]) for r in rows(facts.tables["copies"])] == [
        ("dtod", "local", None), ("dtod", "peer", 3)]  # fmt: skip


def test_two_processes_on_device_0_stay_apart():
    facts = compute_facts(make(kernels=[(GEMM, 0, 10), (GEMM, 5, 25, -1, 1)], processes=2))
    assert [(d["pid"], d["compute_ns"]) for d in facts.summary["devices"]] == [(100, 10), (101, 20)]
    spread = next(r for r in facts.summary["imbalance"] if r["metric"] == "compute_ns")
    assert (spread["min"], spread["mean"], spread["max"], spread["max_process"]) == (10, 15, 20, 1)


def test_apis_are_summed_by_name():
    facts = compute_facts(
        make(
            kernels=[(GEMM, 0, 10)],
            calls=[("cudaLaunchKernel", 0, 4, 1), ("cudaLaunchKernel", 5, 15, 2), ("cudaMalloc", 20, 100, 3)],
        )
    )
    found = [(r["name"], r["count"], r["time_ns"], r["median_ns"], r["max_ns"]) for r in rows(facts.tables["apis"])]
    assert found == [("cudaMalloc", 1, 80, 80, 80), ("cudaLaunchKernel", 2, 14, 7, 10)]


def test_durations_too_long_to_be_packed_are_sorted_all_the_same():
    facts = compute_facts(make(kernels=[(f"k{i}", 0, 2**52 + i) for i in range(600)]))
    assert {r["name"]: r["max_ns"] for r in rows(facts.tables["kernels"])} == {f"k{i}": 2**52 + i for i in range(600)}


def test_waiting_in_an_operator_is_no_computation_while_a_collective_runs(tmp_path):
    import json

    def event(category, name, ts, dur, tid):
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": {}}

    path = tmp_path / "rank0.json"
    path.write_text(
        json.dumps(
            {
                "traceEvents": [
                    event("cpu_op", "aten::mm", 0, 10, 1),
                    event("cpu_op", "autograd::engine::evaluate_function: AddBackward0", 20, 30, 1),
                    event("user_annotation", "gloo:all_reduce", 5, 35, 2),
                ]
            }
        )
    )
    (d,) = compute_facts(read_traces([path])).summary["devices"]
    # 0-10 mm, 10-40 waiting for the collective, 40-50 the operator's own work
    names = ("window_ns", "compute_ns", "communication_ns", "exposed_communication_ns", "idle_ns")
    assert [d[k] // 1000 for k in names] == [50, 20, 35, 30, 0]
    assert d["operator_count"] == 3


def test_sums_of_random_traces_add_up():
    rng = np.random.default_rng(3)
    for _ in range(30):
        count = int(rng.integers(1, 40))
        start = rng.integers(0, 300, count)
        trace = make(
            kernels=[
                (rng.choice([GEMM, ADD, NCCL]), int(s), int(s + rng.integers(0, 60)), int(rng.integers(0, 9)))
                for s in start
            ],
            copies=[(int(rng.choice([1, 8, 10, 100])), int(s), int(s + rng.integers(0, 40)), 100) for s in start[::3]],
            calls=[("cudaLaunchKernel", int(s) - 5, int(s), int(c)) for c, s in enumerate(start[:8], 1)],
            ranges=[("forward", 0, 100), ("backward", 90, 200), ("data", 20, 30, 4)],
        )
        check_sums(compute_facts(trace, options=FactOptions(bucket_ns=int(rng.integers(1, 50)))))
