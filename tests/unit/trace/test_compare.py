"""The waterfall between two runs adds up to the difference of their windows."""

import pytest
from test_facts import ADD, GEMM, NCCL, make

from tunemap.errors import UserError
from tunemap.trace.compare import compare_facts
from tunemap.trace.facts import compute_facts


def facts(**rows):
    return compute_facts(make(**rows))


def table(comparison):
    return {key[:3]: key[3:] for key in zip(*comparison.table.values(), strict=True)}


def test_every_difference_has_a_row_and_they_sum_up():
    a = facts(kernels=[(GEMM, 0, 100), (NCCL, 80, 130)])
    b = facts(kernels=[(GEMM, 0, 60), (ADD, 60, 70), (NCCL, 90, 190)], copies=[(8, 70, 80, 5)])
    comparison = compare_facts(a, b)
    assert table(comparison) == {
        ("exposed_communication", "communication", "unattributed"): (30, 100, 70),
        ("compute", "gemm", "unattributed"): (100, 60, -40),
        ("compute", "elementwise", "unattributed"): (0, 10, 10),
        ("exposed_copy", "dtod local", "unattributed"): (0, 10, 10),
        ("idle", "unknown", "unattributed"): (0, 10, 10),
    }
    s = comparison.summary
    assert (s["a_window_ns"], s["b_window_ns"], s["delta_window_ns"]) == (130, 190, 60)
    assert sum(comparison.table["delta_ns"]) == 60
    assert s["delta_by_component_ns"] == {"compute": -30, "exposed_communication": 70, "exposed_copy": 10, "idle": 10}
    assert abs(comparison.table["delta_ns"][0]) == max(map(abs, comparison.table["delta_ns"]))


def test_runs_with_steps_are_compared_per_step_and_devices_are_averaged():
    one = facts(kernels=[(GEMM, 0, 100)], ranges=[("step 1", 0, 50), ("step 2", 50, 100)])
    two = compute_facts(
        make(
            kernels=[(GEMM, 0, 30), (GEMM, 0, 50, -1, 1)],
            processes=2,
        )
    )
    for device in two.summary["devices"]:
        device["step_count"] = 1
    comparison = compare_facts(one, two)
    assert comparison.summary["per_step"]
    assert table(comparison) == {("compute", "gemm", "unattributed"): (50, 40, -10)}


def test_lines_show_the_largest_changes_and_the_rest():
    a = facts(kernels=[(f"gemm_{i}", 10 * i, 10 * i + 5) for i in range(3)])
    lines = compare_facts(a, facts(kernels=[(GEMM, 0, 100)])).lines(rows=1)
    assert "difference +0.000" in lines[0]
    assert lines[-1].startswith("the other 1 rows")


def test_a_run_without_device_work_is_refused():
    with pytest.raises(UserError, match="run B has no device work"):
        compare_facts(facts(kernels=[(GEMM, 0, 1)]), facts())


def test_a_cpu_run_is_not_compared_with_a_gpu_run():
    cpu = facts(kernels=[(GEMM, 0, 1)])
    cpu.summary["devices"][0]["device"] = "cpu"
    with pytest.raises(UserError, match="one run is on a GPU and the other on a CPU"):
        compare_facts(facts(kernels=[(GEMM, 0, 1)]), cpu)
