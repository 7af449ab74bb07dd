"""The frozen plan: what a queued job trains is what was planned when it was submitted."""

import json

import pytest

from tunemap.errors import UserError
from tunemap.frozen import freeze, thaw
from tunemap.planned import VARIABLE, planned_runs, run_of
from tunemap.study_file import load_plan

STUDY = """\
study: small
models: {tiny: {source: tiny}}
datasets: {sums: {task: arithmetic, source: made}}
methods: {full: {kind: full}, lora: {kind: lora, rank: 4, target_modules: [q_proj]}}
defaults: {model: tiny, dataset: sums, max_steps: 20}
experiments:
  - {name: e, question: Which, vary: {method: [full, lora]}}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def frozen(path, folder, text=STUDY, data_root=None):
    path.write_text(text)
    environment = {}
    return freeze(load_plan(path, data_root=data_root), folder, environment), environment


def test_the_first_process_has_nothing_to_thaw():
    assert thaw({}) is None
    assert planned_runs({}) == {}


def test_round_trip(study, tmp_path):
    plan = load_plan(study)
    environment: dict[str, str] = {}
    first = freeze(plan, tmp_path / "plans", environment)
    again = thaw(environment)
    assert again is not None
    assert (again.report_file, again.tables_file) == (first.report_file, first.tables_file)
    assert again.values == json.loads(json.dumps(first.values))
    assert list(again.runs) == list(plan.runs)
    assert {name: run_of(planned) for name, planned in planned_runs(environment).items()} == again.runs
    for name, run in plan.runs.items():
        for spec in ("training_spec", "evaluation_spec"):
            assert getattr(again, spec)(name) == getattr(first, spec)(name)
        assert again.runs[name].training_digest == run.training_digest
        assert again.runs[name].evaluation_digest == run.evaluation_digest
        assert again.model_spec(run.model_key) == first.model_spec(run.model_key)
        assert again.dataset_spec(run.dataset_key) == first.dataset_spec(run.dataset_key)
        assert again.tokens_spec(run.tokens_key) == first.tokens_spec(run.tokens_key)
        assert again.tokens_run(run.tokens_key).tokens_key == run.tokens_key
    assert (again.study, again.device, again.data_root) == ("small", "auto", ".")


def test_an_edit_while_jobs_queue_does_not_reach_them(study, tmp_path):
    plan, environment = frozen(study, tmp_path / "plans")
    planned = {name: plan.training_spec(name) for name in plan.runs}
    study.write_text(STUDY.replace("rank: 4", "rank: 64").replace("max_steps: 20", "max_steps: 999"))
    thawed = thaw(environment)
    assert {name: thawed.training_spec(name) for name in thawed.runs} == planned
    study.unlink()
    assert thaw(environment) is not None


def test_a_job_in_another_folder_finds_the_plan(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment: dict[str, str] = {}
    first = freeze(load_plan(study), (tmp_path / "plans").relative_to(tmp_path), environment)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = thaw(environment)
    assert again.report_file == first.report_file  # the same name, or Snakemake would see another parameter
    assert again.runs == first.runs


@pytest.mark.parametrize("wording", ["report: {title: Other}\n", "report: {introduction: Other}\n"])
def test_wording_makes_a_new_report_and_no_new_tables(study, tmp_path, wording):
    before, _ = frozen(study, tmp_path / "plans")
    after, _ = frozen(study, tmp_path / "plans", STUDY + wording)
    assert before.tables_file == after.tables_file
    assert before.report_file != after.report_file
    assert "Other" in (tmp_path / "plans" / after.report_file).read_text()


def test_where_the_data_lie_makes_no_new_tables(study, tmp_path):
    before, _ = frozen(study, tmp_path / "plans")
    after, _ = frozen(study, tmp_path / "plans", data_root=str(tmp_path))
    assert before.tables_file == after.tables_file


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rank: 4", "rank: 5"),
        ("question: Which", "question: What"),
        ("defaults:", "report: {baseline_method: lora}\ndefaults:"),
    ],
)
def test_what_tables_show_makes_new_tables(study, tmp_path, old, new):
    before, _ = frozen(study, tmp_path / "plans")
    after, _ = frozen(study, tmp_path / "plans", STUDY.replace(old, new))
    assert before.tables_file != after.tables_file


def test_the_same_plan_is_written_once(study, tmp_path):
    first, environment = frozen(study, tmp_path / "plans")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "plans").iterdir()}
    again, other = frozen(study, tmp_path / "plans")
    assert (again.report_file, other) == (first.report_file, environment)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "plans").iterdir()} == times


def test_a_key_that_no_run_has_is_named(study, tmp_path):
    plan, _ = frozen(study, tmp_path / "plans")
    for ask in (plan.model_spec, plan.model_sources, plan.dataset_spec, plan.dataset_sources, plan.tokens_spec):
        with pytest.raises(UserError, match="no run of study small uses nothing; it uses: "):
            ask("nothing")


def test_a_plan_that_is_gone_is_named(study, tmp_path):
    _, environment = frozen(study, tmp_path / "plans")
    for path in (tmp_path / "plans").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"plan-[0-9a-f]{16}\.json: no such file"):
        thaw(environment)
    assert VARIABLE in environment


def test_local_sources_are_files(study, tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    text = STUDY.replace("{source: tiny}", "{source: local, path: m}").replace(
        "{task: arithmetic, source: made}", "{task: gsm8k, source: local, path: .}"
    )
    plan, _ = frozen(study, tmp_path / "plans", text, data_root=str(tmp_path))
    run = next(iter(plan.runs.values()))
    assert plan.model_sources(run.model_key) == [str(tmp_path / "m/config.json")]
    assert plan.dataset_sources(run.dataset_key) == [str(tmp_path / "test.jsonl"), str(tmp_path / "train.jsonl")]
