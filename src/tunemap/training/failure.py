"""From an exception to an outcome: what kind of failure it was, where it happened, what was asked for.

Imports no torch: a worker whose torch is broken must still be able to say so.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunemap.errors import UserError
from tunemap.files import read_json, write_json

_OUT_OF_MEMORY = re.compile(  # of torch, the system, cuBLAS and cuDNN
    r"out of memory|can't allocate memory|Cannot allocate memory|not enough memory|STATUS_ALLOC_FAILED", re.I
)
_STORAGE = re.compile(
    "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE)))
    + r"|was set aside as|: move it away and run again|run the workflow to make it"  # what is damaged or gone
    + r"|unexpected pos \d+ vs|file write failed"  # how torch says it
    + r"|could write nothing"
)
NO_DISK = os.EX_IOERR  # exit code of a process that could not even write why it failed
_ASKED = re.compile(r"(?:Tried to allocate|you tried to allocate) ([\d.]+) ?(GiB|MiB|KiB|bytes)")
_FREE = re.compile(r"([\d.]+) ?(GiB|MiB|KiB|bytes)(?: is)? free")
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
# Which failure explains the others: ranks that lose a partner fail too, with errors of their own.
_PRECEDENCE = ("oom", "invalid", "unsupported", "error")
_LOST_PARTNER = re.compile(
    r"Connection (closed by peer|reset by peer|was likely closed)|Broken pipe|pair closure|Timed out waiting"
    r"|remote process exited|collective operation timeout|failed to (recv|send)",
    re.I,
)
_LOST_PARTNER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")


class InvalidRunError(Exception):
    """A fatal gate tripped: the run does not measure what it says."""


class UnsupportedRunError(Exception):
    """The combination cannot run here; the message says why."""


@dataclass(frozen=True)
class Failure:
    """How one rank failed."""

    outcome: str
    reason: str
    rank: int
    phase: str | None
    step: int | None
    traceback: str | None
    bytes_asked: int | None = None
    bytes_free: int | None = None
    lost_partner: bool = False  # the error of a rank whose partner was gone: a consequence, not a cause


def describe(error: BaseException, *, rank: int, phase: str | None, step: int | None) -> Failure:
    """Classify an exception of a worker."""
    message = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
    outcome = "error"
    if _is_out_of_memory(error):
        outcome = "oom"
    elif isinstance(error, InvalidRunError):
        outcome, message = "invalid", str(error)
    elif isinstance(error, UnsupportedRunError):
        outcome, message = "unsupported", str(error)
    text = "".join(traceback.format_exception(error))
    asked, free = (_bytes(pattern, str(error)) if outcome == "oom" else None for pattern in (_ASKED, _FREE))
    if outcome == "oom" and free is None:
        free = _host_free_bytes()  # torch's message of a CPU does not tell
    lost_partner = type(error).__name__ in _LOST_PARTNER_TYPES or bool(_LOST_PARTNER.search(str(error)))
    return Failure(outcome, message, rank, phase, step, text, asked, free, outcome == "error" and lost_partner)


def how_it_ended(code: int | None, doing: str = "training") -> str:
    """In words, how a process ended that left no message."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        return f"the {doing} process was ended by {name}{hint}"
    if code == NO_DISK:
        return f"the {doing} process could write nothing, not even why it ended; see the log of this run"
    return f"the {doing} process ended with exit code {code} and left no message; see the log of this run"


def is_of_storage(reason: str) -> bool:
    """Whether a failure says nothing of the run, only of the disk (full, read-only, broken) or of damage on it."""
    return _STORAGE.search(reason) is not None


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or _OUT_OF_MEMORY.search(str(error)) is not None


def _host_free_bytes() -> int | None:
    """MemAvailable of proc(5): what the system could still give, whatever limit this process ran into."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _bytes(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank says how it failed."""
    return folder / f"failure.rank{rank}.json"


def write_failure(folder: Path, failure: Failure) -> None:
    """Leave the failure for the launcher."""
    write_json(failure_file(folder, failure.rank), asdict(failure))


def leave_failure(folder: Path, failure: Failure) -> int:
    """Leave the failure for the launcher as far as the disk allows; returns the exit code of the process."""
    try:
        write_failure(folder, failure)
    except OSError as refused:
        print(f"{failure.reason}; this cannot be written to {folder}: {refused.strerror}", file=sys.stderr, flush=True)
        return NO_DISK
    return 1


def read_failures(folder: Path) -> list[Failure]:
    """The failures of all ranks, the one that explains the others first."""
    values: list[dict[str, Any]] = [read_json(path) for path in sorted(folder.glob("failure.rank*.json"))]
    failures = [Failure(**value) for value in values]
    return sorted(failures, key=lambda one: (_PRECEDENCE.index(one.outcome), one.lost_partner, one.rank))
