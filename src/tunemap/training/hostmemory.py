"""How often the kernel has ended a process of this job for want of host memory: what a bare SIGKILL does not say."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


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
