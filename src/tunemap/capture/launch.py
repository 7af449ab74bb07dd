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
from tunemap.training.devices import lease_devices
from tunemap.training.failure import Failure, describe, read_failures
from tunemap.training.launch import end_group, worker_environment

LIMIT_S = 1800.0


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
    run_file = folder / "run.json"
    write_json(run_file, run.training_spec())
    try:
        with lease_devices(device, run.factors.gpus) as devices:
            module = ["-m", "tunemap.capture.worker", "--device", devices.kind, "--run-file", str(run_file)]
            module += ["--model", str(model), "--tokens", str(tokens), "--folder", str(folder)]
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.factors.gpus}"]
            command = [sys.executable, *(torchrun if run.factors.strategy != "single" else []), *module]
            process = subprocess.Popen(command, env=worker_environment(run, devices), start_new_session=True)
            try:
                process.wait(timeout=LIMIT_S)
            finally:
                end_group(process)
    except Exception as error:
        return describe(error, rank=0, phase="capture", step=None)
    if process.returncode == 0:
        return None
    failures = read_failures(folder)
    reason = f"the capture ended with exit code {process.returncode} and left no message"
    return failures[0] if failures else Failure("error", reason, 0, "capture", None, None)


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
