"""`tunemap status`: every state that a run can be in, from the files that runs leave."""

import json
import os
import socket
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from tunemap import status
from tunemap.cli import main
from tunemap.slurm import QueuedJob
from tunemap.training import lease as leases
from tunemap.training.steps import COLUMNS

COMMENT = "rule_train_wildcards_s_r"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results" / "s" / "unfinished" / "r").mkdir(parents=True)
    return tmp_path / "results" / "s"


def _lease(folder, **values) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    mine = leases.Lease("r", socket.gethostname(), pid, leases._started(pid), None, now, now)
    (folder / "unfinished" / "r" / "lease.json").write_text(json.dumps(asdict(mine) | values))


def _ended(folder, outcome: str, reason: str | None = None, step: int | None = None) -> None:
    path = folder / "runs" / "r" / "outcome.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"outcome": outcome, "reason": reason, "step": step}))


def test_a_running_run_shows_step_rate_and_time_left(folder):
    work = folder / "unfinished" / "r"
    _lease(folder)
    _ended(folder, "error", "the launcher was killed before it could say how the run ended")  # until it has ended
    (work / "progress.json").write_text(json.dumps({"phase": "train", "step": 40, "steps": 100}))
    (work / "heartbeat.rank0").write_text(f"{45:>12} {'forward':<12}")
    for rank in (0, 1):
        rows = [
            ",".join({"step": str(step), "real_tokens": "300", "step_time_s": "0.5"}.get(name, "0") for name in COLUMNS)
            for step in range(40)
        ]
        (work / f"steps.rank{rank}.csv").write_text("\n".join([",".join(COLUMNS), *rows, "0,40,"]) + "\n")
    found = status.status_of("r", folder, None)
    assert (found.state, found.step, found.steps) == ("running", 45, 100)
    assert found.tokens_per_second == pytest.approx(2 * 300 / 0.5)
    assert found.left_s == pytest.approx(55 * 0.5)
    assert found.where == f"pid {os.getpid()} on {socket.gethostname()}"


def test_a_run_that_loads_says_so(folder):
    _lease(folder, host="n1", slurm_job_id="7")
    (folder / "unfinished" / "r" / "progress.json").write_text(json.dumps({"phase": "load", "step": None}))
    jobs = [QueuedJob("7", "RUNNING", "n1", COMMENT, "/")]
    found = status.status_of("r", folder, jobs)
    assert (found.state, found.reason, found.where) == ("running", "load", "job 7 on n1")


def test_a_waiting_job_is_queued_with_slurms_reason(folder):
    jobs = [QueuedJob("7", "PENDING", "(Resources)", COMMENT, "/")]
    found = status.status_of("r", folder, jobs)
    assert (found.state, found.where, found.reason) == ("queued", "job 7", "(Resources)")
    assert status.status_of("other", folder, jobs).state == "not started"


def test_a_failed_run_shows_why_and_the_end_of_its_log(folder):
    _ended(folder, "oom", "CUDA out of memory", step=3)
    log = folder.parent.parent / "logs" / "s" / "train" / "r.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {number}\n\n" for number in range(20)))
    found = status.status_of("r", folder, [])
    assert (found.state, found.reason, found.step) == ("failed", "oom: CUDA out of memory", 3)
    assert found.log == tuple(f"line {number}" for number in range(15, 20))


def test_a_stopped_run_says_where_it_goes_on(folder):
    _lease(folder, pid_started=1)  # of a process that is gone
    assert status.status_of("r", folder, []).state == "stopped"
    manifest = folder / "unfinished" / "r" / "checkpoint" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"step": 20}))
    found = status.status_of("r", folder, [])
    assert (found.state, found.step) == ("stopped", 20)


def test_the_command_asks_slurm_once_and_works_on_a_folder(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(status, "queue", lambda: asked.append(1))
    _ended(folder, "ok")
    (folder / "unfinished" / "second").mkdir()
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "s: 2 runs: 1 finished, 1 not started (Slurm was not asked: it does not answer here)" in said
    assert len(asked) == 1


DAMAGED_OUTCOMES = ["{}", "[]", "null", '{"outc', "\udcff", '{"outcome": "ok", "seal": "of other contents"}']


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("runs/r/outcome.json", content) for content in DAMAGED_OUTCOMES],
        *[
            ("unfinished/r/checkpoint/manifest.json", content)
            for content in ("{}", "[]", "null", '{"step": null}', '{"st')
        ],
    ],
)
def test_a_damaged_file_is_named_and_the_other_runs_are_shown(folder, capsys, monkeypatch, name, content):
    monkeypatch.setattr(status, "queue", list)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content, errors="surrogateescape")
    (folder / "unfinished" / "second").mkdir()
    assert main(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "s: 2 runs: 1 damaged, 1 not started" in said
    assert f"{folder / name}: " in said


def test_a_run_that_trains_is_running_whatever_its_outcome_holds(folder):
    _lease(folder)
    path = folder / "runs" / "r" / "outcome.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"outc')  # of an earlier try
    assert status.status_of("r", folder, []).state == "running"


def test_a_run_whose_records_are_damaged_is_shown_with_its_folder(folder):
    _lease(folder)
    (folder / "unfinished" / "r" / "heartbeat.rank0").write_text("what forward")
    found = status._status_or_damage("r", folder, [])
    assert found.state == "damaged"
    assert found.reason.startswith(f"{folder / 'unfinished' / 'r'}: damaged")


def test_a_failure_without_a_reason_is_a_failure(folder):
    path = folder / "runs" / "r" / "outcome.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"outcome": "oom"}))
    found = status.status_of("r", folder, [])
    assert (found.state, found.reason) == ("failed", "oom: no reason given")


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"runs": null}', '{"ru'])
def test_a_damaged_plan_is_explained(folder, capsys, content):
    (folder / "plan.json").write_text(content)
    assert main(["status", str(folder)]) == 1
    assert f"error: {folder / 'plan.json'}: " in capsys.readouterr().err


def test_a_folder_without_results_is_explained(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 1
    assert "neither a study file nor a folder with results" in capsys.readouterr().err


def test_the_runs_of_a_study_file_are_listed_before_anything_ran(repository, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(status, "queue", list)
    file = repository / "config" / "config.yaml"
    assert main(["status", str(file), "--results", str(tmp_path), "--all"]) == 0
    assert "not started" in capsys.readouterr().out


STUDY = """\
study: small
data_root: $NO_SUCH_VARIABLE
models: {tiny: {source: tiny}}
datasets: {sums: {task: arithmetic, source: made}}
methods: {full: {kind: full}}
defaults: {model: tiny, dataset: sums, method: full}
experiments: [{name: e, question: "?", vary: {learning_rate: [0.1, 0.2]}}]
scales: {short: {experiments: {e: {vary: {learning_rate: [0.1]}}}}}
"""


def test_the_runs_of_a_scale_are_counted_with_the_data_root_that_is_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(status, "queue", list)
    (tmp_path / "study.yaml").write_text(STUDY)
    options = ["--results", str(tmp_path), "--data-root", str(tmp_path)]
    assert main(["status", str(tmp_path / "study.yaml"), *options]) == 0
    assert "small: 3 runs: 3 not started" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "study.yaml"), *options, "--scale", "short"]) == 0
    assert "small-short: 2 runs: 2 not started" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--scale", "--data-root"])
def test_a_folder_of_results_has_no_other_size(folder, capsys, option):
    assert main(["status", str(folder), option, "x"]) == 1
    assert "a folder holds the results of one size" in capsys.readouterr().err
