"""The checkout's own studies on a real Slurm: the literal command, two jobs at a time, to the report."""

import json
import re
import subprocess
import time

import pytest

from tests.slurm.conftest import submitted
from tunemap.study_file import load_plan

pytestmark = [pytest.mark.slurm, pytest.mark.slow_slurm]
TWO_AT_ONCE = ("jobs: 50", "jobs: 2")  # virtual nodes have more cores than this host


@pytest.mark.parametrize(
    ("study", "given"),
    [
        ("config.yaml", ()),
        ("studies/scaling_cpu.yaml", ("--configfile", "config/studies/scaling_cpu.yaml", "--config", "scale=pair")),
    ],
    ids=["quickstart", "scaling"],
)
def test_a_study_of_the_checkout_runs_to_its_report(accounting_cluster, submit_to, capsys, study, given):
    checkout = submit_to(accounting_cluster, profile=(TWO_AT_ONCE,))
    plan = load_plan(checkout.root / "config" / study, scale="pair" if given else None)
    captures = {run for experiment in plan.experiments for run in experiment.captures}
    results = checkout.root / "results" / plan.study.study

    def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["snakemake", *arguments, "--profile", "slurm", *given]
        return subprocess.run(
            command, cwd=checkout.root, env=checkout.environment(), stdout=-1, stderr=subprocess.STDOUT, text=True
        )

    began = time.monotonic()
    done = snakemake()
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stdout
    outcomes = {run: json.loads((results / "runs" / run / "outcome.json").read_text()) for run in plan.runs}
    assert {run: one["reason"] for run, one in outcomes.items() if one["outcome"] != "ok"} == {}
    evaluations = [json.loads((results / "evaluations" / run / "evaluation.json").read_text()) for run in plan.runs]
    assert {one["outcome"] for one in evaluations} == {"ok"}
    captured = [json.loads((results / "facts" / run / "summary.json").read_text()) for run in captures]
    assert captured
    assert all(summary["devices"] for summary in captured)
    assert (results / "report.html").stat().st_size > 100_000
    assert not list((results / "unfinished").glob("*/checkpoint"))

    jobs = submitted(done.stdout)
    rows = accounting_cluster.run("sacct", "-nXP", "-j", ",".join(jobs), "-o", "JobID,State,ElapsedRaw").splitlines()
    states = {row.split("|")[0]: row.split("|")[1] for row in rows}
    assert states == dict.fromkeys(jobs, "COMPLETED")
    again = snakemake("--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout
    seconds = sum(int(row.split("|")[2]) for row in rows)
    (steps,) = set(re.findall(r"(\d+ of \d+) steps \(100%\) done", done.stdout))
    with capsys.disabled():
        print(
            f"\n{plan.study.study}: {len(plan.runs)} runs, {len(captured)} captures, {len(jobs)} Slurm jobs, all "
            f"COMPLETED; {steps} steps done in {took_s:.0f} s ({seconds / len(jobs):.0f} s a job)"
        )
