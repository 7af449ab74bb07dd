"""One writer per run, and what is abandoned is taken over."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest

from tunemap.errors import UserError
from tunemap.slurm import QueuedJob
from tunemap.training import lease as leases
from tunemap.training.lease import Lease, hold, is_held, read_lease


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def _now(seconds_ago: float = 0.0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="seconds")


def _lease(**values) -> Lease:
    usual = Lease("r", "elsewhere", 7, 1, None, _now(), _now())
    return replace(usual, **values)


def _write(work, lease: Lease) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / "lease.json").write_text(json.dumps(asdict(lease)))


def _living() -> Lease:
    """The lease of a process that lives: this one."""
    return _lease(host=socket.gethostname(), pid=os.getpid(), pid_started=leases._started(os.getpid()))


def test_a_lease_names_its_holder_and_goes_with_it(tmp_path):
    with hold(tmp_path, "r"):
        lease = read_lease(tmp_path)
        assert (lease.run, lease.host, lease.pid) == ("r", socket.gethostname(), os.getpid())
        assert is_held(lease)
    assert list(tmp_path.iterdir()) == []


def test_a_second_launcher_is_refused_with_the_command_to_stop_the_first(tmp_path):
    with hold(tmp_path, "r"):
        before = (tmp_path / "lease.json").read_text()
        with pytest.raises(UserError, match=f"run r is being trained by process {os.getpid()}.*kill {os.getpid()}"):  # noqa: SIM117
            with hold(tmp_path, "r"):
                pass
        assert (tmp_path / "lease.json").read_text() == before


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    _write(tmp_path, replace(_living(), pid=dead.pid, pid_started=1))
    with hold(tmp_path, "r"):
        assert read_lease(tmp_path).pid == os.getpid()


def test_a_process_with_a_used_number_is_another_one():
    assert is_held(_living())
    assert not is_held(replace(_living(), pid_started=1))


@pytest.mark.parametrize(
    ("jobs", "held"),
    [
        ([QueuedJob("12", "RUNNING", "n1", "rule_train", "/")], True),
        ([QueuedJob("12", "PENDING", "(Priority)", "rule_train", "/")], False),  # in the queue again: it has stopped
        ([QueuedJob("13", "RUNNING", "n1", "rule_train", "/")], False),
        ([], False),
    ],
)
def test_a_job_holds_its_lease_while_the_queue_says_that_it_runs(jobs, held):
    assert is_held(_lease(slurm_job_id="12"), lambda: jobs) is held


def test_a_job_that_was_put_into_the_queue_again_takes_its_own_lease(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert not is_held(_lease(slurm_job_id="12"), lambda: pytest.fail("asked the queue about itself"))


@pytest.mark.parametrize("job", [None, "12"])
def test_where_nobody_can_be_asked_the_heartbeat_decides(job):
    assert is_held(_lease(slurm_job_id=job, heartbeat=_now(60)), lambda: None)
    assert not is_held(_lease(slurm_job_id=job, heartbeat=_now(600)), lambda: None)
    assert not is_held(_lease(slurm_job_id=job, heartbeat=_now(-600)), lambda: None)  # its clock was ahead


@pytest.mark.parametrize("seconds_ago", [9000, -9000], ids=["its clock is behind", "its clock is ahead"])
def test_a_holder_on_a_host_with_another_time_is_watched_before_it_is_called_dead(tmp_path, monkeypatch, seconds_ago):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    living = _lease(heartbeat=_now(seconds_ago))
    _write(tmp_path, living)
    renewed = replace(living, heartbeat=_now(seconds_ago - 30))
    threading.Timer(0.1, _write, (tmp_path, renewed)).start()
    with pytest.raises(UserError, match="run r is being trained by process 7 on elsewhere"):  # noqa: SIM117
        with hold(tmp_path, "r"):
            pass
    assert read_lease(tmp_path) == renewed
    with hold(tmp_path, "r"):  # silent for twice as long as it may be
        assert read_lease(tmp_path).pid == os.getpid()


def test_a_job_on_its_second_node_watches_the_first_which_may_still_compute(tmp_path, monkeypatch):
    """A node that Slurm loses sight of is down to it, and its jobs start again elsewhere; its processes may live."""
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(leases, "queue", list)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    first = _lease(slurm_job_id="12", heartbeat=_now(30))
    _write(tmp_path, first)
    threading.Timer(0.1, _write, (tmp_path, replace(first, heartbeat=_now()))).start()
    with pytest.raises(UserError, match="run r is being trained by Slurm job 12 on elsewhere"):  # noqa: SIM117
        with hold(tmp_path, "r"):
            pass
    with hold(tmp_path, "r"):  # silent now
        assert read_lease(tmp_path).pid == os.getpid()


def test_the_message_names_the_command_for_each_kind_of_holder():
    assert "scancel 12`" in leases.how_to_go_on(_lease(slurm_job_id="12"))
    assert "ssh elsewhere kill 7`" in leases.how_to_go_on(_lease())


def test_the_heartbeat_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    stale = _now(600)
    with hold(tmp_path, "r"):
        _write(tmp_path, replace(read_lease(tmp_path), heartbeat=stale))
        for _ in range(500):
            if (found := read_lease(tmp_path)) is not None and found.heartbeat != stale:
                break
            time.sleep(0.02)
        else:
            pytest.fail("nobody renewed it")


def test_a_renewal_that_fails_is_not_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    answers = iter([OSError(errno.ESTALE, "Stale file handle")])
    renewed = threading.Event()

    def write(path, content):
        for error in answers:
            raise error
        renewed.set()

    with hold(tmp_path, "r"):
        monkeypatch.setattr(leases, "write_json", write)
        assert renewed.wait(10)


def test_a_lease_that_was_taken_over_is_not_removed_by_its_first_holder(tmp_path):
    other = _lease()
    with hold(tmp_path, "r"):
        _write(tmp_path, other)
    assert read_lease(tmp_path) == other


def test_a_new_lease_is_not_removed_in_place_of_the_abandoned_one(tmp_path):
    new = _living()
    _write(tmp_path, new)
    leases._set_aside(tmp_path / "lease.json", _lease())  # what was judged before somebody else came
    assert read_lease(tmp_path) == new


def test_of_many_launchers_one_holds_the_lease(tmp_path):
    """Processes that race for one abandoned lease: at no time do two of them hold it."""
    _write(tmp_path, replace(_living(), pid_started=1))
    program = (
        "import sys, time; from pathlib import Path; from tunemap.training.lease import hold\n"
        "from tunemap.errors import UserError\n"
        "try:\n"
        "    with hold(Path(sys.argv[1]), 'r'):\n"
        "        print('held', flush=True); time.sleep(2)\n"
        "except UserError: print('refused')\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    assert said == ["held", "refused", "refused", "refused"]
