"""Starts the processes of a run, watches them, and writes how it ended, whatever happens to them.

Imports no torch, so that it survives what kills a training: no memory, a broken driver, a wrong library.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunemap.files import read_json, write_atomic, write_json
from tunemap.run import Run
from tunemap.training import steps
from tunemap.training.devices import Devices, lease_devices
from tunemap.training.failure import Failure, describe, read_failures

GRACE_SECONDS = 10.0  # between asking processes to end and ending them
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Paths:
    """The files and folders of a run."""

    model: Path
    dataset: Path
    tokens: Path
    work: Path  # checkpoints and partial records; removed once the outcome is written
    weights: Path
    steps: Path
    outcome: Path


class StoppedError(Exception):
    """Somebody asked the launcher to stop (Ctrl-C, scancel); there is no outcome, and the checkpoint stays."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def launch(run: Run, paths: Paths, *, device: str) -> int:
    """Train `run` and write its outcome; returns the exit code.

    The exit code is 0 whenever there is an outcome, also a bad one: a run that does not fit is a result. It is
    128 + N if signal N stopped the launcher.
    """
    started_at = datetime.now(UTC)
    started = time.monotonic()
    paths.work.mkdir(parents=True, exist_ok=True)
    for stale in [*paths.work.glob("failure.rank*.json"), paths.work / "result.json", paths.work / "progress.json"]:
        stale.unlink(missing_ok=True)
    failure: Failure | None = None
    try:
        if not run.is_base:
            with lease_devices(device, run.factors.gpus) as devices:
                failure = _train(run, paths, devices)
    except StoppedError as stopped:
        print(f"stopped by {stopped}; the next start resumes from the last checkpoint", flush=True)
        return 128 + stopped.signal_number
    except Exception as error:
        failure = describe(error, rank=0, phase="start", step=None)
    outcome = _outcome(run, paths, failure)
    outcome |= {"started_at": started_at.isoformat(timespec="seconds"), "wall_s": time.monotonic() - started}
    if failure is not None or run.is_base:
        shutil.rmtree(paths.weights, ignore_errors=True)
        paths.weights.mkdir(parents=True)
    write_atomic(paths.steps, steps.to_csv(steps.merge(paths.work)))
    write_json(paths.outcome, outcome)
    shutil.rmtree(paths.work, ignore_errors=True)
    print(f"outcome: {outcome['outcome']}" + (f": {outcome['reason']}" if outcome["reason"] else ""), flush=True)
    return 0


def _train(run: Run, paths: Paths, devices: Devices) -> Failure | None:
    """Run the workers to their end; returns None if all of them finished."""
    run_file = paths.work / "run.json"
    write_json(run_file, run.training_spec())
    limit = run.factors.time_limit_minutes
    deadline = None if limit is None else time.monotonic() + 60 * limit
    process = subprocess.Popen(
        _command(run, paths, run_file, devices.kind),
        env=_environment(run, devices),
        start_new_session=True,  # one group to end, however many ranks and helpers there are
    )
    try:
        with _signals_as_exceptions():
            in_time = _wait(process, deadline)
    finally:
        end_group(process)
    if not in_time:
        progress = _progress(paths.work)
        reason = f"not finished after time_limit_minutes {limit}"
        return Failure("timeout", reason, 0, progress.get("phase"), progress.get("step"), None)
    if process.returncode == 0 and (paths.work / "result.json").exists():
        return None
    failures = read_failures(paths.work)
    if failures:
        return failures[0]
    progress = _progress(paths.work)
    return Failure("error", _how_it_died(process.returncode), 0, progress.get("phase"), progress.get("step"), None)


def _command(run: Run, paths: Paths, run_file: Path, device: str) -> list[str]:
    worker = ["-m", "tunemap.training.worker", "--run-file", str(run_file), "--device", device]
    for name in ("model", "dataset", "tokens", "work", "weights"):
        worker += [f"--{name}", str(getattr(paths, name))]
    if run.factors.strategy == "single":
        return [sys.executable, *worker]
    # --standalone picks a free port, so several runs on one host do not meet.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.factors.gpus}"]
    return [sys.executable, *torchrun, *worker]


def _environment(run: Run, devices: Devices) -> dict[str, str]:
    """The workers' environment: what decides numbers or speed is set, not inherited."""
    environment = dict(os.environ)
    source = str(Path(__file__).resolve().parents[2])
    known = environment.get("PYTHONPATH")
    environment |= {
        "PYTHONPATH": f"{source}{os.pathsep}{known}" if known else source,
        "OMP_NUM_THREADS": str(run.factors.threads_per_process),
        "MKL_NUM_THREADS": str(run.factors.threads_per_process),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **devices.environment,
    }
    return environment


def _wait(process: subprocess.Popen[bytes], deadline: float | None) -> bool:
    """Wait for the end of the process; False if the deadline came first."""
    while process.poll() is None:
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group: ask first, insist after a grace period."""
    deadline = time.monotonic() + GRACE_SECONDS
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(POLL_SECONDS)
        deadline = time.monotonic() + GRACE_SECONDS
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, which would count as alive otherwise
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    def stop(signal_number: int, frame: object) -> None:
        raise StoppedError(signal_number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _how_it_died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        return f"the training process was ended by {name}{hint}"
    return f"the training process ended with exit code {code} and left no message; see the log of this run"


def _progress(work: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((work / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return values


def _outcome(run: Run, paths: Paths, failure: Failure | None) -> dict[str, Any]:
    """The outcome file of a run: how it ended, and every measurement there is, of a failed run too."""
    result: dict[str, Any] = {}
    if failure is None and not run.is_base:
        result = read_json(paths.work / "result.json")
    measurements: dict[str, Any] = {}
    if not run.is_base:
        measurements = steps.summarise_steps(steps.merge(paths.work)) | _from_result(result)
    return {
        "run": run.id,
        "digest": run.training_digest,
        "outcome": failure.outcome if failure else "ok",
        "reason": failure.reason if failure else None,
        "phase": failure.phase if failure else None,
        "step": failure.step if failure else None,
        "rank": failure.rank if failure else None,
        "traceback": failure.traceback if failure else None,
        "bytes_asked": failure.bytes_asked if failure else None,
        "bytes_free": failure.bytes_free if failure else None,
        "spec": run.training_spec(),
        "measurements": measurements,
        "memory_by_rank": result.get("memory", []),
        "gates": result.get("gates") or _progress(paths.work).get("gates", []),
        "facts": result.get("facts", {}),
        "environment": result.get("environment", {}),
    }


def _from_result(result: dict[str, Any]) -> dict[str, Any]:
    if not result:
        return {}
    parts = result["parts_s"]
    return {
        **_maximum_over_ranks(result["memory"]),
        **{f"{name}_parameters": count for name, count in result["parameters"].items()},
        "load_time_s": parts["load"],
        "compile_time_s": parts["compile"],
        "estimation_time_s": parts["estimation"],
        "train_time_s": parts["training"],
        "checkpoint_time_s": parts["checkpoint"],
        "other_time_s": parts["other"],
        "wall_time_s": sum(parts.values()),
        "data_order_hash": result["data_order_hash"],
        "steps_planned": result["steps_planned"],
    }


def _maximum_over_ranks(records: list[dict[str, Any]]) -> dict[str, int | None]:
    """Column by column the largest; empty where a rank does not know it."""
    columns = [name for name in records[0] if name != "rank"]
    values = {name: [record[name] for record in records] for name in columns}
    return {name: None if None in known else max(known) for name, known in values.items()}
