"""Evaluates a run in as many processes as it was trained with, into two files, whatever happens to the processes.

    python -m tunemap.evaluation --run-file run.json --model DIR --tokens DIR --weights DIR --work DIR
        --device cpu --rank 0 --processes 2

is one of the processes, which leaves share.rankN.json in the work folder, or failure.rankN.json. They share no state
and exchange nothing: each has the whole model and answers its own batches. With `--study results/STUDY` a process goes
on with other runs (`tunemap.ahead`). Imports torch only in the processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tunemap import ahead
from tunemap.errors import UserError
from tunemap.files import damaged, read_json, read_sealed, write_atomic, write_json, write_sealed
from tunemap.measure.clock import process_age_s
from tunemap.run import Run
from tunemap.startup import quick_imports
from tunemap.training import finished, parent
from tunemap.training.devices import Devices, device_kind, lease_devices
from tunemap.training.failure import Failure, describe, how_it_ended, is_of_storage, leave_failure, read_failures
from tunemap.training.heartbeat import Heartbeat, Watchdog
from tunemap.training.hostmemory import explained, oom_kills
from tunemap.training.launch import worker_environment

POLL_SECONDS = 0.05
STALL_LIMIT_S = 3600.0  # longer than a batch should take: thousands of tokens of a large model, on a slow device
RUN_FILE = "run.json"


def evaluate_to_files(
    run: Run,
    *,
    device: str,
    model: Path,
    tokens: Path,
    outcome: Path,
    weights: Path,
    evaluation: Path,
    predictions: Path,
    attempts_left: int = 0,
) -> None:
    """Evaluate and write evaluation.json and predictions.jsonl; a failure is written there too, with its reason.

    Raises UserError where the disk is at fault, and HostMemoryError where another attempt gets more memory.
    """
    trained = _undamaged(outcome, weights)
    result: dict[str, Any] = {
        "run": run.id,
        "digest": run.evaluation_digest,
        "training_digest": run.training_digest,
        "outcome": "ok",
        "reason": None,
    }
    rows: list[dict[str, Any]] = []
    failure: Failure | None = None
    if trained["digest"] != run.training_digest:
        result |= {"outcome": "error", "reason": f"{outcome} is of another configuration: train the run again"}
    elif trained["outcome"] != "ok":
        result |= {"outcome": "skipped", "reason": f"the training ended with outcome {trained['outcome']}"}
    else:
        work = evaluation.parent / "unfinished"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        kills = oom_kills()
        due = ahead.Evaluation(run, model, tokens, outcome, weights, results=evaluation.parent)
        with ahead.alone(due.results, wait=True):  # who evaluates this run ahead of its job is waited for
            if not _was_made(due, device, work):
                study = ahead.study_of(run, evaluation, os.environ)
                failure = _run_processes(run, device, study, work=work, model=model, tokens=tokens, weights=weights)
        if failure is not None:
            failure = explained(failure, kills=oom_kills() - kills, attempts_left=attempts_left)
        if failure is None:
            summary, rows = _combined(run, work, tokens)
            result |= summary
        else:
            if is_of_storage(failure.reason):
                raise UserError(f"{failure.reason}; when the disk is in order, run the workflow again")
            where = f"process {failure.rank}: " if run.factors.gpus > 1 else ""
            result |= {"outcome": "error", "reason": where + failure.reason, "traceback": failure.traceback}
            print(failure.traceback or failure.reason, flush=True)
        shutil.rmtree(work)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(predictions, text)
    write_sealed(evaluation, result | {"predictions_sha256": hashlib.sha256(text.encode()).hexdigest()})
    (evaluation.parent / ahead.AHEAD).unlink(missing_ok=True)


def _was_made(evaluation: ahead.Evaluation, device: str, work: Path) -> bool:
    """Take the share that the job of another run has made of this one, if there is one."""
    if not (evaluation.results / ahead.AHEAD).exists():  # asking for the device takes a moment
        return False
    share = ahead.made_of(evaluation, device_kind(device))
    if share is None:
        return False
    print("evaluated by the process of another run's job", flush=True)
    write_json(work / _share_of(0), share)
    return True


def _undamaged(outcome: Path, weights: Path) -> dict[str, Any]:
    """The outcome of a run whose files are as training wrote them; otherwise its folder is set aside."""
    try:
        trained = read_sealed(outcome)
    except UserError as error:
        raise damaged(outcome.parent, str(error).partition(";")[0]) from None
    found, expected = finished.checksums(weights), trained.get("weights_sha256")
    if expected is not None and found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise damaged(outcome.parent, f"{weights}: {', '.join(names)}: not as training wrote it")
    return trained


def _combined(run: Run, work: Path, tokens: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and predictions of all processes."""
    from tunemap.data.tokens import load_tokens
    from tunemap.predictions import combine, share_from_json

    shares = [share_from_json(read_json(path)) for path in sorted(work.glob("share.rank*.json"))]
    summary, predictions = combine(shares, load_tokens(tokens), extraction=run.factors.extraction)
    return summary, [asdict(prediction) for prediction in predictions]


def _share_of(rank: int) -> str:
    return f"share.rank{rank}.json"


def _run_processes(run: Run, device: str, study: Path | None, *, work: Path, **folders: Path) -> Failure | None:
    """Run all processes to their end, or all of them to the failure of the first.

    With a `study` the one process goes on with other runs of it, and what becomes of that is no failure of this one.
    """
    count = run.factors.gpus // run.factors.nodes  # an evaluation keeps to one node
    write_json(work / RUN_FILE, run.evaluation_spec())
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with lease_devices(device, count) as devices:
            try:
                for rank in range(count):
                    command = _command(work, devices.kind, rank, count, folders | ({"study": study} if study else {}))
                    processes.append(subprocess.Popen(command, env=_environment(run, devices, rank)))
                failure = _wait(processes, work)
                return None if study and (work / _share_of(0)).exists() else failure
            finally:
                for process in processes:
                    process.kill()  # those that have ended do not mind
                    process.wait()
    except Exception as error:
        return describe(error, rank=0, phase="start", step=None)


def _command(work: Path, device: str, rank: int, count: int, folders: dict[str, Path]) -> list[str]:
    command = [sys.executable, "-m", "tunemap.evaluation", "--run-file", str(work / RUN_FILE), "--work", str(work)]
    for name, folder in folders.items():
        command += [f"--{name}", str(folder)]
    return [*command, "--device", device, "--rank", str(rank), "--processes", str(count)]


def _environment(run: Run, devices: Devices, rank: int) -> dict[str, str]:
    """Each process sees one device, its own."""
    environment = worker_environment(run, devices) | {parent.VARIABLE: "1"}
    if devices.kind == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"].split(",")[rank]
    return environment


def _wait(processes: list[subprocess.Popen[bytes]], work: Path) -> Failure | None:
    """Wait for the end of all; a failure as soon as one has failed, or once none has moved on for too long."""
    watchdog = Watchdog(work, STALL_LIMIT_S)
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return _failure(work, rank, code)
        if None not in codes:
            return None
        if (stuck := watchdog.stalled()) is not None:
            reason = f"no answer for {STALL_LIMIT_S:g} s, in batch {stuck.step} of this process"
            return Failure("timeout", reason, stuck.rank, "evaluate", None, None)
        time.sleep(POLL_SECONDS)


def _failure(work: Path, rank: int, code: int) -> Failure:
    """Why a process ended with this code, in its own words where it left any.

    Raises SystemExit where somebody asked all processes of the job to end and this one heard it first: that is no
    result of the evaluation.
    """
    told = [one for one in read_failures(work) if one.rank == rank]
    if told:
        return told[0]
    if code == -signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    return Failure("error", how_it_ended(code, "evaluating"), rank, "evaluate", None, None)


# --- one of the processes ---------------------------------------------------------------------------------


def main() -> None:
    """Evaluate one share; the exit code is 0 only if it is written."""
    parent.end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run-file", "model", "tokens", "weights", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    arguments = parser.parse_args()
    try:
        _evaluate_share(arguments)
    except Exception as error:
        os._exit(leave_failure(arguments.work, describe(error, rank=arguments.rank, phase="evaluate", step=None)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # everything is on disk; tearing the interpreter down would cost most of a second


def _evaluate_share(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from tunemap.evaluate import evaluate_share

    heartbeat = Heartbeat(arguments.work, arguments.rank)
    evaluate = partial(
        evaluate_share,
        device=arguments.device,
        rank=arguments.rank,
        world_size=arguments.processes,
        beat=lambda batch: heartbeat.beat(batch, "forward"),
    )
    run = Run.from_json(arguments.run_file.read_text())
    start_s = process_age_s()
    share = evaluate(run, arguments.model, arguments.weights, arguments.tokens)
    write_json(arguments.work / _share_of(arguments.rank), share.to_json())
    if arguments.study is not None:
        own_s = process_age_s() - start_s
        ahead.go_on(run, arguments.study, device=arguments.device, start_s=start_s, own_s=own_s, evaluate=evaluate)
    heartbeat.stop()


if __name__ == "__main__":
    main()
