"""Starts the processes of a capture and writes capture.json, whatever happens to them; imports no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunemap.files import read_json, write_json
from tunemap.run import Run
from tunemap.training import parent
from tunemap.training.devices import lease_devices
from tunemap.training.failure import Failure, describe, how_it_ended, read_failures
from tunemap.training.launch import end_group, torchrun_command, worker_environment

LIMIT_S = 1800.0
RUN_FILE = "run.json"


def capture(run: Run, *, model: Path, tokens: Path, outcome: Path, folder: Path, device: str) -> None:
    """Repeat the first steps of `run` under torch.profiler; `folder` gets the traces and capture.json.

    A run that did not train is not captured, and a capture that fails says why: neither stops a study.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained = read_json(outcome)
    result: dict[str, Any] = {
        "run": run.id,
        "digest": run.training_digest,
        "backend": "torch",
        "outcome": "ok",
        "reason": None,
    }
    if trained["outcome"] != "ok":
        result |= {"outcome": "skipped", "reason": f"the training ended with outcome {trained['outcome']}"}
    else:
        failure = _run_workers(run, model, tokens, folder, device)
        if failure is not None:
            result |= {"outcome": failure.outcome, "reason": failure.reason, "failure": asdict(failure)}
        else:
            result |= _against(trained["measurements"]["step_time_mean_s"], folder)
    write_json(folder / "capture.json", result)
    print(f"capture: {result['outcome']}" + (f": {result['reason']}" if result["reason"] else ""), flush=True)


def _run_workers(run: Run, model: Path, tokens: Path, folder: Path, device: str) -> Failure | None:
    write_json(folder / RUN_FILE, run.training_spec())
    try:
        with lease_devices(device, run.factors.gpus // run.factors.nodes) as devices:
            command = _command(run, model, tokens, folder, devices.kind)
            environment = worker_environment(run, devices) | {parent.VARIABLE: "1"}
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                process.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return Failure("timeout", f"not finished after {LIMIT_S:g} s", 0, "capture", None, None)
            finally:
                end_group(process)
    except Exception as error:
        return describe(error, rank=0, phase="capture", step=None)
    if process.returncode == 0:
        return None
    failures = read_failures(folder)
    return failures[0] if failures else Failure("error", how_it_ended(process.returncode), 0, "capture", None, None)


def _command(run: Run, model: Path, tokens: Path, folder: Path, device: str) -> list[str]:
    worker = ["-m", "tunemap.capture.worker", "--device", device, "--run-file", str(folder / RUN_FILE)]
    worker += ["--model", str(model), "--tokens", str(tokens), "--folder", str(folder)]
    if run.factors.strategy == "single":
        return [sys.executable, *worker]
    return [*torchrun_command(run, folder), *worker]


def _against(unprofiled_step_s: float | None, folder: Path) -> dict[str, Any]:
    """The window of all ranks, and how much the profiler slowed it: slowest rank over the unprofiled step."""
    ranks = [read_json(path) for path in sorted(folder.glob("capture.rank*.json"))]
    profiled_s = max(rank["step_time_mean_s"] for rank in ranks)
    return {
        "first_step": ranks[0]["first_step"],
        "steps": ranks[0]["steps"],
        "profiled_step_time_s": profiled_s,
        "unprofiled_step_time_s": unprofiled_step_s,
        "profiled_to_unprofiled_ratio": profiled_s / unprofiled_step_s if unprofiled_step_s else None,
    }
