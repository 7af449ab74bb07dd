"""What Snakemake and Slurm cost per job beyond the job itself, on a private Slurm of this machine.

    python benchmarks/slurm_overhead.py

The job itself is one shell command that notes when it begins and when it ends. Printed are the medians over jobs that
are submitted one at a time, so that they do not wait for each other.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from tests.slurm.cluster import Cluster, why_not  # noqa: E402

JOBS = 5
POLL_SECONDS = 5
WORKFLOW = """
rule all:
    input: expand("out/{n}", n=range(%d))

rule one:
    output: "out/{n}"
    resources: only_one=1
    shell: "date +%%s.%%N >began.{wildcards.n}; sleep 1; date +%%s.%%N >{output}"
"""
TIMES = ("Submit", "Start", "End")


def main() -> None:
    """Print the overhead, or why it cannot be measured here."""
    if reason := why_not(accounting=True):
        print(f"the overhead of Slurm cannot be measured here: {reason}")
        return
    cluster = Cluster(accounting=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(cluster, Path(folder))
    finally:
        cluster.stop()


def measure(cluster: Cluster, folder: Path) -> None:
    """Run the jobs through Snakemake, and compare its times, Slurm's and the jobs' own."""
    (folder / "Snakefile").write_text(WORKFLOW % JOBS)
    profile = (REPOSITORY / "profiles" / "slurm" / "config.yaml").read_text()
    for before, after in (
        ("slurm_partition: main ", "slurm_partition: gpu "),
        ("before-status-checks: 20", f"before-status-checks: {POLL_SECONDS}"),
        ("max-status-checks-per-second: 0.2", "max-status-checks-per-second: 10"),
    ):
        assert before in profile
        profile = profile.replace(before, after)
    (folder / "slurm").mkdir()
    (folder / "slurm" / "config.yaml").write_text(profile)
    bare_s = _bare(cluster)
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "--resources", "only_one=1"]
    programs = f"{Path(sys.executable).parent}:{folder / 'bin'}:{cluster.environment['PATH']}"
    _srun_with_configuration(cluster, folder / "bin")
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(_environment()) | cluster.environment | {"PATH": programs},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    before, after, seen = [], [], []
    jobs = cluster.run("sacct", "-nXP", "-o", "Comment%60,Start,End", "--units=M").splitlines()
    for row in jobs:
        comment, start, end = row.split("|")
        number = comment.rpartition("_")[2]
        if not comment.startswith("rule_one"):
            continue
        began, ended = (float((folder / name).read_text()) for name in (f"began.{number}", f"out/{number}"))
        before.append(began - _seconds(start))
        after.append(_seconds(end) - ended)
        seen.append(ended)
    turns = [later - earlier for earlier, later in zip(sorted(seen), sorted(seen)[1:], strict=False)]
    print(f"Slurm alone, sbatch to the end of `true`: {bare_s:.1f} s")
    print(f"in the allocation, before the command (Snakemake twice, srun): {statistics.median(before):.1f} s")
    print(f"in the allocation, after the command: {statistics.median(after):.1f} s")
    print(
        f"from the end of one job's command to the end of the next one's, less its own second: "
        f"{statistics.median(turns) - 1:.1f} s, polling first after {POLL_SECONDS} s (the profile's 20 s add up to "
        f"{20 - POLL_SECONDS} s)"
    )


def _environment() -> Iterator[tuple[str, str]]:
    import os

    return ((name, value) for name, value in os.environ.items() if not name.startswith(("TUNEMAP_", "SLURM_")))


def _srun_with_configuration(cluster: Cluster, folder: Path) -> None:
    """As the workflow's own rules do: the plugin removes SLURM_CONF inside of jobs."""
    from tunemap.slurm import keep_configuration

    folder.mkdir()
    keep_configuration(dict(cluster.environment), folder)


def _bare(cluster: Cluster) -> float:
    """Seconds of a job without Snakemake, median."""
    import time

    took = []
    for _ in range(JOBS):
        started = time.monotonic()
        job = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=true").strip()
        while cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG", "-o", "%T"):
            time.sleep(0.05)
        took.append(time.monotonic() - started)
    return statistics.median(took)


def _seconds(stamp: str) -> float:
    """Unix time of sacct's local time."""
    from datetime import datetime

    return datetime.fromisoformat(stamp).timestamp()


if __name__ == "__main__":
    main()
