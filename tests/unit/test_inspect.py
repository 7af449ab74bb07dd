"""Looking at studies: plan, explain, diff, retry and gc, on a small study and a made folder of results."""

import json
from pathlib import Path

import pytest

from tunemap.cli import main
from tunemap.files import write_json
from tunemap.study_file import load_plan

STUDY = """\
study: small
models: {tiny: {source: tiny}}
datasets: {sums: {task: arithmetic, source: made}}
methods:
  full: {kind: full, factors: {learning_rate: 0.001}}
  lora: {kind: lora, rank: 4}
defaults: {model: tiny, dataset: sums, max_steps: 20}
experiments:
  - name: methods
    question: "Which of [full, lora] is [/better] :smile:?"
    vary: {method: [full, lora]}
  - name: rank
    question: How much rank?
    fixed: {method: lora, per_device_batch_size: 8}
    vary: {method.rank: [4, 16]}
"""
BASE, FULL, LORA, LORA_16 = (
    "tiny.sums.base", "tiny.sums.full.seed-0", "tiny.sums.lora.seed-0", "tiny.sums.lora.rank-16.seed-0"
)  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)  # what is predicted is kept below the working directory
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def output(capsys, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def error(capsys, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


# --- plan -------------------------------------------------------------------------------------------------


def test_plan_lists_every_run_of_every_experiment(study, capsys):
    text = output(capsys, "plan", study, "--list")
    for name, run in load_plan(study).runs.items():
        assert f"{name} " in text
        assert run.training_digest in text
    assert "method.rank=16" in text
    assert "3 runs to train (1 are shared between experiments), 1 base models to evaluate" in text


def test_plan_prints_a_question_as_it_is_written(study, capsys):
    assert "methods: Which of [full, lora] is [/better] :smile:?" in output(capsys, "plan", study, "--list")


def test_plan_as_json_holds_every_factor(study, capsys):
    values = json.loads(output(capsys, "plan", study, "--json", "--list"))
    assert values["predictions"] == []
    assert list(values["runs"]) == [FULL, LORA, BASE, LORA_16]
    assert values["runs"][LORA_16]["method"]["rank"] == 16
    assert values["runs"][LORA_16]["factors"]["max_steps"] == 20
    assert values["runs"][LORA_16]["provenance"]["method.rank"] == "vary"
    assert [experiment["name"] for experiment in values["experiments"]] == ["methods", "rank"]


def test_plan_keeps_long_ids_whole_where_a_program_reads_them(study, capsys):
    study.write_text(STUDY.replace("vary: {method.rank: [4, 16]}", f"vary: {{method.target_modules: [{'x' * 170}]}}"))
    [long] = [name for name in load_plan(study).runs if len(name) > 150]
    assert f" {long} " in output(capsys, "plan", study, "--list")


def test_plan_predicts_each_run_and_keeps_what_it_computed(study, tmp_path, capsys):
    values = json.loads(output(capsys, "plan", study, "--json"))
    by_run = {prediction["run"]: prediction for prediction in values["predictions"]}
    assert set(by_run) == {FULL, LORA, LORA_16}  # base rows are not trained
    for prediction in by_run.values():
        assert prediction["fits"] is True
        assert sum(prediction["breakdown_bytes"].values()) == prediction["predicted_peak_bytes"] > 0
        assert prediction["flops_per_step"] > 0
        assert prediction["communication_bytes_per_step"] == 0
        assert 0 < prediction["seconds_low"] < prediction["seconds_high"]
    assert by_run[LORA_16]["flops_per_step"] > by_run[LORA]["flops_per_step"]
    kept = sorted((tmp_path / "results" / "shared" / "plans").iterdir())
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    text = output(capsys, "plan", study)
    assert "3 runs on cpu: 3 fits" in text
    assert "tiny.sums.lora.rank-16" in text
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_the_default_study_is_the_default(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    assert json.loads(output(capsys, "plan", "--json", "--list"))["study"] == "quickstart"


def test_problems_of_a_study_are_listed(study, capsys):
    study.write_text(STUDY.replace("rank: 4", "rank: 1e1").replace("max_steps: 20", "max_stps: 20"))
    assert main(["plan", str(study)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {study}: 2 problems"
    assert len(lines) == 3


# --- explain ----------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, tuple[str, str]]:
    """First column -> the other two, of a printed table."""
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")
    ]
    return {first: (second, third) for first, second, third in cells}


def test_explain_says_where_each_value_comes_from(study, capsys):
    table = rows(output(capsys, "explain", LORA_16, "--study", study))
    assert table["model"] == ("tiny", "defaults")
    assert table["method"] == ("lora", "fixed")
    assert table["method.rank"] == ("16", "vary")
    assert table["method.dropout"] == ("0.0", "methods")
    assert table["dataset.task"] == ("arithmetic", "datasets")
    assert table["max_steps"] == ("20", "defaults")
    assert table["per_device_batch_size"] == ("8", "fixed")
    assert table["learning_rate"] == ("0.0001", "built-in default")
    assert table["seed"] == ("0", "seeds")
    assert rows(output(capsys, "explain", FULL, "--study", study))["learning_rate"] == ("0.001", "method full")


def test_explain_a_base_row(study, capsys):
    table = rows(output(capsys, "explain", BASE, "--study", study))
    assert table["method"] == ("base", "added: the row without fine-tuning")


def test_explain_names_the_nearest_run(study, capsys):
    message = error(capsys, "explain", "tiny.sums.lora.seed-1", "--study", study)
    assert message == (
        f"no run 'tiny.sums.lora.seed-1' in study small; did you mean {LORA}? `tunemap plan` lists them"
    )  # fmt: skip
    message = error(capsys, "explain", "xyz", "--study", study)
    assert message == "no run 'xyz' in study small. `tunemap plan` lists them"


# --- diff -------------------------------------------------------------------------------------------------


def test_diff_of_two_runs(study, capsys):
    table = rows(output(capsys, "diff", LORA, LORA_16, "--study", study))
    table.pop("factor", None)
    assert table == {"method.rank": ("4", "16")}
    assert set(rows(output(capsys, "diff", FULL, LORA, "--study", study))) >= {
        "method_name", "method.kind", "method.rank", "learning_rate"
    }  # fmt: skip


def test_diff_of_a_run_with_itself(study, capsys):
    assert output(capsys, "diff", LORA, LORA, "--study", study) == "the runs are the same\n"


def test_diff_of_outcomes(study, tmp_path, capsys):
    runs = load_plan(study).runs
    for name in (LORA, LORA_16):
        write_json(tmp_path / name / "outcome.json", {"spec": runs[name].training_spec()})
    one, two = (tmp_path / name / "outcome.json" for name in (LORA, LORA_16))
    assert rows(output(capsys, "diff", one, two))["method.rank"] == ("4", "16")
    assert rows(output(capsys, "diff", one, LORA_16, "--study", study))["method.rank"] == ("4", "16")


@pytest.mark.parametrize("value", [{}, [], 3, {"spec": {}}, {"spec": {"id": "x"}}, {"spec": None}])
def test_diff_of_a_file_that_is_no_outcome(tmp_path, capsys, value):
    path = tmp_path / "x.json"
    write_json(path, value)
    assert error(capsys, "diff", path, path) == f"{path}: no outcome of a run of this version of tunemap"


# --- retry and gc -----------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> Path:
    """Full ended well, LoRA failed, LoRA of rank 16 ran out of memory, the base row could not be evaluated."""
    outcomes = {BASE: ("ok", "error"), FULL: ("ok", "ok"), LORA: ("error", "skipped"), LORA_16: ("oom", "skipped")}
    for name, (training, evaluation) in outcomes.items():
        folder = tmp_path / "results" / "small"
        write_json(folder / "runs" / name / "outcome.json", {"outcome": training})
        (folder / "runs" / name / "weights").mkdir()
        write_json(folder / "evaluations" / name / "evaluation.json", {"outcome": evaluation})
    return tmp_path / "results"


def left(results: Path, kind: str = "runs") -> set[str]:
    return {path.name for path in (results / "small" / kind).iterdir()}


def test_retry_forgets_errors_alone(study, results, capsys):
    text = output(capsys, "retry", study, "--results", results)
    assert text.splitlines() == [
        f"will be repeated: {LORA}",
        f"will be repeated: {BASE} (evaluation)",
        "2 of 4 runs will be repeated by the next start",
    ]
    assert left(results) == {BASE, FULL, LORA_16}
    assert left(results, "evaluations") == {FULL, LORA_16}


@pytest.mark.parametrize("options", [[], ["--from-the-start"]])
def test_retry_goes_on_from_a_checkpoint_unless_told_otherwise(study, results, capsys, options):
    work = results / "small" / "unfinished" / LORA
    write_json(work / "checkpoint" / "manifest.json", {"step": 7})
    write_json(work / "finished" / "outcome.json", {"outcome": "error"})
    text = output(capsys, "retry", study, "--results", results, *options)
    assert (f"will be repeated: {LORA}, from step 7 on" in text.splitlines()) is not bool(options)
    assert (work / "checkpoint").exists() is not bool(options)
    assert not (work / "finished").exists()


def test_retry_of_named_outcomes(study, results, capsys):
    text = output(capsys, "retry", study, "--results", results, "--outcome", "oom", "--outcome", "timeout")
    assert text.splitlines()[-1] == "1 of 4 runs will be repeated by the next start"
    assert left(results) == left(results, "evaluations") == {BASE, FULL, LORA}


def test_retry_where_nothing_has_run(study, tmp_path, capsys):
    assert output(capsys, "retry", study, "--results", tmp_path / "none").startswith("0 of 4 runs")


DAMAGE = ["{}", "[]", "null", '{"outc', '{"outcome": "ok", "seal": "of other contents"}']


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_outcome_is_repeated_and_does_not_stop_retry(study, results, capsys, content):
    (results / "small" / "runs" / FULL / "outcome.json").write_text(content)
    text = output(capsys, "retry", study, "--results", results)
    assert f"will be repeated: {FULL}\nwill be repeated: {LORA}\n" in text
    assert left(results) == {BASE, LORA_16}


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_evaluation_is_repeated_and_does_not_stop_retry(study, results, capsys, content):
    (results / "small" / "evaluations" / FULL / "evaluation.json").write_text(content)
    text = output(capsys, "retry", study, "--results", results)
    assert f"will be repeated: {FULL} (evaluation)\nwill be repeated: {LORA}\n" in text
    assert left(results, "evaluations") == {LORA_16}


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"step": null}', '{"st'])
def test_a_damaged_checkpoint_does_not_stop_retry(study, results, capsys, content):
    manifest = results / "small" / "unfinished" / LORA / "checkpoint" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(content)
    assert f"will be repeated: {LORA}\n" in output(capsys, "retry", study, "--results", results)


def test_gc_lists_and_removes_what_no_run_uses(study, results, tmp_path, capsys):
    folder = results / "small"
    for kind in ("runs", "evaluations", "unfinished", "captures", "facts", "rooflines"):
        (folder / kind / "tiny.sums.lora.rank-99.seed-0").mkdir(parents=True)
    for name in (FULL, "tiny.sums.lora.rank-99.seed-0"):
        (folder / "captures" / name).mkdir(exist_ok=True, parents=True)
        write_json(folder / "inference" / f"{name}.json", {})
    (folder / "runs" / "notes.txt").write_text("mine")
    (tmp_path / "precious").mkdir()
    (folder / "runs" / "link").symlink_to(tmp_path / "precious")
    text = output(capsys, "gc", study, "--results", results)
    assert text.count("rank-99") == 7
    assert text.splitlines()[-1] == "7 results belong to no run of the study"
    assert "tiny.sums.lora.rank-99.seed-0" in left(results)
    assert output(capsys, "gc", study, "--results", results, "--remove").splitlines()[-1] == "7 results removed"
    assert left(results) == {BASE, FULL, LORA, LORA_16, "notes.txt", "link"}
    assert left(results, "unfinished") == left(results, "facts") == left(results, "rooflines") == set()
    assert left(results, "captures") == {FULL}
    assert left(results, "inference") == {f"{FULL}.json"}
    assert output(capsys, "gc", study, "--results", results) == "0 results belong to no run of the study\n"


def test_gc_leaves_other_studies_alone(study, results, capsys):
    (results / "other" / "runs" / "x").mkdir(parents=True)
    (results / "shared" / "models" / "y").mkdir(parents=True)
    output(capsys, "gc", study, "--results", results, "--remove")
    assert (results / "other" / "runs" / "x").is_dir()
    assert (results / "shared" / "models" / "y").is_dir()
