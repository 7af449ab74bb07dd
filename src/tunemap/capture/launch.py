"""Starts the processes of a capture and writes capture.json, whatever happens to them; imports no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunemap.capture import ncu, nsys
from tunemap.files import read_json, write_json, write_sealed
from tunemap.run import Run
from tunemap.training import parent
from tunemap.training.devices import lease_devices
from tunemap.training.failure import Failure, describe, how_it_ended, read_failures
from tunemap.training.launch import end_group, torchrun_command, worker_environment

LIMIT_S = 1800.0
RUN_FILE = "run.json"
PROBES: dict[str, Callable[[], nsys.Nsys | ncu.Ncu]] = {"nsys": nsys.probe, "ncu": ncu.probe}  # run around a process


def capture(run: Run, *, model: Path, tokens: Path, outcome: Path, folder: Path, device: str, backend: str) -> None:
    """Repeat the first steps of `run` under a profiler; `folder` gets the traces and capture.json.

    `backend` is torch (torch.profiler), nsys (Nsight Systems), auto: nsys where it is installed and the run is on a
    GPU, else torch; or ncu (Nsight Compute), of runs on one GPU.

    A run that did not train is not captured, and a capture that fails says why: neither stops a study.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trained = read_json(outcome)
    result: dict[str, Any] = {
        "run": run.id,
        "digest": run.training_digest,
        "backend": backend,
        "outcome": "ok",
        "reason": None,
    }
    if trained["outcome"] != "ok":
        result |= {"outcome": "skipped", "reason": f"the training ended with outcome {trained['outcome']}"}
    else:
        failure, used = _run_workers(run, model, tokens, folder, device, backend)
        result |= used
        if failure is not None:
            result |= {"outcome": failure.outcome, "reason": failure.reason, "failure": asdict(failure)}
        else:
            result |= _against(trained["measurements"]["step_time_mean_s"], folder)
            gpus = trained.get("environment", {}).get("gpus") or [{}]
            result |= {"device_name": gpus[0].get("name"), "precision": run.factors.precision}
    write_sealed(folder / "capture.json", result)
    print(f"capture: {result['outcome']}" + (f": {result['reason']}" if result["reason"] else ""), flush=True)


def _run_workers(
    run: Run, model: Path, tokens: Path, folder: Path, device: str, backend: str
) -> tuple[Failure | None, dict[str, Any]]:
    """How the processes failed, if they did, and what is known of the profiler."""
    used: dict[str, Any] = {}
    write_json(folder / RUN_FILE, run.training_spec())
    try:
        with lease_devices(device, run.factors.gpus // run.factors.nodes) as devices:
            used["backend"] = backend = chosen_backend(backend, devices.kind)
            if backend == "ncu" and run.factors.gpus > 1:
                raise ncu.NcuError(
                    f"Nsight Compute replays the kernels of one process, and this run has {run.factors.gpus}"
                )
            command = _command(run, model, tokens, folder, devices.kind, backend)
            tool = PROBES[backend]() if backend in PROBES else None
            if tool is not None:
                used |= tool.described
                command = tool.around(command, folder)
            # A profiler may start the workers from a thread, and the kernel takes that thread's end for the parent's.
            with_parent = {parent.VARIABLE: "1"} if tool is None else {}
            environment = worker_environment(run, devices) | with_parent
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            try:
                process.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return Failure("timeout", f"not finished after {LIMIT_S:g} s", 0, "capture", None, None), used
            finally:
                end_group(process)
        failures = read_failures(folder)
        if tool is not None and not failures and _all_ranks_ended(folder, run.factors.gpus):
            tool.export(folder)  # whatever the exit code of the profiler says
            return None, used
    except Exception as error:
        return describe(error, rank=0, phase="capture", step=None), used
    if process.returncode == 0 and tool is None:
        return None, used
    ended = Failure("error", how_it_ended(process.returncode, "capturing"), 0, "capture", None, None)
    return (failures[0] if failures else ended), used


def chosen_backend(asked: str, device: str) -> str:
    """The profiler of a capture on `device`. Raises the profiler's error where it would have nothing to record."""
    if asked == "ncu" and device != "cuda":
        raise ncu.NcuError("a roofline is of kernels of a GPU, and this run is on a CPU")
    if asked == "nsys" and device != "cuda":
        raise nsys.NsysError("profile is nsys, which records GPUs, and this run is on a CPU; use torch or auto")
    if asked == "auto":
        return "nsys" if device == "cuda" and nsys.installed() else "torch"
    return asked


def _all_ranks_ended(folder: Path, ranks: int) -> bool:
    """Whether every process has written what it measured, which is the last thing that it does."""
    return all((folder / f"capture.rank{rank}.json").exists() for rank in range(ranks))


def _command(run: Run, model: Path, tokens: Path, folder: Path, device: str, backend: str) -> list[str]:
    worker = ["-m", "tunemap.capture.worker", "--device", device, "--run-file", str(folder / RUN_FILE)]
    worker += ["--model", str(model), "--tokens", str(tokens), "--folder", str(folder), "--backend", backend]
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
