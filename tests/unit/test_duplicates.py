"""What an earlier start left running is found before anything is submitted."""

import json
import os
import socket
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunemap import duplicates
from tunemap.slurm import QueuedJob
from tunemap.training.lease import Lease, _started

PLAN = SimpleNamespace(study="s", runs={"r": SimpleNamespace(tokens_key="tokens-1")})


def _job(comment: str, folder: Path | None = None) -> QueuedJob:
    return QueuedJob("7", "RUNNING", "n1", comment, str(folder or Path.cwd()))


@pytest.mark.parametrize("comment", ["rule_train_wildcards_s_r", "rule_tokenize_dataset_wildcards_tokens-1"])
def test_jobs_of_this_study_are_named_with_the_commands(monkeypatch, tmp_path, comment):
    monkeypatch.setattr(duplicates, "queue", lambda: [_job(comment)])
    message = duplicates.what_is_left(tmp_path, PLAN)
    assert comment in message
    assert "squeue --jobs=7" in message
    assert "scancel 7" in message


def test_jobs_of_other_studies_and_folders_do_not_matter(monkeypatch, tmp_path):
    others = [_job("rule_train_wildcards_other_r"), _job("rule_train_wildcards_s_r", tmp_path)]
    monkeypatch.setattr(duplicates, "queue", lambda: others)
    assert duplicates.what_is_left(tmp_path, PLAN) is None


@pytest.mark.parametrize("alive", [True, False])
def test_launchers_of_this_machine_are_found_by_their_leases(monkeypatch, tmp_path, alive):
    monkeypatch.setattr(duplicates, "queue", lambda: None)
    work = tmp_path / "s" / "unfinished" / "r"
    work.mkdir(parents=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    started = _started(os.getpid()) if alive else 1
    lease = Lease("r", socket.gethostname(), os.getpid(), started, None, now, now)
    (work / "lease.json").write_text(json.dumps(asdict(lease)))
    message = duplicates.what_is_left(tmp_path, PLAN)
    assert (message is not None) is alive
    if alive:
        assert f"kill {os.getpid()}" in message
