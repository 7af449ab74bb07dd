"""What the workflow asks Slurm and tells it: which jobs are in the queue, and where its configuration lies.

Works without Slurm: every question then has the answer None.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from tunemap.files import write_atomic

QUERY_LIMIT_S = 30.0
RULE_PREFIX = "rule_"  # how snakemake-executor-plugin-slurm begins the comment of each job
WAITING = ("PENDING", "CONFIGURING", "REQUEUED")


@dataclass(frozen=True)
class QueuedJob:
    """A job that Slurm has not finished with."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits, or the nodes that it runs on
    comment: str  # rule_train_wildcards_STUDY_RUN
    folder: str  # where the workflow was started

    @property
    def is_waiting(self) -> bool:
        """Whether it has not begun."""
        return self.state in WAITING


def queue() -> list[QueuedJob] | None:
    """All of this user's jobs that wait or run, by one call of squeue; None where Slurm does not answer."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=%A|%T|%R|%k|%Z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return [QueuedJob(row[0], row[1], row[2], row[3], "|".join(row[4:])) for row in rows if len(row) >= 5]


def jobs_of_workflow(jobs: list[QueuedJob], folder: Path) -> list[QueuedJob]:
    """Those of the jobs that a workflow started in `folder` submitted."""
    here = str(folder.resolve())
    return [job for job in jobs if job.comment.startswith(RULE_PREFIX) and os.path.realpath(job.folder) == here]


def keep_configuration(environment: MutableMapping[str, str], folder: Path) -> None:
    """Let srun inside of jobs know SLURM_CONF, which snakemake-executor-plugin-slurm-jobstep removes for it.

    Where the variable is set (most sites do not need it), `folder` gets an srun that sets it again, first in PATH.
    """
    configuration, place = environment.get("SLURM_CONF"), str(folder.resolve())
    others = [entry for entry in environment.get("PATH", "").split(os.pathsep) if entry != place]
    srun = shutil.which("srun", path=os.pathsep.join(others))
    if configuration is None or srun is None:
        return
    wrapper = folder / "srun"
    text = f'#!/bin/sh\nSLURM_CONF="{configuration}" exec "{srun}" "$@"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        write_atomic(wrapper, text)
        wrapper.chmod(0o755)
    environment["PATH"] = os.pathsep.join([place, *others])
