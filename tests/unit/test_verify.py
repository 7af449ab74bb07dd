"""`tunemap verify` on a small sound study, and after each kind of tampering."""

import argparse
import hashlib
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tunemap.collect import write_tables
from tunemap.config import BaseMethod, DatasetConfig, Factors, FullMethod, LoraMethod, TinyModel
from tunemap.data.answers import score
from tunemap.errors import UserError
from tunemap.report import artifact, figures
from tunemap.report.artifact import pack
from tunemap.report.database import write_database
from tunemap.report.figures import write_figures
from tunemap.run import Run
from tunemap.statistics import wilson
from tunemap.training.steps import StepRecord, summarise_steps, to_csv
from tunemap.verify import add_verify_arguments, run_verify, verify

PARTS = ("load", "compile", "estimation", "train", "checkpoint", "save", "other")
ONE_KIND = {"throughput": figures.KINDS["throughput"]}


def make_run(name: str, method: Any) -> Run:
    return Run(
        id=name,
        model_name="tiny",
        model=TinyModel(source="tiny"),
        dataset_name="arithmetic",
        dataset=DatasetConfig(task="arithmetic", source="made"),
        method_name=method.kind,
        method=method,
        prompt_template=None,
        factors=Factors(max_steps=6, epochs=None),
    )


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text()) | changes)


def write_run(folder: Path, run: Run, slow: float) -> None:
    records = [
        StepRecord(
            rank=0, step=step, epoch=0.1, learning_rate=0.1, loss=3.0 / (step + 1), gradient_norm=1.0, samples=4,
            real_tokens=100 + step, label_tokens=40, padded_tokens=120, step_time_s=slow * (1 + step / 100),
            data_time_s=0.001, forward_time_s=slow / 3, backward_time_s=slow / 3, optimizer_time_s=slow / 3,
            cpu_time_s=slow, elapsed_s=slow * (step + 1), measured=int(step > 0),
        )
        for step in range(6)
    ]  # fmt: skip
    records = [] if run.is_base else records
    summary = summarise_steps(records)
    measurements: dict[str, Any] = {}
    if records:
        parts = {f"{part}_time_s": 0.5 + index for index, part in enumerate(PARTS)}
        measurements = summary | parts | {"wall_time_s": sum(parts.values()), "peak_allocated_bytes": 2000}
        measurements |= {"trainable_parameters": 64, "data_order_hash": "same", "model_flops_per_step": 1e6}
        measurements["model_flops_per_second"] = 1e6 / summary["step_period_mean_s"]
    gates = [{"gate": "finite_loss", "passed": True, "fatal": True, "message": "all finite"}] if records else []
    folder.mkdir(parents=True)
    (folder / "steps.csv").write_text(to_csv(records), newline="")
    outcome = {
        "run": run.id,
        "digest": run.training_digest,
        "outcome": "ok",
        "reason": None,
        "phase": None,
        "step": None,
        "spec": run.training_spec(),
        "measurements": measurements,
        "memory_by_rank": [{"rank": 0, "peak_allocated_bytes": 2000}] if records else [],
        "gates": gates,
        "facts": {"expected_trainable_parameters": 64} if records else {},
        "environment": {},
        "steps_sha256": hashlib.sha256((folder / "steps.csv").read_bytes()).hexdigest(),
    }
    write(folder / "outcome.json", outcome)


def write_evaluation(folder: Path, run: Run, correct: int) -> None:
    folder.mkdir(parents=True)
    predictions = []
    for index in range(10):
        output = "#### 7" if index < correct else "seven"
        scored = vars(score("arithmetic", output, "#### 7"))
        predictions.append({"id": f"q{index}", "prompt": "?", "reference": "#### 7", "output": output, **scored})
        predictions[-1]["truncated"] = False
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    interval = wilson(correct, 10)
    evaluation = {
        "run": run.id,
        "digest": run.evaluation_digest,
        "training_digest": run.training_digest,
        "outcome": "ok",
        "reason": None,
        "task": "arithmetic",
        "task_kind": "generation",
        "split": "test",
        "metric": "exact_match_strict",
        "n": 10,
        "correct": correct,
        "accuracy": correct / 10,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "accuracy_flexible": correct / 10,
        "malformed_share": 1 - correct / 10,
        "truncated_share": 0.0,
    }
    write(folder / "evaluation.json", evaluation)


def collect_again(results: Path) -> None:
    """Make the tables, and the database that is made of them."""
    write_tables(results / "plan.json", results)
    write_database(results / "plan.json", results, results / "study.sqlite")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/STUDY with a base row, a full and a LoRA run, and the tables that follow from them; it has no figures."""
    monkeypatch.setattr(figures, "KINDS", {})
    results = tmp_path / "results" / "small"
    methods = {"base": BaseMethod(kind="base"), "full": FullMethod(kind="full"), "lora": LoraMethod(kind="lora")}
    runs = {name: make_run(name, method) for name, method in methods.items()}
    plan = {
        "study": "small",
        "data_root": None,
        "report": {"title": "t", "introduction": "", "baseline_method": "full"},
        "hardware": {"device": "cpu", "description": None},
        "prompt_templates": {},
        "experiments": [
            {"name": "e", "question": "?", "vary": ["method"], "runs": ["full", "lora"], "base_runs": ["base"]}
        ],
        "runs": {
            name: run.evaluation_spec()
            | {"digest": run.training_digest, "evaluation_digest": run.evaluation_digest, "provenance": {}}
            for name, run in runs.items()
        },
    }
    write(results / "plan.json", plan)
    for index, (name, run) in enumerate(runs.items()):
        write_run(results / "runs" / name, run, slow=0.01 * (1 + index))
        write_evaluation(results / "evaluations" / name, run, correct=5 + index)
    collect_again(results)
    write(results / "figures" / "figures.json", [])
    (results / "report.html").write_text("<html></html>")
    return results


def only(differences: list[str], *parts: str) -> None:
    """There are differences, and one of them says all of the parts."""
    assert any(all(part in difference for part in parts) for difference in differences), differences


def test_a_sound_study_has_no_difference(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(study) == []
    parser = argparse.ArgumentParser()
    add_verify_arguments(parser)
    assert run_verify(parser.parse_args([str(study)])) == 0
    assert "3 runs: digests, summaries, gates, tables, database and captions all follow" in (
        said := capsys.readouterr().out
    )
    assert "only an artifact's SHA256SUMS shows changes in them" in said


def test_a_changed_step_is_found_by_checksum_and_by_its_summary(study: Path) -> None:
    path = study / "runs" / "lora" / "steps.csv"
    lines = path.read_text().splitlines()
    cells = lines[3].split(",")
    cells[lines[0].split(",").index("step_time_s")] = "0.001"
    path.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]) + "\n")
    only(verify(study), "steps.csv", "SHA-256")
    only(verify(study), "lora", "step_time_mean_s", "steps.csv gives")


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens_per_second", 99_999.0), ("wall_time_s", 1.0), ("model_flops_per_second", 1.0), ("train_loss", 0.01)],
)
def test_a_changed_measurement_is_found(study: Path, name: str, value: float) -> None:
    path = study / "runs" / "lora" / "outcome.json"
    measurements = json.loads(path.read_text())["measurements"]
    edit(path, measurements=measurements | {name: value})
    only(verify(study), "outcome.json", name, str(value))
    only(verify(study), "runs.csv")  # the tables no longer follow either


def test_a_measurement_that_follows_from_nothing_is_found_in_the_tables(study: Path) -> None:
    path = study / "runs" / "full" / "outcome.json"
    outcome = json.loads(path.read_text())
    outcome["measurements"]["peak_allocated_bytes"] = 1000
    outcome["memory_by_rank"][0]["peak_allocated_bytes"] = 1000
    write(path, outcome)
    only(verify(study), "runs.csv", "line 3", "1000")
    only(verify(study), str(path), "peak_allocated_bytes is 1000", "runs.csv says 2000")


def test_the_parts_of_the_peak_follow_from_the_rank_that_has_it(study: Path) -> None:
    path = study / "runs" / "lora" / "outcome.json"
    outcome = json.loads(path.read_text())
    ranks = [
        {"rank": 0, "peak_allocated_bytes": 2000, "optimizer_bytes": 500, "activations_bytes": 1500},
        {"rank": 1, "peak_allocated_bytes": 1800, "optimizer_bytes": 900, "activations_bytes": 900},
    ]
    parts = {"optimizer_bytes": 500, "activations_bytes": 1500}
    edit(path, memory_by_rank=ranks, measurements=outcome["measurements"] | parts)
    collect_again(study)
    assert verify(study) == []
    edit(path, measurements=outcome["measurements"] | parts | {"optimizer_bytes": 900})
    only(verify(study), "optimizer_bytes is 900, the other columns give 500")


def test_an_invalid_run_made_ok_is_found(study: Path) -> None:
    path = study / "runs" / "lora" / "outcome.json"
    edit(path, gates=[{"gate": "labels", "passed": False, "fatal": True, "message": "none left"}])
    only(verify(study), "outcome is ok, and fatal gates tripped: labels")
    edit(path, gates=[], outcome="invalid")
    only(verify(study), "outcome is invalid, and no fatal gate tripped")


def test_a_gate_is_decided_again(study: Path) -> None:
    path = study / "runs" / "lora" / "outcome.json"
    measurements = json.loads(path.read_text())["measurements"]
    gate = {"gate": "trainable_parameters", "passed": True, "fatal": True, "message": "64 and 64"}
    edit(path, measurements=measurements | {"trainable_parameters": 63}, gates=[gate])
    only(verify(study), "gate trainable_parameters: passed is True, derived again False")


def test_a_result_of_other_factors_is_found(study: Path) -> None:
    path = study / "runs" / "lora" / "outcome.json"
    spec = json.loads(path.read_text())["spec"]
    edit(path, spec=spec | {"factors": spec["factors"] | {"learning_rate": 0.5}})
    only(verify(study), "its spec gives")
    plan = json.loads((study / "plan.json").read_text())
    plan["runs"]["lora"]["factors"]["learning_rate"] = 0.5
    write(study / "plan.json", plan)
    only(verify(study), "plan.json: run lora: digest")


def test_a_prediction_made_correct_is_found(study: Path) -> None:
    path = study / "evaluations" / "lora" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[9]["correct"] = True
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    only(verify(study), "q9", "correct is True, its output gives False")
    only(verify(study), "evaluation.json", "predictions.jsonl gives 8")


def test_a_left_out_prediction_is_found(study: Path) -> None:
    path = study / "evaluations" / "full" / "predictions.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    only(verify(study), "n is 10, predictions.jsonl gives 9")


@pytest.mark.parametrize("name", ["runs.csv", "comparisons.csv", "points.tex"])
def test_a_changed_table_is_found_at_its_line(study: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "tables" / name
    text = path.read_text()
    path.write_text(text.replace("lora", "LORA", 1))
    differences = verify(study)
    assert len(differences) == 1
    only(differences, name, "LORA", "lora")
    assert run_verify(argparse.Namespace(results=study)) == 1
    assert "1 difference(s)" in capsys.readouterr().out


def test_a_changed_calibration_is_found_and_another_studys_is_not(study: Path) -> None:
    peak = {"predicted_peak_bytes": 2100, "step_seconds_low": None, "step_seconds_high": None, "device": "cpu"}
    write(study / "predictions.json", {"lora": peak | {"flops_per_step": 1, "communication_bytes_per_step": 0}})
    collect_again(study)
    path = study / "calibration.csv"
    path.write_text(path.read_text() + "other,lora,d,cpu,1,1\n")
    assert verify(study) == []
    path.write_text(path.read_text().replace("2100", "2000"))
    only(verify(study), "calibration.csv: rows of small: line 2", "2100")
    path.unlink()
    only(verify(study), "calibration.csv: no such file")


@pytest.mark.parametrize("gone", ["runs/lora/outcome.json", "runs/lora/steps.csv", "evaluations/lora/evaluation.json"])
def test_a_missing_file_is_named(study: Path, gone: str) -> None:
    (study / gone).unlink()
    only(verify(study), gone.rpartition("/")[2])


NO_TEXT = b"\xff\xfe"  # in UTF-8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("runs/lora/outcome.json", content) for content in (b"{}", b"[]", b"null", b'{"outc', NO_TEXT)],
        *[("evaluations/lora/evaluation.json", content) for content in (b"{}", b"[]", b"null")],
        *[("evaluations/lora/predictions.jsonl", content) for content in (b"{}", b"null", NO_TEXT)],
        *[("runs/lora/steps.csv", content) for content in (b"", b"a,b\n1,2\n", NO_TEXT)],
        *[(f"tables/{name}", NO_TEXT) for name in ("runs.csv", "points.csv", "points.tex")],
        *[(name, NO_TEXT) for name in ("calibration.csv", "figures/figures.json")],
        ("figures/figures.json", b"[1]"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_still_looked_at(
    study: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / name).write_bytes(content)
    other = study / "evaluations" / "full" / "evaluation.json"
    edit(other, accuracy=0.1)
    assert run_verify(argparse.Namespace(results=study)) == 1
    differences = capsys.readouterr().out.splitlines()
    only(differences, str(study / name))
    only(differences, f"{other}: accuracy is 0.1")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("runs/lora/outcome.json", ('"measurements"', '"other"'), "damaged (no 'measurements')"),
        ("runs/lora/steps.csv", ("learning_rate", "rate"), "damaged (no 'learning_rate')"),
        ("evaluations/lora/evaluation.json", ('"task_kind"', '"kind"'), "damaged (no 'task_kind')"),
        ("evaluations/lora/predictions.jsonl", ('"reference"', '"due"'), "damaged (line 1 is no prediction)"),
    ],
)
def test_what_a_damaged_file_lacks_is_said(study: Path, name: str, change: tuple[str, str], said: str) -> None:
    (study / name).write_text((study / name).read_text().replace(*change))
    only(verify(study), f"{study / name}: {said}")


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"runs": {"lora": {}}}', '{"runs": []}'])
def test_a_damaged_plan_is_refused(study: Path, content: str) -> None:
    (study / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json: damaged"):
        verify(study)


def test_a_plan_whose_runs_lack_a_factor_is_refused(study: Path) -> None:
    plan = json.loads((study / "plan.json").read_text())
    del plan["runs"]["lora"]["method"]
    write(study / "plan.json", plan)
    with pytest.raises(UserError, match=r"plan\.json: damaged \(no 'method'\)"):
        verify(study)


@pytest.mark.parametrize("name", ["figures/figures.json", "report.html", "study.sqlite"])
def test_what_a_finished_study_has_is_missed(study: Path, name: str) -> None:
    (study / name).write_text("")
    only(verify(study), name, "damaged")
    (study / name).unlink()
    assert verify(study) == [f"{study / name}: no such file"]


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "facts/lora/phases.csv"), KeyError("phase"), TypeError("no number")]
)
def test_facts_from_which_no_figure_can_be_drawn_are_a_difference(
    study: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def describe(results_dir: Path) -> None:
        raise error

    monkeypatch.setattr(figures, "describe", describe)
    only(verify(study), "figures.json: figures cannot be derived", str(error))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DELETE FROM answers", "table answers, row 1: missing"),
        (
            "UPDATE answers SET correct = 0 WHERE id = 'q3' AND run = 'full'",
            "table answers, row 14: correct is 0, the study's files give 1",
        ),
        (
            "UPDATE runs SET step_time_mean_s = step_time_mean_s * (1 + 1e-9)",
            "table runs, row 2: step_time_mean_s",
        ),
        ("INSERT INTO losses (run) VALUES ('full')", "table losses, row 13: the study's files have none"),
        ("DROP VIEW pareto_front", "pareto_front is missing"),
        ("CREATE TABLE more (run)", "more is not made as it is of the study's files"),
    ],
)
def test_a_changed_database_is_found(study: Path, change: str, said: str) -> None:
    with closing(sqlite3.connect(study / "study.sqlite")) as connection, connection:
        connection.execute(change)
    (difference,) = verify(study)
    assert difference.startswith(f"{study / 'study.sqlite'}: {said}")


def test_a_database_of_another_sqlite_may_read_decimals_a_little_otherwise(study: Path) -> None:
    with closing(sqlite3.connect(study / "study.sqlite")) as connection, connection:
        connection.execute("UPDATE runs SET step_time_mean_s = step_time_mean_s * (1 + 4e-16)")
        assert connection.total_changes > 0
    assert verify(study) == []


def test_what_is_no_database_is_found(study: Path) -> None:
    (study / "study.sqlite").write_text("a database")
    assert verify(study) == [f"{study / 'study.sqlite'}: damaged (file is not a database)"]


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no plan.json; give the folder of a study"):
        verify(tmp_path)


def test_results_of_other_sources_are_said_to_be(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(study / "runs" / "lora" / "outcome.json", environment={"source_digest": "another"}, digest="x")
    assert run_verify(argparse.Namespace(results=study)) == 1
    assert "note: 1 runs were made by other sources of this package" in capsys.readouterr().out


def test_a_changed_caption_is_found(study: Path, one_figure: None) -> None:
    write_figures(study / "tables", study / "figures", study / "plan.json")
    assert verify(study) == []
    path = study / "figures" / "figures.json"
    path.write_text(path.read_text().replace("n = 1 seed", "n = 9 seed", 1))
    only(verify(study), "figures.json", "is not what the tables give")


# --- the artifact -----------------------------------------------------------------------------------------


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing all of them takes seconds, and one of them shows whether its caption is compared."""
    monkeypatch.setattr(figures, "KINDS", ONE_KIND)


@pytest.fixture
def unpacked(study: Path, repository: Path, tmp_path: Path, one_figure: None) -> Path:
    """The artifact of the study, unpacked in an empty folder."""
    checkout = study.parents[1]
    write_figures(study / "tables", study / "figures", study / "plan.json")
    (study / "runs" / "lora" / "weights").mkdir()
    (study / "runs" / "lora" / "weights" / "adapter.safetensors").write_bytes(b"weights")
    (study / "captures" / "lora").mkdir(parents=True)
    (study / "captures" / "lora" / "trace.json").write_text("{}")
    (study / "unfinished" / "lora").mkdir(parents=True)
    (study / "unfinished" / "lora" / "checkpoint").write_text("")
    for name in ("envs/report.yaml", "requirements.lock", "Snakefile"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes((repository / name).read_bytes())
    (checkout / ".snakemake" / "metadata").mkdir(parents=True)
    (checkout / ".snakemake" / "metadata" / "cmVz").write_text("{}")
    (checkout / "src" / "__pycache__").mkdir(parents=True)
    (checkout / "src" / "__pycache__" / "x.pyc").write_text("")
    (checkout.parent / "my | study.yaml").write_text("study: small\n")
    os.utime(study / "tables" / "runs.csv", (1_700_000_000, 1_700_000_000))
    pack(checkout, study / "plan.json", study, study / "artifact.tar.gz", study_file="../my | study.yaml")
    with tarfile.open(study / "artifact.tar.gz") as archive:
        archive.extractall(tmp_path / "empty", filter="data")
    return tmp_path / "empty" / "small-artifact"


def test_an_unpacked_artifact_verifies(unpacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verify(argparse.Namespace(results=unpacked / "results" / "small")) == 0
    assert capsys.readouterr().out.endswith("every file has its checksum in SHA256SUMS\n")


@pytest.mark.parametrize("name", ["report.html", "study.sqlite", "figures/e-throughput.svg"])
def test_what_is_not_derived_again_is_compared_by_checksum(unpacked: Path, name: str) -> None:
    path = unpacked / "results" / "small" / name
    path.write_bytes(path.read_bytes() + b" ")
    assert len(verify(unpacked / "results" / "small")) == 1
    only(verify(unpacked / "results" / "small"), name, "SHA256SUMS")


def test_an_artifact_has_what_a_reviewer_needs_and_no_more(unpacked: Path) -> None:
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {
        "README.md",
        "SHA256SUMS",
        "ro-crate-metadata.json",
        "environment.txt",
        "requirements.lock",
        "Snakefile",
        ".snakemake/metadata/cmVz",
        "results/small/plan.json",
        "results/small/runs/lora/outcome.json",
        "results/small/runs/lora/weights/adapter.safetensors",
        "results/small/captures/lora/trace.json",
        "results/small/tables/runs.csv",
    } <= names
    assert not [name for name in names if "unfinished" in name or "pycache" in name or name.endswith(".tar.gz")]
    assert (unpacked / "results/small/tables/runs.csv").stat().st_mtime == 1_700_000_000
    readme = (unpacked / "README.md").read_text()
    assert "e: Against full: lora is" in readme
    assert "--configfile 'config/studies/my | study.yaml' --forceall" in readme
    assert (unpacked / "config/studies/my | study.yaml").read_text() == "study: small\n"
    pins = (unpacked / "requirements-verify.txt").read_text().splitlines()
    assert any(pin.startswith("pandas==") for pin in pins)
    assert not any(pin.startswith("torch") for pin in pins)
    crate = json.loads((unpacked / "ro-crate-metadata.json").read_text())
    listed = {entity["@id"] for entity in crate["@graph"]}
    assert {"./", "results/small/runs/lora/outcome.json", "README.md", "ro-crate-metadata.json"} <= listed


def digits() -> Iterator[tuple[str, str]]:
    """One digit of one file of each kind: (file, pattern of the number)."""
    yield "runs/lora/outcome.json", r'"peak_allocated_bytes": (\d)'
    yield "runs/full/steps.csv", r"(\d)\.\d"
    yield "evaluations/lora/evaluation.json", r'"correct": (\d)'
    yield "tables/points.csv", r",(\d)\d"
    yield "figures/figures.json", r"n = (\d)"


@pytest.mark.parametrize(("name", "pattern"), list(digits()))
def test_one_changed_digit_is_named(
    unpacked: Path, name: str, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unpacked / "results" / "small" / name
    text = path.read_text()
    found = re.search(pattern, text)
    assert found is not None
    digit = str((int(found.group(1)) + 1) % 10)
    path.write_text(text[: found.start(1)] + digit + text[found.end(1) :])
    assert run_verify(argparse.Namespace(results=unpacked / "results" / "small")) == 1
    named = [line for line in capsys.readouterr().out.splitlines() if f"results/small/{name}" in line]
    assert any("SHA256SUMS" in line for line in named)
    (unpacked / "SHA256SUMS").unlink()  # and without the list of checksums
    only(verify(unpacked / "results" / "small"), name.rpartition("/")[2])


def test_a_file_that_is_gone_from_an_artifact_is_named(unpacked: Path) -> None:
    (unpacked / "requirements.lock").unlink()
    only(verify(unpacked / "results" / "small"), "requirements.lock: no such file, but SHA256SUMS has it")


def test_results_without_a_plan_make_no_artifact(tmp_path: Path, study: Path) -> None:
    plan = study / "plan.json"
    moved = plan.rename(tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"no plan.json; run the workflow first"):
        pack(study.parents[1], moved, study, tmp_path / "artifact.tar.gz", study_file="config/config.yaml")


def test_what_is_heavy_is_left_out_and_said_to_be(study: Path, unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "HEAVY_BYTES", 3)
    pack(study.parents[1], study / "plan.json", study, study / "artifact.tar.gz", study_file="config/config.yaml")
    with tarfile.open(study / "artifact.tar.gz") as archive:
        names = archive.getnames()
        readme = archive.extractfile("small-artifact/README.md")
        assert readme is not None
        assert b"weights and traces are left out" in readme.read()
    assert not [name for name in names if "weights" in name or "captures" in name]
