"""Every real trace against the brute-force oracle, to the nanosecond."""

from collections import defaultdict
from functools import cache
from pathlib import Path

import brute_force
import pytest

from tunemap.trace.categories import load_rules
from tunemap.trace.command import read_traces
from tunemap.trace.facts import compute_facts

RULES = load_rules()
kernel_category, operator_category, phase = (
    cache(f) for f in (RULES.kernel_category, RULES.operator_category, RULES.phase)
)
GPU_TRACES = [
    "nsys/minimal_2kernels_2026.1.sqlite",
    "nsys/single_t4_nvtx_2025.3.sqlite",
    "nsys/synthetic_4gpu.sqlite",
    "nsys/torchrun_2xh100_sendrecv_2026.2.sqlite",
    "kineto/alexnet_ddp_rank0.json.gz",
    "kineto/dlrm_rank0.json.gz",
    "kineto/dlrm_rank1.json.gz",
    "kineto/linear_train_phases.json.gz",
    "kineto/qwen1.5_0.5b_h100_inference.json.gz",
]
CPU_TRACES = ["kineto/cpu_only.json.gz", "kineto/rank_non_gpu.json.gz", "kineto/rank_not_found.json.gz"]
OURS = sorted((Path(__file__).parent / "data").glob("*.json.gz"))


def rows(table, **where):
    """Rows of a table as dicts, those where the named columns have these values."""
    every = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return [row for row in every if all(row[k] == v for k, v in where.items())]


def check_sums(facts):
    """The identities that hold for any trace: partition, and tables that add up to the totals."""
    for d in facts.summary["devices"]:
        place = {"process": d["process"], "device": d["device"]}
        assert (
            d["compute_ns"] + d["exposed_communication_ns"] + d["exposed_copy_ns"] + d["idle_ns"] == d["window_ns"]
        ), place
        count = d["kernel_count"] if d["device"] != "cpu" else d["operator_count"]
        time = d["kernel_time_sum_ns"] if d["device"] != "cpu" else d["operator_time_sum_ns"]
        for name in ("kernels", "categories", "phases"):
            own = rows(facts.tables[name], **place)
            assert sum(r["count"] for r in own) == count, (name, place)
            assert sum(r["time_ns"] for r in own) == time, (name, place)
            assert sum(r["wall_ns"] for r in own) == d["compute_ns"] + d["exposed_communication_ns"], (name, place)
        assert sum(r["wall_ns"] for r in rows(facts.tables["copies"], **place)) == d["exposed_copy_ns"]
        assert sum(r["time_ns"] for r in rows(facts.tables["gaps"], **place)) == d["idle_ns"]
        moved = [r for r in rows(facts.tables["copies"], **place) if r["kind"] != "memset"]
        timeline = rows(facts.tables["copy_timeline"], **place)
        for column in ("count", "bytes", "time_ns"):
            assert sum(r[column] for r in moved) == sum(r[column] for r in timeline)


@pytest.mark.parametrize("trace", GPU_TRACES)
def test_gpu_trace_equals_the_oracle(shared_traces, trace):
    path = shared_traces / trace
    raw, facts = brute_force.read(path), compute_facts(read_traces([path]))
    check_sums(facts)
    groups = defaultdict(lambda: ([], []))
    for op in raw.kernels:
        groups[op.process, op.device][0].append(op)
    for op in raw.copies:
        groups[op.process, op.device][1].append(op)
    assert len(facts.summary["devices"]) == len(groups)
    for (pid, device), d in zip(sorted(groups), facts.summary["devices"], strict=True):
        kernels, copies = groups[pid, device]
        assert d["device"] == device
        if path.suffix == ".sqlite":
            assert d["pid"] == pid
        expected = brute_force.partition(kernels, copies)
        assert {name: d[name] for name in expected} == expected
        time = sum(k.end - k.start for k in kernels)
        nccl = sum(k.end - k.start for k in kernels if "nccl" in k.name.lower())
        assert (d["kernel_count"], d["kernel_time_sum_ns"]) == (len(kernels), time)
        assert d["nccl_time_sum_share"] == nccl / time
        assert d["nccl_busy_share"] == expected["communication_ns"] / expected["window_ns"]
        assert d["nccl_exposed_share"] == expected["exposed_communication_ns"] / expected["window_ns"]
        place = {"process": d["process"], "device": device}
        phases = brute_force.phases(raw, kernels, phase, kernel_category, set(RULES.thread_phases))
        found = {(r["phase"], r["category"]): [r["count"], r["time_ns"]] for r in rows(facts.tables["phases"], **place)}
        assert found == phases
        by_name = defaultdict(lambda: [0, 0, []])
        for k in kernels:
            by_name[k.name][0] += 1
            by_name[k.name][1] += k.end - k.start
            by_name[k.name][2].append(k.end - k.start)
        found = {r["name"]: r for r in rows(facts.tables["kernels"], **place)}
        assert {n: (r["count"], r["time_ns"]) for n, r in found.items()} == {
            n: (c, t) for n, (c, t, _) in by_name.items()
        }
        for name, (_, _, durations) in by_name.items():
            ordered = sorted(durations)
            middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            row = found[name]
            assert (row["min_ns"], row["median_ns"], row["max_ns"]) == (ordered[0], middle, ordered[-1])
        copied = rows(facts.tables["copies"], **place)
        assert sum(r["bytes"] for r in copied) == sum(c.extra["bytes"] for c in copies)
        assert sum(r["time_ns"] for r in copied) == sum(c.end - c.start for c in copies)


@pytest.mark.parametrize("trace", [*CPU_TRACES, *OURS], ids=lambda t: Path(t).name)
def test_cpu_trace_equals_the_oracle(request, trace):
    path = trace if isinstance(trace, Path) else request.getfixturevalue("shared_traces") / trace
    raw, facts = brute_force.read(path), compute_facts(read_traces([path]))
    check_sums(facts)
    (d,) = facts.summary["devices"]
    expected = brute_force.cpu_partition(raw, operator_category, set(RULES.waiting_categories))
    assert {name: d[name] for name in expected} == expected
    assert d["device"] == "cpu"
    assert d["kernel_count"] is None
    assert d["nccl_exposed_share"] is None
    assert "no GPU" in d["reasons"]["kernel_count"]


@pytest.mark.parametrize("name", ["cpuonly_empty_tables_2023.4.sqlite", "cpuonly_no_cuda_tables_2023.4.sqlite"])
def test_a_capture_without_cuda_says_so_and_reports_no_zero(shared_traces, name):
    facts = compute_facts(read_traces([shared_traces / "nsys" / name]))
    assert facts.summary["devices"] == []
    assert facts.summary["notes"] == [f"{name}: no CUDA kernels, copies or memsets in this export"]
    assert all(not values for table in facts.tables.values() for values in table.values())


def test_the_synthetic_truth_is_matched(shared_traces):
    import json

    facts = compute_facts(read_traces([shared_traces / "nsys" / "synthetic_4gpu.sqlite"]))
    truth = json.loads((shared_traces / "nsys" / "synthetic_4gpu.truth.json").read_text())
    for expected, d in zip(truth["devices"].values(), facts.summary["devices"], strict=True):
        found = (d["pid"], d["kernel_count"], d["compute_ns"], d["communication_ns"], d["overlap_ns"],
                 d["exposed_communication_ns"], d["kernel_busy_ns"], d["kernel_time_sum_ns"],
                 d["communication_time_sum_ns"], d["launch"]["matched_count"])  # fmt: skip
        names = ("pid", "kernels", "compute_busy_ns", "nccl_busy_ns", "overlap_ns", "exposed_nccl_ns", "kernel_busy_ns",
                 "kernel_sum_ns", "nccl_sum_ns", "launches_with_runtime")  # fmt: skip
        assert found == tuple(expected[n] for n in names)
    collectives = defaultdict(lambda: [0, 0])
    for row in rows(facts.tables["collectives"]):
        collectives[row["collective"]][0] += row["count"]
        collectives[row["collective"]][1] += row["time_ns"]
    assert dict(collectives) == truth["collective_ns"]
    for device, buckets in truth["d2d_bytes_per_s"].items():
        local = rows(facts.tables["copies"], device=int(device), kind="dtod")
        assert sum(r["bytes"] for r in local) == sum(buckets.values())


def test_backward_is_found_although_autograd_launches_it(shared_traces):
    """Thread-scoped projection finds about 1 % of these kernels."""
    facts = compute_facts(read_traces([shared_traces / "nsys" / "synthetic_4gpu.sqlite"]))
    found = rows(facts.tables["phases"], phase="backward")
    assert (sum(r["count"] for r in found), round(sum(r["time_ns"] for r in found) / 1e6, 1)) == (11_276, 467.5)


def test_two_gloo_ranks_separate_waiting_from_transfer():
    paths = [p for p in OURS if "fsdp" in p.name]
    facts = compute_facts(read_traces(paths))
    for collective in ("allgather", "allreduce"):
        a, b = rows(facts.tables["collectives"], collective=collective)
        assert a["transfer_ns"] == b["transfer_ns"] > 0
        assert a["transfer_ns"] + a["waiting_ns"] == a["time_ns"]
        assert a["bytes"] == b["bytes"] > 0
        assert a["rank_count"] == 2
    assert {r["phase"] for r in rows(facts.tables["phases"])} >= {"data", "forward", "backward", "optimizer"}
    assert [d["step_count"] for d in facts.summary["devices"]] == [2, 2]


def test_ranks_that_are_missing_leave_the_transfer_empty_with_the_reason(shared_traces):
    kineto = shared_traces / "kineto"
    facts = compute_facts(read_traces([kineto / "dlrm_rank0.json.gz", kineto / "dlrm_rank1.json.gz"]))
    (a, b) = rows(facts.tables["collectives"])
    assert a["transfer_ns"] is b["transfer_ns"] is None
    assert a["reason"] == "needs every rank: 2 of 128 are here"


def test_collective_metadata_gives_bytes_and_group(shared_traces):
    facts = compute_facts(read_traces([shared_traces / "kineto" / "alexnet_ddp_rank0.json.gz"]))
    allreduce, broadcast = rows(facts.tables["collectives"])
    assert (allreduce["collective"], allreduce["count"], allreduce["group"]) == ("allreduce", 15, "0 [0, 1]")
    raw = brute_force._read_kineto(shared_traces / "kineto" / "alexnet_ddp_rank0.json.gz")
    assert allreduce["count"] + broadcast["count"] == sum("nccl" in k.name for k in raw.kernels)
    assert allreduce["bytes"] == 306_684_384  # 3 steps of the gradients of AlexNet's parameters, float32
