"""Evaluations of further runs by a process that has just made one, where that takes less than starting another.

A process that evaluates imports for seconds, and a tiny model answers in less than one. So it goes on with runs of the
workflow that are trained and not evaluated, of the same model and rows. What it makes of a run lies under a key beside
the files that the run's own job will write. That job takes it if it would make the same from the same, and otherwise
makes its own; whatever fails here is left to it. So each run keeps a job and results of its own. Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunemap.errors import UserError
from tunemap.files import DAMAGE, read_object, sha256_of, write_json
from tunemap.planned import planned_runs, run_of
from tunemap.run import Run
from tunemap.sources import planned_digest

if TYPE_CHECKING:
    from tunemap.predictions import Share

SCRIPT = Path(__file__).resolve().parents[2] / "workflow" / "scripts" / "evaluate_run.py"
AHEAD = "ahead.json"
LIMIT_S = 20.0  # of other runs' evaluations in one job: whoever waits for its own run is not kept for longer
SEARCH_S = 1.0  # for the next run: among ten thousand, most of which may be evaluated


@dataclass(frozen=True)
class Evaluation:
    """A run to evaluate, with what its evaluation reads, and the folder of its results."""

    run: Run
    model: Path
    tokens: Path
    outcome: Path
    weights: Path
    results: Path

    def key(self, device: str) -> dict[str, Any]:
        """What its answers depend on; only `results` is not a part of it."""
        return {
            "digest": self.run.evaluation_digest,
            "device": device,
            "host": socket.gethostname(),
            "source": planned_digest(SCRIPT, os.environ),
            "outcome": sha256_of(self.outcome),  # it has the weights' checksums, which its own job compares
            "model": _signature(self.model),
            "tokens": _signature(self.tokens),
        }


def study_of(run: Run, evaluation: Path, environment: Mapping[str, str]) -> Path | None:
    """The results of the study that a run's evaluation.json lies in, if this job may go on with its other runs.

    A job of Slurm was given memory and time for its own run, and so was a run on several devices.
    """
    study = evaluation.parents[2] if len(evaluation.parents) > 2 else None
    if study is None or evaluation != study / "evaluations" / run.id / "evaluation.json":
        return None
    return None if "SLURM_JOB_ID" in environment or run.factors.gpus > 1 else study


@contextmanager
def alone(results: Path, *, wait: bool) -> Iterator[bool]:
    """Evaluate a run while nobody else does; false without `wait` if somebody does, or where files have no locks."""
    results.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(results, os.O_RDONLY)
    try:
        has_lock = False
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            has_lock = True
        yield has_lock
    finally:
        os.close(descriptor)


def made_of(evaluation: Evaluation, device: str) -> dict[str, Any] | None:
    """The share that another run's job has made of this run, as JSON values; None if it has made none or another."""
    path = evaluation.results / AHEAD
    if not path.exists():
        return None
    try:
        found = read_object(path)
        return found["share"] if found["key"] == evaluation.key(device) else None
    except (UserError, *DAMAGE):
        return None


def go_on(own: Run, study: Path, *, device: str, start_s: float, own_s: float, evaluate: Callable[..., Share]) -> None:
    """Evaluate other runs of the workflow for as long as one takes less than the start of a process.

    start_s: what the start of this process took. own_s: what the evaluation of its own run took, loading included.
    """
    began = idle_since = time.monotonic()
    last_s = own_s
    for planned in _from(own.id, planned_runs(os.environ)):
        now = time.monotonic()
        if last_s >= start_s or now - began + last_s > LIMIT_S or now - idle_since > SEARCH_S:
            return
        other = _like(own, planned, study)
        if other is None:
            continue
        with alone(other.results, wait=False) as is_ours:
            if not is_ours or _is_evaluated(other) or made_of(other, device) is not None:
                continue
            print(f"ahead of its own job: {other.run.id}", flush=True)
            started = time.monotonic()
            try:
                key = other.key(device)
                share = evaluate(other.run, other.model, other.weights, other.tokens)
                write_json(other.results / AHEAD, {"key": key, "share": share.to_json()})
            except Exception as error:
                print(f"left to its own job: {type(error).__name__}: {error}", flush=True)
                return
        idle_since = time.monotonic()
        last_s = idle_since - started


def _from(own: str, planned: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All runs but its own, those behind it first: or each job would look through all that are evaluated."""
    names = list(planned)
    at = names.index(own) if own in planned else 0
    return (planned[name] for name in [*names[at:], *names[:at]] if name != own)


def _like(own: Run, planned: dict[str, Any], study: Path) -> Evaluation | None:
    """A trained run that a process made for `own` could evaluate as its own process would, in about `own`'s time."""
    if (planned["model_name"], planned["dataset_name"]) != (own.model_name, own.dataset_name):
        return None
    run = run_of(planned)
    found = _evaluation_of(run, study)
    return found if _needs_the_same(run, own) and _is_trained(found) else None


def _needs_the_same(run: Run, own: Run) -> bool:
    same = ("gpus", "threads_per_process", "max_new_tokens", "evaluation_batch_size")
    return (run.model_key, run.tokens_key) == (own.model_key, own.tokens_key) and all(
        getattr(run.factors, name) == getattr(own.factors, name) for name in same
    )


def _evaluation_of(run: Run, study: Path) -> Evaluation:
    trained, shared = study / "runs" / run.id, study.parent / "shared"
    return Evaluation(
        run=run,
        model=shared / "models" / run.model_key,
        tokens=shared / "tokens" / run.tokens_key,
        outcome=trained / "outcome.json",
        weights=trained / "weights",
        results=study / "evaluations" / run.id,
    )


def _is_trained(other: Evaluation) -> bool:
    try:
        found = read_object(other.outcome)
    except UserError:
        return False
    return (found.get("outcome"), found.get("digest")) == ("ok", other.run.training_digest)


def _is_evaluated(other: Evaluation) -> bool:
    """Whether the results of a run's evaluation are there, and of its plan."""
    try:
        found = read_object(other.results / "evaluation.json")
    except UserError:
        return False
    due = (other.run.evaluation_digest, other.run.training_digest)
    return (found.get("digest"), found.get("training_digest")) == due


def _signature(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file, which within the minutes of a workflow tell its contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [(at := path.stat()).st_size, at.st_mtime_ns] for path in files}
