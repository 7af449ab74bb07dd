"""A launcher that is asked to stop writes a checkpoint first; what helps is tried again, and nothing else is."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunemap.files import read_json
from tunemap.training import launch as launching
from tunemap.training.devices import Devices
from tunemap.training.failure import UnsupportedRunError
from tunemap.training.heartbeat import read_beats

LORA = {"kind": "lora", "rank": 2}
ENDLESS = {"max_steps": 100_000, "logging_steps": 5, "checkpoint_steps": 100_000}


@contextmanager
def signal_after(step: int, work: Path, number: int) -> Iterator[None]:
    """Send this process a signal once the run has come so far; the handlers outside of training ignore it."""

    def watch() -> None:
        while not ended.wait(0.02):
            if any(beat.step >= step for beat in read_beats(work)):
                os.kill(os.getpid(), number)
                return

    ended = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@pytest.mark.parametrize(
    ("factors", "signals"),
    [({}, (signal.SIGURG, signal.SIGTERM)), ({"strategy": "ddp", "gpus": 2}, (signal.SIGURG,))],
)
def test_a_stop_costs_at_most_a_logging_window(prepared, tmp_path, make_run, capfd, factors, signals):
    run, work = make_run(LORA, **ENDLESS, **factors), tmp_path / "work"
    results = {"weights": tmp_path / "weights", "steps": tmp_path / "steps.csv", "outcome": tmp_path / "outcome.json"}
    paths = launching.Paths(prepared.model, prepared.dataset, prepared.tokens, work, **results)
    stopped = 0
    for number in signals:
        with signal_after(stopped + 12, work, number):
            assert launching.launch(run, paths, device="cpu") == 128 + number
        step = read_json(work / "checkpoint" / "manifest.json")["step"]
        assert step >= stopped + 12
        assert step % 5 == 0
        said = capfd.readouterr().out
        assert f"stopped after the checkpoint of step {step}" in said
        assert (f"resuming after step {stopped}" in said) is (stopped > 0)
        assert not (tmp_path / "outcome.json").exists()
        assert not (work / "lease.json").exists()
        stopped = step


def _paths(work: Path) -> launching.Paths:
    return launching.Paths(work, work, work, work, work, work, work)


def test_a_stop_does_not_take_a_result_that_is_written(tmp_path):
    (tmp_path / "progress.json").write_text('{"phase": "save"}')
    with launching._signals(tmp_path) as stop:
        with pytest.raises(launching.StoppedError):
            os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / launching.RESULT).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number is None


def test_a_second_signal_does_not_wait_for_the_checkpoint(tmp_path, monkeypatch, make_run):
    (tmp_path / "progress.json").write_text('{"phase": "train"}')
    monkeypatch.setattr(launching, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])

    def insist() -> None:
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=insist, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(launching.StoppedError, match="SIGINT"):
        launching._train(make_run({"kind": "full"}), _paths(tmp_path), Devices("cpu"))
    assert time.monotonic() - started < 10


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(tmp_path, monkeypatch, make_run):
    (tmp_path / "progress.json").write_text('{"phase": "train"}')
    monkeypatch.setattr(launching, "STOP_LIMIT_S", 0.2)
    monkeypatch.setattr(launching, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGURG)).start()
    with pytest.raises(launching.StoppedError, match="SIGURG"):
        launching._train(make_run({"kind": "full"}), _paths(tmp_path), Devices("cpu"))


def test_workers_that_hear_the_end_before_the_launcher_are_no_failure(tmp_path, monkeypatch, make_run):
    end = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(launching, "_command", lambda *_: [sys.executable, "-c", end])
    with pytest.raises(launching.StoppedError, match="SIGTERM"):
        launching._train(make_run({"kind": "full"}), _paths(tmp_path), Devices("cpu"))


def test_a_kill_for_want_of_memory_is_tried_again_while_there_is_another_attempt(tmp_path, monkeypatch, make_run):
    run, die = make_run({"kind": "full"}), "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(launching, "_command", lambda *_: [sys.executable, "-c", die])
    kills = iter(range(10))
    monkeypatch.setattr(launching, "oom_kills", lambda: next(kills))
    with pytest.raises(launching.HostMemoryError, match="host memory"):
        launching._train(run, _paths(tmp_path), Devices("cpu"), 1)
    failure = launching._train(run, _paths(tmp_path), Devices("cpu"), 0).failure
    assert failure.outcome == "oom"
    assert "host memory" in failure.reason
    monkeypatch.setattr(launching, "oom_kills", lambda: 0)  # somebody else's SIGKILL
    assert launching._train(run, _paths(tmp_path), Devices("cpu"), 1).failure.outcome == "error"


def test_more_than_one_node_needs_slurm(tmp_path, monkeypatch, make_run):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = make_run({"kind": "full"}, strategy="ddp", gpus=4, nodes=2)
    with pytest.raises(UnsupportedRunError, match="nodes is 2, which needs Slurm"):
        launching.torchrun_command(run, tmp_path)


def test_the_nodes_of_a_job_get_a_torchrun_each(tmp_path, monkeypatch, make_run):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(launching.shutil, "which", lambda name: f"/usr/bin/{name}")
    run = make_run({"kind": "full"}, strategy="ddp", gpus=4, nodes=2, threads_per_process=3)
    words = launching.torchrun_command(run, tmp_path)
    assert {"srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(words)
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=7"} <= set(words)
