"""Finds what an earlier start of the workflow left running, before this start writes the same files.

When the main process of a workflow dies (kill -9, a closed terminal), its jobs live on: Slurm knows those that it
has, and each launcher on this machine holds the lease of its run. Snakemake knows nothing of either.
"""

from __future__ import annotations

from pathlib import Path

from tunemap.frozen import FrozenPlan
from tunemap.slurm import QueuedJob, jobs_of_workflow, queue
from tunemap.training.lease import how_to_go_on, is_held, read_lease


def what_is_left(results: Path, plan: FrozenPlan) -> str | None:
    """What still works on the results of `plan`, with the commands to wait or to stop it; None if nothing does."""
    queued = queue()
    jobs = jobs_of_plan(jobs_of_workflow(queued or [], Path.cwd()), plan)
    if jobs:
        lines = [f"  {job.id} {job.state} {job.comment}" for job in jobs]
        ids = " ".join(job.id for job in jobs)
        return "\n".join(
            [
                "jobs of an earlier start of this study are still in Slurm's queue:",
                *lines,
                f"wait until `squeue --jobs={ids.replace(' ', ',')}` is empty, and what they finish is kept; "
                f"or stop them with `scancel {ids}`. Then start again.",
            ]
        )
    held = []
    for run in plan.runs:
        lease = read_lease(results / plan.study / "unfinished" / run)
        if lease is not None and is_held(lease, lambda: queued):
            held.append(f"  {how_to_go_on(lease)}")
    return "\n".join(["an earlier start of this study still trains:", *held]) if held else None


def jobs_of_plan(jobs: list[QueuedJob], plan: FrozenPlan) -> list[QueuedJob]:
    """The jobs that write results of the plan: of its runs, or tokens that it uses."""
    wildcards = {f"{plan.study}_{name}" for name in plan.runs} | {run.tokens_key for run in plan.runs.values()}
    return [job for job in jobs if job.comment.partition("_wildcards_")[2] in wildcards]
