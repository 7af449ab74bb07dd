"""Whether the kernel has ended a process of this job for want of host memory, which a bare SIGKILL does not say."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tunemap.training.failure import Failure

CGROUPS = Path("/sys/fs/cgroup")
TRY_AGAIN = os.EX_TEMPFAIL  # exit code where another attempt, with more memory, may help


class HostMemoryError(Exception):
    """The kernel ended a process of the run for want of host memory, of which the next attempt gets more."""


def explained(failure: Failure, *, kills: int, attempts_left: int) -> Failure:
    """The failure, named after host memory where a process was killed and the kernel says that it was so `kills` times.

    Raises HostMemoryError in place of that if there is another attempt.
    """
    if kills == 0 or "SIGKILL" not in failure.reason:
        return failure
    reason = "host memory: the system ended a process for want of it"
    if attempts_left > 0:
        raise HostMemoryError(f"{reason}; {attempts_left} more attempts, with more memory")
    return replace(failure, outcome="oom", reason=reason)


def oom_kills(membership: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> int:
    """Kills in this process's control group (https://docs.kernel.org/admin-guide/cgroup-v2.html); 0 where unknown."""
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return 0
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            file = root / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            file = root / "memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        try:
            words = dict(line.split()[:2] for line in file.read_text().splitlines())
        except (OSError, ValueError):
            continue
        if "oom_kill" in words:
            return int(words["oom_kill"])
    return 0
