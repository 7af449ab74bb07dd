"""Tables that a study has only where their data exist: failures stand in them too, and rows lead to their runs."""

import json

import pandas as pd

from tunemap.report.extras import LinkedRow, read_calibration, windows
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
        "run,predicted_peak_bytes,measured_peak_bytes\n"
        "a,1048576,2097152\nb,3145728,\nc,,4194304\nother,1048576,1048576\n"
    )
    found = read_calibration([tmp_path / "none.csv", path], {"a": "ok", "b": "oom", "c": "ok"})
    assert found.sentence.startswith("Predicted over measured peak memory in 2 runs: median 0.75, from 0.50 to 1.00")
    assert [row.cells for row in found.rows] == [
        ("a", "1.0", "2.0", "0.50"),
        ("b", "3.0", "out of memory", "—"),
        ("c", "not predicted", "4.0", "—"),
    ]
    assert read_calibration([tmp_path / "none.csv"], {}) is None
