"""The whole path on a study of seconds: every stage's output is there, complete, and says what it should."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunemap.sources import sources
from tunemap.study_file import load_plan
from tunemap.verify import verify

from .conftest import BASE, FULL, LORA

_COLUMNS = """
run experiment model dataset method rank strategy gpus seed outcome tokens_per_second samples_per_second
step_time_median_s step_time_p95_s peak_allocated_bytes train_loss accuracy accuracy_low accuracy_high
trainable_parameters
"""
NAMED_COLUMNS = tuple(_COLUMNS.split())
STAGES = (
    "prepare_model",
    "prepare_dataset",
    "tokenize_dataset",
    "train_run",
    "evaluate_run",
    "capture_run",
    "extract_facts",
    "predict_runs",
    "make_tables",
    "make_figures",
    "make_database",
    "make_report",
)
WORKERS = {
    "train_run": "training/worker.py",
    "evaluate_run": "tunemap/evaluation.py",
    "capture_run": "capture/worker.py",
}


def _rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_runs_csv_has_one_tidy_row_per_run(finished):
    rows = _rows(finished.results / "tables" / "runs.csv")
    assert set(rows) == {FULL, LORA, BASE}
    assert all(name in rows[FULL] for name in NAMED_COLUMNS)
    assert {row["outcome"] for row in rows.values()} == {"ok"}
    assert float(rows[FULL]["tokens_per_second"]) > 0
    assert int(rows[LORA]["trainable_parameters"]) < int(rows[FULL]["trainable_parameters"])
    assert rows[LORA]["rank"] == "2"
    assert rows[FULL]["experiment"] == "methods"


def test_every_run_saw_the_same_examples_in_the_same_order(finished):
    hashes = {finished.outcome(run)["measurements"]["data_order_hash"] for run in (FULL, LORA)}
    assert len(hashes) == 1


def test_every_step_is_recorded(finished):
    with (finished.results / "runs" / FULL / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert rows[0]["measured"] == "0"


def test_every_prediction_is_kept(finished):
    text = (finished.results / "evaluations" / LORA / "predictions.jsonl").read_text()
    assert len([json.loads(line) for line in text.splitlines()]) == 8


def test_an_adapter_loads_with_peft_and_a_model_with_transformers(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.results / "runs" / FULL / "weights")
    adapted = PeftModel.from_pretrained(model, finished.results / "runs" / LORA / "weights")
    assert adapted.peft_config["default"].r == 2


def test_figures_come_as_svg_pdf_and_png(finished):
    folder = finished.results / "figures"
    names = {path.stem for path in folder.glob("*.svg")}
    assert names
    assert names == {path.stem for path in folder.glob("*.pdf")} == {path.stem for path in folder.glob("*.png")}


def test_the_report_needs_nothing_from_outside(finished):
    page = (finished.results / "report.html").read_text()
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="https://arxiv.org', "")
    assert page.count("<svg") >= 3


def test_the_tables_follow_from_the_raw_files(finished):
    assert verify(finished.results) == []


def test_predicted_stands_against_measured(finished):
    record = finished.results.parent / "calibration.csv"
    assert set(_rows(record)) == {FULL, LORA}
    assert record.read_text() == (finished.results / "calibration.csv").read_text()
    assert '<section id="calibration">' in (finished.results / "report.html").read_text()


def test_a_changed_result_is_noticed(copy):
    predictions = copy.results / "evaluations" / LORA / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace('"correct": false', '"correct": true', 1))
    assert verify(copy.results)


def test_nothing_unfinished_is_left(finished):
    assert not list((finished.results / "unfinished").glob("*"))
    assert not list(finished.root.rglob("*.tmp"))


@pytest.mark.parametrize("stage", STAGES)
def test_declared_sources_cover_what_a_stage_imports(finished, modules_folder, stage):
    assert_declared(finished, modules_folder, stage)


def test_declared_sources_cover_what_measuring_inference_imports(finished, tmp_path, repository):
    """A stage that a study asks for, so the finished one has not run it."""
    (model,) = (finished.results.parent / "shared" / "models").iterdir()
    (tokens,) = (finished.results.parent / "shared" / "tokens").iterdir()
    run = finished.results / "runs" / LORA
    spec = load_plan(finished.study_file, data_root=str(finished.root / "data")).runs[LORA].training_spec()
    given = {"spec": json.dumps(spec), "device": "cpu", "model": model, "tokens": tokens}
    given |= {"outcome": run / "outcome.json", "weights": run / "weights", "output": tmp_path / "inference.json"}
    source, recorder = finished.root / "src", repository / "tests" / "workflow" / "record_modules"
    python_path = f"{source}{os.pathsep}{recorder}"
    subprocess.run(
        [
            sys.executable,
            "workflow/scripts/measure_inference.py",
            *(f"--{name}={value}" for name, value in given.items()),
        ],
        cwd=finished.root,
        env=finished.environment(PYTHONPATH=python_path, TUNEMAP_RECORD_MODULES=str(tmp_path)),
        check=True,
    )
    assert json.loads((tmp_path / "inference.json").read_text())["outcome"] == "ok"
    (tmp_path / "inference.json").unlink()
    assert_declared(finished, tmp_path, "measure_inference")


def assert_declared(finished, modules_folder, stage):
    recorded = [json.loads(path.read_text()) for path in modules_folder.glob("*.json")]
    started = {f"scripts/{stage}.py", WORKERS.get(stage)}
    mains = {record["main"]: "/".join(Path(record["main"]).parts[-2:]) for record in recorded}
    files = [file for record in recorded if mains[record["main"]] in started for file in record["files"]]
    imported = {Path(file).resolve() for file in files}
    assert imported, f"no process of {stage} was recorded"
    root = finished.root / "src" / "tunemap"
    from tunemap import sources as module

    declared = {
        root / path.resolve().relative_to(module.PACKAGE_ROOT)
        for path in sources(finished.root / "workflow" / "scripts" / f"{stage}.py")[1:]
    }
    assert imported <= {path.resolve() for path in declared}
