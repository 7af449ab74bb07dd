"""Further evaluations in a process that has made one: each run's own job gets the same, or makes its own."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_study import ARCHITECTURE
from tunemap import ahead, corpora, evaluation, planned
from tunemap.config import BaseMethod, DatasetConfig, Factors, RandomModel
from tunemap.data.sources import prepare as prepare_dataset
from tunemap.data.tokens import tokenize
from tunemap.evaluation import evaluate_to_files
from tunemap.files import read_json, write_json, write_sealed
from tunemap.models import prepare as prepare_model
from tunemap.predictions import Share
from tunemap.run import Run
from tunemap.sources import VARIABLE

MODEL = RandomModel(source="random", config="qwen2", tokenizer="arithmetic")
DATASET = DatasetConfig(task="arithmetic", source="made", train_rows=8, test_rows=5)
SHARE = Share({}, None, [], 0.1)


def make_run(name: str, **factors: Any) -> Run:
    """A row without fine-tuning, which has nothing to load besides the model."""
    return Run(
        id=name,
        model_name="m",
        model=MODEL,
        dataset_name="d",
        dataset=DATASET,
        method_name="base",
        method=BaseMethod(kind="base"),
        prompt_template=None,
        factors=Factors(**({"max_new_tokens": 4, "max_length": 64} | factors)),
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `shared` of results: model and tokens."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("prepared")
    run = make_run("any")
    (root / "qwen2").mkdir()
    (root / "qwen2" / "config.json").write_text(json.dumps(ARCHITECTURE))
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    model, tokens = root / "shared" / "models" / run.model_key, root / "shared" / "tokens" / run.tokens_key
    prepare_model(MODEL, model, data_root=root)
    prepare_dataset(DATASET, root / "rows", data_root=None)
    tokenize(root / "rows", model, tokens, max_length=64, prompt_template=None, system_prompt=None)
    return root / "shared"


@pytest.fixture
def study(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/STUDY with three trained runs, none of them evaluated, on no cluster."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(VARIABLE, json.dumps({ahead.SCRIPT.name: "as planned"}))
    study = tmp_path / "results" / "small"
    study.mkdir(parents=True)
    (study.parent / "shared").symlink_to(prepared)
    monkeypatch.setenv(planned.VARIABLE, json.dumps([str(study.parent / "plan.json")]))
    plan(study, *(make_run(name) for name in "abc"))
    return study


def plan(study: Path, *runs: Run) -> None:
    """Let these be the workflow's runs, all trained."""
    write_json(study.parent / "plan.json", {"runs": {run.id: run.evaluation_spec() for run in runs}})
    for run in runs:
        folder = study / "runs" / run.id
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        write_sealed(folder / "outcome.json", {"digest": run.training_digest, "outcome": "ok"})


def evaluate(study: Path, name: str) -> dict[str, Any]:
    """What the job of a run leaves."""
    results = study / "evaluations" / name
    found = ahead._evaluation_of(make_run(name), study)
    evaluate_to_files(
        found.run,
        device="cpu",
        model=found.model,
        tokens=found.tokens,
        outcome=found.outcome,
        weights=found.weights,
        evaluation=results / "evaluation.json",
        predictions=results / "predictions.jsonl",
    )
    return read_json(results / "evaluation.json")


def go_on(study: Path, evaluate: Callable[..., Share], *, start_s: float = 5.0, own_s: float = 0.1) -> list[str]:
    """Go on from run a; returns the runs that were evaluated ahead."""
    ahead.go_on(make_run("a"), study, device="cpu", start_s=start_s, own_s=own_s, evaluate=evaluate)
    return sorted(path.parent.name for path in study.glob(f"evaluations/*/{ahead.AHEAD}"))


def nothing(*_: Any) -> Share:
    return SHARE


def test_one_process_evaluates_all_and_each_job_writes_what_it_would_have_made(
    study: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = evaluate(study, "a")
    assert own["outcome"] == "ok"
    assert sorted(path.parent.name for path in study.glob(f"evaluations/*/{ahead.AHEAD}")) == ["b", "c"]
    assert "ahead of its own job: b" in capfd.readouterr().out
    monkeypatch.setattr(evaluation, "_run_processes", lambda *_, **__: pytest.fail("evaluated anew"))
    others = [evaluate(study, name) for name in "bc"]
    assert capfd.readouterr().out.count("evaluated by the process of another run's job") == 2
    answers = {(study / "evaluations" / name / "predictions.jsonl").read_text() for name in "abc"}
    assert len(answers) == 1  # three times the same model
    same = own.keys() - {"run", "seal", "evaluation_time_s"}
    assert all(other[name] == own[name] for other in others for name in same)
    assert {path.name for path in (study / "evaluations" / "b").iterdir()} == {"evaluation.json", "predictions.jsonl"}


@pytest.mark.parametrize("change", ["digest", "host", "outcome", "models", "tokens", "device", "source", "damage"])
def test_what_was_made_from_other_things_is_not_taken(
    study: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert go_on(study, nothing) == ["b", "c"]
    found = ahead._evaluation_of(make_run("b"), study)
    assert ahead.made_of(found, "cpu") == SHARE.to_json()
    if change == "digest":
        found = replace(found, run=make_run("b", extraction="hpml"))
    elif change == "host":
        monkeypatch.setattr(ahead.socket, "gethostname", lambda: "another")
    elif change == "outcome":
        write_sealed(found.outcome, {"digest": found.run.training_digest, "outcome": "ok", "weights_sha256": {}})
    elif change in ("models", "tokens"):
        signature = ahead._signature
        monkeypatch.setattr(ahead, "_signature", lambda path: {} if path.parent.name == change else signature(path))
    elif change == "source":
        monkeypatch.setattr(ahead, "planned_digest", lambda *_: "another")
    elif change == "damage":
        (found.results / ahead.AHEAD).write_text('{"key"')
    assert ahead.made_of(found, "cuda" if change == "device" else "cpu") is None


def test_a_file_that_changes_changes_the_signature_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "test.npz").write_bytes(b"rows")
    before = ahead._signature(tmp_path)
    assert list(before) == ["in/test.npz"]
    (tmp_path / "in" / "test.npz").write_bytes(b"rowz")
    assert ahead._signature(tmp_path) != before


def test_it_ends_where_a_process_of_its_own_is_no_dearer(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert go_on(study, nothing, start_s=5, own_s=6) == []
    monkeypatch.setattr(ahead, "LIMIT_S", 3.0)
    assert go_on(study, nothing, start_s=5, own_s=4) == []  # one more may take as long as the limit of all
    assert go_on(study, nothing, start_s=5, own_s=0.01) == ["b", "c"]


def test_runs_behind_its_own_come_first_and_a_long_search_ends(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(run: Run, *_: Any) -> Share:
        order.append(run.id)
        return SHARE

    ahead.go_on(make_run("b"), study, device="cpu", start_s=5, own_s=0.1, evaluate=note)
    assert order == ["c", "a"]
    monkeypatch.setattr(ahead, "SEARCH_S", -1.0)
    plan(study, *(make_run(name) for name in "abcd"))
    ahead.go_on(make_run("b"), study, device="cpu", start_s=5, own_s=0.1, evaluate=note)
    assert order == ["c", "a"]


@pytest.mark.parametrize(
    "other",
    [{"max_length": 32}, {"max_new_tokens": 9}, {"evaluation_batch_size": 2}, {"threads_per_process": 2}, {"gpus": 2}],
)
def test_runs_that_need_another_process_are_left_to_their_jobs(study: Path, other: dict[str, Any]) -> None:
    more = {"strategy": "ddp"} if "gpus" in other else {}
    plan(study, make_run("a"), make_run("b", **other, **more), make_run("c"))
    assert go_on(study, nothing) == ["c"]


def test_runs_that_are_not_trained_or_evaluated_or_being_evaluated_are_passed_over(study: Path) -> None:
    plan(study, *(make_run(name) for name in "abcde"))
    write_sealed(study / "runs" / "b" / "outcome.json", {"digest": make_run("b").training_digest, "outcome": "oom"})
    done = make_run("c")
    write_json(
        study / "evaluations" / "c" / "evaluation.json",
        {"digest": done.evaluation_digest, "training_digest": done.training_digest},
    )
    with ahead.alone(study / "evaluations" / "d", wait=False) as is_ours:
        assert is_ours
        assert go_on(study, nothing) == ["e"]
    assert go_on(study, nothing) == ["d", "e"]


def test_what_fails_is_left_to_its_own_job(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any) -> Share:
        raise RuntimeError("CUDA error")

    assert go_on(study, fail) == []
    assert capsys.readouterr().out.count("left to its own job: RuntimeError: CUDA error") == 1


def test_outside_of_a_workflow_nobody_is_evaluated_ahead(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(planned.VARIABLE)
    assert go_on(study, nothing) == []


def test_only_a_job_of_this_machine_and_one_process_goes_on(study: Path) -> None:
    path = study / "evaluations" / "a" / "evaluation.json"
    assert ahead.study_of(make_run("a"), path, {}) == study
    assert ahead.study_of(make_run("a"), path, {"SLURM_JOB_ID": "1"}) is None
    assert ahead.study_of(make_run("a", gpus=2, strategy="ddp"), path, {}) is None
    assert ahead.study_of(make_run("b"), path, {}) is None
    assert ahead.study_of(make_run("a"), Path("evaluation.json"), {}) is None


def test_what_becomes_of_the_others_is_no_failure_of_the_run(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has left its run's share, and is killed while it goes on."""
    die = "import os, signal, sys; open(sys.argv[1], 'w').write(sys.argv[2]); os.kill(os.getpid(), signal.SIGKILL)"
    share = json.dumps(Share({}, 4, [], 0.1).to_json())

    def command(work: Path, device: str, rank: int, count: int, folders: dict[str, Path]) -> list[str]:
        assert folders["study"] == study
        return [sys.executable, "-c", die, str(work / "share.rank0.json"), share]

    monkeypatch.setattr(evaluation, "_command", command)
    monkeypatch.setattr(evaluation, "_combined", lambda *_: ({"n": 0}, []))
    assert evaluate(study, "a")["outcome"] == "ok"
