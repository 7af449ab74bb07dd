"""Starts the processes of a run, watches them, and writes how it ended, whatever happens to them.

Imports no torch, so that it survives what kills a training: no memory, a broken driver, a wrong library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json, write_atomic, write_json, write_sealed
from tunemap.gates import GateResult, reason, tripped
from tunemap.gates.measurement import mfu_bounds_gate, throughput_gate, wall_gate
from tunemap.measure.clock import Moment
from tunemap.measure.flops import utilisation
from tunemap.measure.ranks import memory_of_run
from tunemap.run import Run
from tunemap.training import finished, parent, steps
from tunemap.training.devices import Devices, device_kind, lease_devices
from tunemap.training.failure import (
    Failure,
    UnsupportedRunError,
    describe,
    how_it_ended,
    is_of_storage,
    read_failures,
)
from tunemap.training.heartbeat import STOP, Watchdog
from tunemap.training.hostmemory import TRY_AGAIN, HostMemoryError, explained, oom_kills
from tunemap.training.lease import hold

GRACE_SECONDS = 10.0  # between asking processes to end and ending them
POLL_SECONDS = 0.05
# While training: longer than any step, reading of losses or checkpoint should take. Compilation counts as a step.
STALL_LIMIT_S = 600.0
END_LIMIT_S = 60.0  # between the result of a run and the end of its processes
STOP_LIMIT_S = 100.0  # between the first signal to stop and the checkpoint; a scheduler warns 120 s before its limit
RESUMES = "the run resumes from its last checkpoint"
RESUMABLE = ("error", "timeout")  # a repetition may end better; out of memory or no number, it would fail again
# glibc gives the memory of every large tensor back to the system and asks for it again in the next step, which then
# clears it page by page: about a fifth of a small model's step, little of a large one's. These two variables keep it
# (mallopt(3)).
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 46)}


@dataclass(frozen=True)
class Paths:
    """The files and folders of a run."""

    model: Path
    dataset: Path
    tokens: Path
    work: Path  # checkpoints, partial records, and the results until the workflow has recorded them
    weights: Path
    steps: Path
    outcome: Path
    ceilings: Path | None = None  # measured matmul ceilings, where there are any

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that tell the contents of the run's inputs."""
        return {
            "model": self.model / "model.json",
            "dataset": self.dataset / "dataset.json",
            "tokens": self.tokens / "train.npz",
        }

    @property
    def results(self) -> dict[str, Path]:
        """Where the workflow expects the results."""
        return {"weights": self.weights, "steps": self.steps, "outcome": self.outcome}


class StoppedError(Exception):
    """Somebody asked for a stop (Ctrl-C, scancel, a time limit that is near); no outcome, and the checkpoint stays."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def launch(run: Run, paths: Paths, *, device: str, attempts_left: int = 0) -> int:
    """Train `run` and write its outcome; returns the exit code.

    The exit code is 0 whenever there is an outcome, also a bad one: a run that does not fit is a result. It is
    128 + N if signal N stopped the launcher, and TRY_AGAIN if host memory ran out and `attempts_left` is not 0.

    Raises UserError if somebody else is training this run.
    """
    with hold(paths.work, run.id):
        return _launch(run, paths, device, attempts_left)


def _launch(run: Run, paths: Paths, device: str, attempts_left: int) -> int:
    started_at = datetime.now(UTC)
    started = time.monotonic()
    kind = device_kind(device) if device == "auto" else device
    key = finished.key_of(run, paths.inputs, device=kind)
    if (known := finished.hand_over(paths.work, key, **paths.results)) is not None:
        print(f"this run has ended before ({_in_words(known)}); its results were kept and are taken over", flush=True)
        return 0
    gathered = finished.start(paths.work)
    of_ranks = [path for pattern in ("failure.rank*.json", "heartbeat.rank*") for path in paths.work.glob(pattern)]
    for stale in [*of_ranks, *(paths.work / name for name in _OF_ONE_START)]:
        stale.unlink(missing_ok=True)
    # Whatever happens to this process from here on, there is an outcome that says so.
    write_json(paths.outcome, _outcome(run, {}, _UNFINISHED) | {"started_at": started_at.isoformat(timespec="seconds")})
    ended: Ended | None = None
    try:
        if not run.is_base:
            with lease_devices(device, run.factors.gpus // run.factors.nodes) as devices:
                ended = _train(run, paths, devices, attempts_left)
    except StoppedError as stopped:
        print(f"stopped by {stopped}; the next start resumes from the last checkpoint", flush=True)
        paths.outcome.unlink(missing_ok=True)
        return 128 + stopped.signal_number
    except HostMemoryError as error:
        print(error, flush=True)
        paths.outcome.unlink(missing_ok=True)
        return TRY_AGAIN
    except Exception as error:
        ended = Ended(describe(error, rank=0, phase="start", step=None))
    if ended is not None and ended.failure is not None and is_of_storage(ended.failure.reason):
        paths.outcome.unlink(missing_ok=True)
        raise UserError(f"{ended.failure.reason}; when the disk is in order, start again: {RESUMES}")
    outcome = _described(run, paths, ended)
    outcome |= {"started_at": started_at.isoformat(timespec="seconds"), "wall_s": time.monotonic() - started}
    if outcome["outcome"] != "ok":
        gathered = finished.start(paths.work)  # nobody may evaluate weights of a run that did not end well
    records = steps.to_csv(steps.merge(paths.work))
    write_atomic(gathered / finished.STEPS, records)
    outcome["steps_sha256"] = hashlib.sha256(records.encode()).hexdigest()
    outcome["weights_sha256"] = finished.checksums(gathered / finished.WEIGHTS)
    write_sealed(gathered / finished.OUTCOME, outcome)
    resumable = outcome["outcome"] in RESUMABLE and finished.has_checkpoint(paths.work)
    finished.keep(paths.work, key, resumable=resumable)
    finished.hand_over(paths.work, key, **paths.results)
    print(f"outcome: {_in_words(outcome)}", flush=True)
    if outcome["outcome"] != "ok":
        print(f"it stays the result of this run until {_retry(outcome['outcome'], resumable)}", flush=True)
    return 0


def _retry(outcome: str, resumable: bool) -> str:
    """What repeats a run that ended with `outcome`."""
    chosen = "" if outcome == "error" else f" --outcome {outcome}"
    where = "from its checkpoint" if resumable else "from its first step"
    return f"`tunemap retry STUDY.yaml{chosen}` says to repeat it, {where}"


def _in_words(outcome: dict[str, Any]) -> str:
    return f"{outcome['outcome']}: {outcome['reason']}" if outcome["reason"] else str(outcome["outcome"])


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended, and the wall time that they took as seen from here."""

    failure: Failure | None
    wall_s: float = 0.0
    started: Moment | None = None  # the first process


RESULT = "result.json"
_OF_ONE_START = (RESULT, "progress.json", "environment.json", STOP)
_UNFINISHED = Failure("error", "the launcher was killed before it could say how the run ended", 0, None, None, None)


def _train(run: Run, paths: Paths, devices: Devices, attempts_left: int = 0) -> Ended:
    """Run the workers to their end.

    Raises StoppedError or HostMemoryError where they came to none.
    """
    run_file = paths.work / "run.json"
    write_json(run_file, run.training_spec())
    limit = run.factors.time_limit_minutes
    started, started_at, kills = time.monotonic(), Moment.now(), oom_kills()
    process = subprocess.Popen(
        _command(run, paths, run_file, devices.kind),
        env=worker_environment(run, devices) | {parent.VARIABLE: "1"},
        start_new_session=True,  # one group to end, however many ranks and helpers there are
    )
    try:
        with _signals(paths.work) as stop:
            overdue = _wait(process, paths.work, limit, stop)
        wall_s = time.monotonic() - started
        lingering = process.poll() is None
    finally:
        end_group(process)
    code = 0 if lingering else process.returncode  # one that lingers over a finished run is ended from here
    if stop.signal_number is not None and not (paths.work / RESULT).exists():
        raise StoppedError(stop.signal_number)
    failure = overdue or _failure(paths.work, code)
    if failure is not None:
        failure = explained(failure, kills=oom_kills() - kills, attempts_left=attempts_left)
    return Ended(failure, wall_s, started_at)


def _failure(work: Path, code: int | None) -> Failure | None:
    """Why the workers did not finish; None if they did."""
    progress = _progress(work)
    place = progress.get("phase"), progress.get("step")
    if code == 0 and (work / RESULT).exists():
        return None
    failures = read_failures(work)
    if not failures and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        raise StoppedError(signal.SIGTERM)  # sent to all processes of a job, and the workers heard it first
    return failures[0] if failures else Failure("error", how_it_ended(code), 0, *place, None)


def _command(run: Run, paths: Paths, run_file: Path, device: str) -> list[str]:
    identity = finished.checkpoint_identity(run, paths.inputs, device=device)
    worker = ["-m", "tunemap.training.worker", "--run-file", str(run_file), "--device", device]
    worker += ["--checkpoint-identity", identity]
    for name in ("model", "dataset", "tokens", "work"):
        worker += [f"--{name}", str(getattr(paths, name))]
    worker += ["--weights", str(paths.work / finished.NEXT / finished.WEIGHTS)]
    if paths.ceilings is not None:
        worker += ["--ceilings", str(paths.ceilings)]
    if run.factors.strategy == "single":
        return [sys.executable, *worker]
    return [*torchrun_command(run, paths.work), *worker]


def torchrun_command(run: Run, work: Path) -> list[str]:
    """What starts a process per device of `run`; the command line of a process is appended to it.

    Over several nodes, srun starts a torchrun on each node of the job that this process is in.

    Raises UnsupportedRunError where there is no such job.
    """
    nodes, torchrun = run.factors.nodes, [sys.executable, "-m", "tunemap.training.torchrun", str(work)]
    per_node = run.factors.gpus // nodes
    if nodes == 1:  # --standalone picks a free port, so several runs on one host do not meet
        return [*torchrun, "--standalone", f"--nproc-per-node={per_node}"]
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("srun") is None:
        raise UnsupportedRunError(f"nodes is {nodes}, which needs Slurm: snakemake --profile slurm")
    cores = per_node * run.factors.threads_per_process
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cores}"]
    # The nodes meet at the first of them, which this process is on.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={socket.gethostname()}:{_free_port()}", f"--rdzv-id={job}"]
    return [*srun, "--kill-on-bad-exit=1", *torchrun, f"--nnodes={nodes}", f"--nproc-per-node={per_node}", *meeting]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def worker_environment(run: Run, devices: Devices) -> dict[str, str]:
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
        **KEEP_FREED_MEMORY,
        **devices.environment,
    }
    return environment


@dataclass
class Stop:
    """Whether and when somebody asked the launcher to stop."""

    signal_number: int | None = None
    asked_at: float = 0.0

    @property
    def overdue(self) -> bool:
        """Whether the checkpoint has had its time."""
        return self.signal_number is not None and time.monotonic() - self.asked_at > STOP_LIMIT_S


def _wait(process: subprocess.Popen[bytes], work: Path, limit_minutes: float | None, stop: Stop) -> Failure | None:
    """Wait for the end of the process; a failure if a limit came first: that of the run, or that on standing still.

    Returns too when the result is written and a process does not end: everything is on disk, nothing is lost.
    """
    deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
    watchdog, written_at = Watchdog(work, STALL_LIMIT_S), None
    while process.poll() is None and not stop.overdue:
        if written_at is None and (work / RESULT).exists():
            written_at = time.monotonic()
        if written_at is not None and time.monotonic() - written_at > END_LIMIT_S:
            print(f"a process has not ended {END_LIMIT_S:g} s after the result was written: ending it", flush=True)
            return None
        if deadline is not None and time.monotonic() > deadline:
            progress = _progress(work)
            reason = f"not finished after time_limit_minutes {limit_minutes}"
            return Failure("timeout", reason, 0, progress.get("phase"), progress.get("step"), None)
        if (stuck := watchdog.stalled()) is not None:
            reason = f"rank {stuck.rank} has not moved on for {STALL_LIMIT_S:g} s, in step {stuck.step} ({stuck.phase})"
            return Failure("timeout", reason, stuck.rank, "train", stuck.step, None)
        time.sleep(POLL_SECONDS)
    return None


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
def _signals(work: Path) -> Iterator[Stop]:
    """Turn signals into a stop: the first asks the workers for a checkpoint, if they train; the second ends them."""
    stop = Stop()

    def handle(signal_number: int, frame: object) -> None:
        if (work / RESULT).exists():  # nothing is left to be stopped, and a result would be lost
            return
        if stop.signal_number is not None and signal_number != signal.SIGURG:
            raise StoppedError(signal_number)
        if _progress(work).get("phase") != "train":
            raise StoppedError(signal_number)
        if stop.signal_number is None:
            stop.signal_number, stop.asked_at = signal_number, time.monotonic()
            name = signal.Signals(signal_number).name
            print(f"{name}: stopping after a checkpoint, at the end of the logging window", flush=True)
            (work / STOP).touch()

    # SIGURG is how a scheduler says that its time limit is near: whoever does not know of it ignores it.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGURG)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(work: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((work / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return values


def _described(run: Run, paths: Paths, ended: Ended | None) -> dict[str, Any]:
    """The outcome with every measurement there is, of a failed run too."""
    if run.is_base or ended is None:
        return _outcome(run, {}, None)
    progress, failure = _progress(paths.work), ended.failure
    result: dict[str, Any] = {}
    if failure is None:
        result = read_json(paths.work / "result.json")
    records = steps.merge(paths.work)
    measurements = steps.summarise_steps(records) | _from_result(result, steps.measured_steps(records))
    if result:
        measurements |= utilisation(
            measurements, peak_flops_per_second=result["ceiling_flops_per_second"], devices=run.factors.gpus
        )
    gates = [GateResult(**gate) for gate in result.get("gates") or progress.get("gates", [])]
    if failure is None:
        gates += list(_identities(result, measurements, ended))
        if trips := tripped(gates):
            failure = Failure("invalid", reason(trips), 0, "train", progress.get("step"), None)
    environment = paths.work / "environment.json"
    known = {
        "measurements": {name: _finite(value) for name, value in measurements.items()},
        "memory_by_rank": result.get("memory", []),
        "communication_by_rank": result.get("communication_by_rank", []),
        "gates": [asdict(gate) for gate in gates],
        "facts": result.get("facts", {}),
        "environment": read_json(environment) if environment.exists() else {},
    }
    return _outcome(run, known, failure)


def _outcome(run: Run, known: dict[str, Any], failure: Failure | None) -> dict[str, Any]:
    """The content of an outcome file."""
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
        "measurements": {},
        "memory_by_rank": [],
        "communication_by_rank": [],
        "gates": [],
        "facts": {},
        "environment": {},
        **known,
    }


def _finite(value: Any) -> Any:
    """A NaN or an infinity is no measurement (and no JSON); steps.csv keeps it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _identities(result: dict[str, Any], measurements: dict[str, Any], ended: Ended) -> Iterator[GateResult]:
    """The gates that need what is known only here: the times of all ranks, and the wall seen from outside."""
    yield throughput_gate(measurements)
    start_s = max(0.0, ended.started.seconds_until(Moment(**result["started"]))) if ended.started else 0.0
    yield wall_gate(sum(result["parts_s"].values()), start_s, ended.wall_s)
    for name in ("mfu_measured", "hfu_measured"):
        if measurements[name] is not None:
            yield mfu_bounds_gate(name, measurements[name])


def _from_result(result: dict[str, Any], measured: list[int]) -> dict[str, Any]:
    if not result:
        return {}
    earlier = result["earlier_parts_s"]
    parts = {name: seconds + earlier.get(name, 0.0) for name, seconds in result["parts_s"].items()}
    return {
        **memory_of_run(result["memory"]),
        **{f"{name}_parameters": count for name, count in result["parameters"].items()},
        **_flops(result, measured),
        **_energy(result["energy"] or {}),
        **result["communication"],
        "load_time_s": parts["load"],
        "compile_time_s": parts["compile"],
        "estimation_time_s": parts["estimation"],
        "train_time_s": parts["training"],
        "checkpoint_time_s": parts["checkpoint"],
        "save_time_s": parts["save"],
        "other_time_s": parts["other"],
        "wall_time_s": sum(parts.values()),
        "data_order_hash": result["data_order_hash"],
        "steps_planned": result["steps_planned"],
    }


def _flops(result: dict[str, Any], measured: list[int]) -> dict[str, float | None]:
    """FLOPs over all ranks, mean of the measured steps; empty where the closed form is unknown or was contradicted."""
    flops = result["flops"]
    doubted = any(gate["gate"] == "flops" and not gate["passed"] for gate in result["gates"])
    if flops is None or doubted or not measured:
        return dict.fromkeys(("model_flops_per_step", "hardware_flops_per_step"))
    return {f"{name}_per_step": sum(flops[name][step] for step in measured) / len(measured) for name in flops}


def _energy(energy: dict[str, Any]) -> dict[str, float | None]:
    joules, tokens = energy.get("energy_joules"), energy.get("tokens")
    return {
        "energy_joules": joules,
        "energy_window_s": energy.get("seconds"),
        "energy_window_tokens": tokens,
        "energy_per_token_joules": joules / tokens if joules is not None and tokens else None,
        "energy_per_10k_tokens_joules": 10_000 * joules / tokens if joules is not None and tokens else None,
        "power_limit_joules": energy.get("power_limit_joules"),
    }
