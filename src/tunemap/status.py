"""How far a study is: what waits, what trains and how fast, what has ended, and why something failed.

Reads what runs leave in their folders, and asks Slurm once for its queue; works without one, and on results alone.
A file that cannot be read makes its run `damaged`; the others are shown as ever.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from tunemap.errors import UserError
from tunemap.files import naming, read_object, read_sealed
from tunemap.inspect import RESULTS, plain_console, plan_of, study_argument
from tunemap.slurm import QueuedJob, queue
from tunemap.training.heartbeat import read_beats
from tunemap.training.lease import Lease, is_held, read_lease

LAST_LINES = 5  # of the log of a run that failed
TAIL_BYTES = 20_000
STATES = ("running", "queued", "stopped", "failed", "damaged", "finished", "not started")
NO_LAUNCHER = "the launcher was killed"  # begins the reason of the outcome that stands in until the run has ended


@dataclass(frozen=True)
class RunStatus:
    """Where one run is."""

    run: str
    state: str  # one of STATES
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    left_s: float | None = None
    where: str = ""  # job, host
    reason: str = ""
    log: tuple[str, ...] = ()


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap status`."""
    study_argument(parser, option=False, what="study file, or the folder of a study's results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results (default: results)")
    parser.add_argument("--all", action="store_true", help="list finished runs and those that wait one by one, too")


def run_status(arguments: argparse.Namespace) -> int:
    """Print the state of every run of a study."""
    folder, runs = _runs_of(arguments)
    jobs = queue()
    statuses = [_status_or_damage(run, folder, jobs) for run in runs]
    console = plain_console()
    shown = [one for one in statuses if arguments.all or one.state not in ("finished", "not started")]
    if shown:
        table = Table()
        for column in ("run", "state", "step", "tokens/s", "left", "where", "why"):
            table.add_column(column, overflow="fold")
        for one in sorted(shown, key=lambda one: STATES.index(one.state)):
            table.add_row(*_cells(one))
        console.print(table)
    for one in statuses:
        if one.log:
            console.print(f"{one.run}, the end of its log:")
            for line in one.log:
                console.print(f"  {line}")
    counts = Counter(one.state for one in statuses)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    silent = "" if jobs is not None else " (Slurm was not asked: it does not answer here)"
    console.print(f"{folder.name}: {len(statuses)} runs: {summary}{silent}")
    return 0


def _runs_of(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The folder of a study's results, and the ids of its runs."""
    given: Path = arguments.study
    if not given.is_dir():
        plan = plan_of(arguments)
        return arguments.results / plan.study.study, list(plan.runs)
    if arguments.scale is not None or arguments.data_root is not None:
        raise UserError(f"{given}: --scale and --data-root are for study files; a folder holds the results of one size")
    if (given / "plan.json").exists():
        planned = read_object(given / "plan.json")
        with naming(given / "plan.json"):
            return given, list(planned["runs"].keys())
    found = {path.name for kind in ("runs", "unfinished") for path in (given / kind).glob("*") if path.is_dir()}
    if not found:
        raise UserError(f"{given}: neither a study file nor a folder with results of a study (results/STUDY)")
    return given, sorted(found)


def _status_or_damage(run: str, folder: Path, jobs: list[QueuedJob] | None) -> RunStatus:
    """Where a run is, or which of its files nobody can read."""
    try:
        with naming(folder / "unfinished" / run):
            return status_of(run, folder, jobs)
    except UserError as error:
        return RunStatus(run, "damaged", reason=str(error))


def status_of(run: str, folder: Path, jobs: list[QueuedJob] | None) -> RunStatus:
    """Where a run is; `folder` holds the study's results, `jobs` what Slurm's queue holds (None: nobody knows).

    Raises UserError that names a damaged file.
    """
    work = folder / "unfinished" / run
    lease = read_lease(work)
    if lease is not None and is_held(lease, lambda: jobs):
        return _running(run, work, lease)
    outcome = _outcome(folder / "runs" / run / "outcome.json")
    if outcome is not None and outcome["outcome"] == "ok":
        return RunStatus(run, "finished")
    if outcome is not None:
        step = outcome.get("step")
        why = f"{outcome['outcome']}: {outcome.get('reason') or 'no reason given'}"
        return RunStatus(run, "failed", step=step, reason=why, log=_last_lines(folder, run))
    mine = [job for job in jobs or [] if job.comment == f"rule_train_wildcards_{folder.name}_{run}"]
    if mine:
        job = mine[0]
        state = "queued" if job.is_waiting else "running"
        return RunStatus(run, state, where=f"job {job.id}", reason=job.reason if job.is_waiting else "starting")
    manifest = work / "checkpoint" / "manifest.json"
    if manifest.exists():
        with naming(manifest):
            step = int(read_object(manifest)["step"])
        why = f"the next start resumes after step {step}"
        return RunStatus(run, "stopped", step=step, steps=_progress(work).get("steps"), reason=why)
    if lease is not None:
        return RunStatus(run, "stopped", reason="ended before its first checkpoint", log=_last_lines(folder, run))
    return RunStatus(run, "not started")


def _running(run: str, work: Path, lease: Lease) -> RunStatus:
    progress, beats = _progress(work), read_beats(work)
    step = max((beat.step for beat in beats), default=progress.get("step"))
    steps, rate, left_s = progress.get("steps"), None, None
    seconds, tokens = _last_steps(work)
    if seconds and step is not None and steps is not None:
        left_s = max(0, steps - step) * sum(seconds) / len(seconds)
        rate = tokens / sum(seconds)
    where = f"job {lease.slurm_job_id} on {lease.host}" if lease.slurm_job_id else f"pid {lease.pid} on {lease.host}"
    phase = "" if progress.get("phase") in ("train", None) else str(progress["phase"])
    return RunStatus(run, "running", step, steps, rate, left_s, where, phase)


def _last_steps(work: Path) -> tuple[list[float], int]:
    """Seconds of the last steps of rank 0, and the real tokens in them over all ranks."""
    seconds: list[float] = []
    tokens = 0
    for path in sorted(work.glob("steps.rank*.csv")):
        rows = _tail(path)
        with path.open() as file:
            names = file.readline().strip().split(",")
        values = [dict(zip(names, row.split(","), strict=False)) for row in rows if row.count(",") == len(names) - 1]
        values = [value for value in values if value.get("step", "").isdigit()][-20:]
        if path.name == "steps.rank0.csv":
            seconds = [float(value["step_time_s"]) for value in values]
        tokens += sum(int(value["real_tokens"]) for value in values)
    return seconds, tokens


def _outcome(path: Path) -> dict[str, Any] | None:
    """How a run ended; None if it has not: while it trains, a file says what is true if nobody writes another."""
    if not path.exists():
        return None
    outcome = read_sealed(path)
    if "outcome" not in outcome:
        raise UserError(f"{path}: has no key 'outcome'; delete the file and run the workflow again")
    return None if str(outcome.get("reason") or "").startswith(NO_LAUNCHER) else outcome


def _progress(work: Path) -> dict[str, Any]:
    try:
        values = json.loads((work / "progress.json").read_text())
    except (OSError, ValueError):  # not there yet
        return {}
    return values if isinstance(values, dict) else {}


def _last_lines(folder: Path, run: str) -> tuple[str, ...]:
    log = folder.parent.parent / "logs" / folder.name / "train" / f"{run}.log"
    return tuple(line for line in _tail(log) if line.strip())[-LAST_LINES:]


def _tail(path: Path) -> list[str]:
    """The last lines of a file; none where it is missing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _cells(one: RunStatus) -> list[str]:
    step = "" if one.step is None else f"{one.step}/{one.steps}" if one.steps is not None else str(one.step)
    rate = "" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}"
    left = "" if one.left_s is None else _duration(one.left_s)
    return [one.run, one.state, step, rate, left, one.where, one.reason]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
