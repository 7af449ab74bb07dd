"""One writer per run: a file in its work folder says who trains it, and is taken over from those who are gone.

Two launchers of one run would write the same files. That happens when the main process of a workflow dies while its
jobs live on in a queue, and the workflow is started again. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tunemap.errors import UserError
from tunemap.files import write_json
from tunemap.slurm import QueuedJob, queue

NAME = "lease.json"
RENEW_SECONDS = 30.0
STALE_SECONDS = 300.0  # of silence on another host, where neither a process nor a queue can be asked


@dataclass(frozen=True)
class Lease:
    """Who trains a run."""

    run: str
    host: str
    pid: int
    pid_started: int | None  # clock ticks since boot: tells a process from a later one with the same number
    slurm_job_id: str | None
    started_at: str  # ISO, UTC
    heartbeat: str  # ISO, UTC

    def silent_s(self) -> float:
        """Seconds since its last sign of life."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.heartbeat)).total_seconds()


def read_lease(work: Path) -> Lease | None:
    """The lease of a run's work folder; None if nobody holds one."""
    try:
        return Lease(**json.loads((work / NAME).read_text()))
    except (OSError, ValueError, TypeError):  # gone, or of another version: of nobody
        return None


def is_held(lease: Lease, jobs: Callable[[], list[QueuedJob] | None] = queue) -> bool:
    """Whether its holder is alive, asked in the surest way there is: the kernel, the queue, or the clock."""
    if lease.host == socket.gethostname() and lease.pid_started is not None:
        return _started(lease.pid) == lease.pid_started
    if lease.slurm_job_id is not None:
        if lease.slurm_job_id == os.environ.get("SLURM_JOB_ID"):
            return False  # this very job, which Slurm has put into the queue again
        known = jobs()
        if known is not None:
            return any(job.id == lease.slurm_job_id and not job.is_waiting for job in known)
    return abs(lease.silent_s()) < STALE_SECONDS  # a heartbeat of the future is of a clock that was wrong


def how_to_go_on(lease: Lease) -> str:
    """In words: who holds a lease, and what to do about it."""
    who, stop = f"process {lease.pid} on {lease.host}", f"kill {lease.pid}"
    if lease.slurm_job_id is not None:
        who, stop = f"Slurm job {lease.slurm_job_id} on {lease.host}", f"scancel {lease.slurm_job_id}"
    elif lease.host != socket.gethostname():
        stop = f"ssh {lease.host} {stop}"
    return (
        f"run {lease.run} is being trained by {who} since {lease.started_at} (last sign of life "
        f"{lease.silent_s():.0f} s ago): wait until it has ended, or stop it with `{stop}`"
    )


@contextmanager
def hold(work: Path, run: str) -> Iterator[None]:
    """Be the one who trains `run` for the body; its heartbeat is renewed by a thread.

    A holder that only the clock calls dead is watched for a while first: clocks differ between hosts, and jump.

    Raises UserError if somebody else is training it.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    mine = Lease(run, socket.gethostname(), pid, _started(pid), os.environ.get("SLURM_JOB_ID"), now, now)
    work.mkdir(parents=True, exist_ok=True)
    _acquire(work, mine)
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(work, mine, ended), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        if _is_mine(work, mine):
            (work / NAME).unlink(missing_ok=True)


def _acquire(work: Path, mine: Lease) -> None:
    """Put `mine` in place. A link appears whole or not at all, also on network file systems."""
    path = work / NAME
    own = work / f".{NAME}.{mine.host}.{mine.pid}"
    write_json(own, asdict(mine))
    try:
        while True:
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
                return
            other = read_lease(work)
            if other is not None and (is_held(other) or _shows_life(work, other)):
                raise UserError(how_to_go_on(other))
            _set_aside(path, other)
    finally:
        own.unlink(missing_ok=True)


def _shows_life(work: Path, other: Lease) -> bool:
    """Whether a holder that nobody can be asked about renews its lease in the time in which it should twice.

    The queue knows nothing of this very job's first start: a node that it lost sight of may still compute.
    """
    again = other.slurm_job_id is not None and other.slurm_job_id == os.environ.get("SLURM_JOB_ID")
    asked = other.slurm_job_id is not None and not again and queue() is not None
    if other.host == socket.gethostname() or asked:
        return False
    deadline = time.monotonic() + 2 * RENEW_SECONDS
    while (found := read_lease(work)) == other and time.monotonic() < deadline:
        time.sleep(min(1.0, RENEW_SECONDS))
    return found is not None and found != other


def _set_aside(path: Path, judged: Lease | None) -> None:
    """Remove an abandoned lease, but not one that somebody else has put in its place since it was looked at."""
    aside = path.with_name(f".{NAME}.abandoned.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        try:
            taken: Lease | None = Lease(**json.loads(aside.read_text()))
        except (ValueError, TypeError):
            taken = None
        if taken is not None and (judged is None or _holder(taken) != _holder(judged)):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)


def _renew(work: Path, mine: Lease, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):  # a file system that fails for a moment; the next renewal may succeed
            if _is_mine(work, mine):
                now = datetime.now(UTC).isoformat(timespec="seconds")
                write_json(work / NAME, asdict(replace(mine, heartbeat=now)))


def _is_mine(work: Path, mine: Lease) -> bool:
    found = read_lease(work)
    return found is not None and _holder(found) == _holder(mine)


def _holder(lease: Lease) -> tuple[object, ...]:
    return lease.host, lease.pid, lease.pid_started, lease.slurm_job_id, lease.started_at


def _started(pid: int) -> int | None:
    """When a process of this host started (field 22 of /proc/PID/stat, proc(5)); None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
