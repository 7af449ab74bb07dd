"""Predicted against measured from a study's results to the record of all studies, and from there to its page."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.report import fake_results
from tunemap.collect import write_tables
from tunemap.planner.advisor import calibrated
from tunemap.planner.calibration import CALIBRATION, COLUMNS, PREDICTIONS, update_calibration
from tunemap.report.page import write_report

LORA, OOM = "tiny.arithmetic.lora.seed-0", "tiny.arithmetic.full.seed-1"
MIB = 1 << 20
PREDICTION = {
    "device": "l4",
    "predicted_peak_bytes": 100 * MIB,
    "step_seconds_low": 0.01,
    "step_seconds_high": 0.1,
    "flops_per_step": 10**12,
    "communication_bytes_per_step": 0,
}
OTHER = dict.fromkeys(COLUMNS) | {"study": "other", "run": "elsewhere", "predicted_peak_bytes": 3 * MIB}
OTHER |= {"measured_peak_bytes": 2 * MIB, "memory_error": 0.5, "device": "l4"}


@pytest.fixture
def fake(tmp_path):
    """A study of which two runs were predicted; one of them went out of memory."""
    fake = fake_results.write(tmp_path, seeds=2, examples=5)
    (fake.results_dir / PREDICTIONS).write_text(json.dumps({LORA: PREDICTION, OOM: PREDICTION}))
    return fake


def rows_of(path):
    with path.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def report(fake):
    (fake.results_dir / "figures").mkdir(exist_ok=True)
    (fake.results_dir / "figures" / "figures.json").write_text("[]")
    write_report(fake.plan_path, fake.results_dir, fake.results_dir / "report.html")
    return (fake.results_dir / "report.html").read_text()


def test_collecting_a_study_sets_predicted_against_measured_in_the_record_of_all(fake):
    record = fake.results_dir.parent / CALIBRATION
    update_calibration(record, "other", [OTHER])
    write_tables(fake.plan_path, fake.results_dir)
    rows = rows_of(record)
    measured = json.loads(fake.outcome(LORA).read_text())["measurements"]["peak_allocated_bytes"]
    assert set(rows) == {LORA, OOM, "elsewhere"}
    assert (rows[LORA]["study"], rows[LORA]["digest"]) == ("fake", fake.plan["runs"][LORA]["digest"])
    assert rows[LORA]["measured_peak_bytes"] == str(measured)
    assert float(rows[LORA]["memory_error"]) == pytest.approx(100 * MIB / measured - 1, abs=1e-6)
    assert (rows[OOM]["predicted_peak_bytes"], rows[OOM]["measured_peak_bytes"]) == (str(100 * MIB), "")
    assert "2 collected GPU runs" in calibrated(fake.results_dir.parent)


def test_collecting_again_gives_the_same_record(fake):
    record = fake.results_dir.parent / CALIBRATION
    write_tables(fake.plan_path, fake.results_dir)
    update_calibration(record, "other", [OTHER])
    before = record.read_bytes()
    write_tables(fake.plan_path, fake.results_dir)
    assert record.read_bytes() == before


def test_the_page_shows_the_planner_and_stays_as_it_is_when_others_are_collected(fake):
    write_tables(fake.plan_path, fake.results_dir)
    page = report(fake)
    assert '<section id="calibration">' in page
    assert "Predicted over measured peak memory in 1 runs" in page
    update_calibration(fake.results_dir.parent / CALIBRATION, "other", [OTHER])
    assert report(fake) == page
    write_tables(fake.plan_path, fake.results_dir)
    assert "Predicted over measured peak memory in 2 runs" in report(fake)


def test_studies_that_are_collected_at_once_lose_no_rows(tmp_path):
    path, studies = tmp_path / CALIBRATION, [f"study-{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda study: update_calibration(path, study, [OTHER | {"study": study, "run": study}]), studies))
    assert set(rows_of(path)) == set(studies)
