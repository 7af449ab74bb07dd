"""Tables that a study has only where their data exist: failures stand in them too, and rows lead to their runs."""

import json

import pandas as pd

from tunemap.distributed.scaling import SCALING_COLUMNS
from tunemap.report.extras import LinkedRow, read_calibration, scaling_rows, windows
from tunemap.report.page import MANY_WARNINGS, _groups
from tunemap.report.scene import Scene

PLAN = {"experiments": [{"name": "methods", "captures": ["a", "b", "c"]}]}
DEVICE = {"device": "cpu", "window_ns": 4_000_000, "compute_ns": 3_000_000, "idle_ns": 500_000}


def scene_of(**points):
    runs = pd.DataFrame({"run": points.keys(), "point": points.values()})
    return Scene("methods", [], runs, pd.DataFrame(), {}, [])


def test_a_capture_that_failed_or_is_missing_has_a_row_that_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    device = DEVICE | {"exposed_communication_ns": 400_000, "exposed_copy_ns": 100_000}
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"devices": [device]}))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "capture.json").write_text(json.dumps({"outcome": "error", "reason": "rank 1 died"}))
    assert windows(tmp_path, PLAN, [scene_of(a="full", b="lora", c="qlora")]) == [
        LinkedRow("a", ("full, device cpu", "4.0", "75.0", "10.0", "2.5", "12.5")),
        LinkedRow("b", ("lora", "rank 1 died", "—", "—", "—", "—")),
        LinkedRow("c", ("qlora", "not captured", "—", "—", "—", "—")),
    ]


def test_a_run_without_a_peak_stands_in_the_planners_table_with_its_outcome(tmp_path):
    path = tmp_path / "calibration.csv"
    path.write_text(
        "study,run,predicted_peak_bytes,measured_peak_bytes\n"
        "s,a,1048576,2097152\ns,b,3145728,\ns,c,,4194304\nother,a,1048576,1048576\n"
    )
    found = read_calibration(path, "s", {"a": "ok", "b": "oom", "c": "ok"})
    assert found.sentence.startswith("Predicted over measured peak memory in 2 runs: median 0.75, from 0.50 to 1.00")
    assert [row.cells for row in found.rows] == [
        ("a", "1.0", "2.0", "0.50"),
        ("b", "3.0", "out of memory", "—"),
        ("c", "not predicted", "4.0", "—"),
    ]
    assert read_calibration(tmp_path / "none.csv", "s", {}) is None


def test_a_run_of_another_study_with_the_same_id_is_not_in_the_planners_table(tmp_path):
    path = tmp_path / "calibration.csv"
    path.write_text(
        "study,run,predicted_peak_bytes,measured_peak_bytes\nother,a,1048576,4194304\ns,a,1048576,1048576\n"
    )
    assert [row.cells for row in read_calibration(path, "s", {"a": "ok"}).rows] == [("a", "1.0", "1.0", "1.00")]


def test_scaling_rows_say_speed_up_with_interval_or_why_not():
    row = dict.fromkeys(SCALING_COLUMNS) | {"mode": "weak", "curve": "lora · ddp", "gpus": 2, "run_ids": "a;b"}
    row |= {"tokens_per_second": 1800.0, "speed_up": 1.8, "speed_up_low": 1.7, "speed_up_high": 1.9}
    row |= {"efficiency": 0.9, "efficiency_low": 0.85, "efficiency_high": 0.95, "peak_allocated_bytes": 2**20}
    row |= {"communication_bytes_per_step": 2**19}
    alone = row | {"speed_up": None, "efficiency": None, "reason": "no run of ddp on one device", "run_ids": "c"}
    first, second = scaling_rows([row, alone])
    cells = ("weak: lora · ddp", "2", "1,800", "1.80 (1.70 to 1.90)", "90 (85 to 95)", "1.0", "0.50")
    assert first == LinkedRow("a", cells)
    assert (second.run, second.cells[3:5]) == ("c", ("no run of ddp on one device",) * 2)


def test_many_warnings_of_one_gate_share_a_line_and_fatal_ones_never_do():
    fatal = [{"gate": "labels", "is_fatal": True} for _ in range(MANY_WARNINGS)]
    many = [{"gate": "cpu_share", "is_fatal": False} for _ in range(MANY_WARNINGS)]
    few = [{"gate": "mfu", "is_fatal": False} for _ in range(MANY_WARNINGS - 1)]
    groups = _groups([*fatal, *few, *many])
    assert [len(group) for group in groups] == [1] * (len(fatal) + len(few)) + [len(many)]
