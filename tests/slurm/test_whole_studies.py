"""The checkout's own studies on a real Slurm: the literal command, two jobs at a time, to the report."""

import json
import re
import subprocess
import time

import pytest

from tests.slurm.conftest import FOR_TESTS, SlurmCheckout, submitted
from tests.workflow.conftest import make_checkout
from tunemap.study_file import load_plan

pytestmark = [pytest.mark.slurm, pytest.mark.slow_slurm]
TWO_AT_ONCE = ("jobs: 50", "jobs: 2")  # virtual nodes have more cores than this host
SCALING = "config/studies/scaling_cpu.yaml"


@pytest.fixture(scope="module")
def checkout(accounting_cluster, repository, tmp_path_factory) -> SlurmCheckout:
    """One checkout for both studies: they share the model, whose making takes longest."""
    made = make_checkout(repository, tmp_path_factory.mktemp("studies") / "checkout")
    checkout = SlurmCheckout(made.root, accounting_cluster)
    checkout.edit_profile(*FOR_TESTS, TWO_AT_ONCE)
    return checkout


def test_the_default_study_runs_to_its_report(checkout, capsys):
    said = runs_to_its_report(checkout, "config/config.yaml")
    with capsys.disabled():
        print(said)


def test_the_scaling_study_runs_to_its_report(checkout, capsys):
    said = runs_to_its_report(checkout, SCALING, "--configfile", SCALING, "--config", "scale=pair", scale="pair")
    with capsys.disabled():
        print(said)


def runs_to_its_report(checkout: SlurmCheckout, study: str, *given: str, scale: str | None = None) -> str:
    """Submit a study, look at everything that it leaves, and say in a line what happened."""
    plan = load_plan(checkout.root / study, scale=scale)
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
    facts = [json.loads((results / "facts" / run / "summary.json").read_text()) for run in captures]
    assert facts
    assert all(summary["devices"] for summary in facts)
    assert (results / "report.html").stat().st_size > 100_000
    assert not list((results / "unfinished").glob("*/checkpoint"))

    jobs = submitted(done.stdout)
    rows = checkout.cluster.run("sacct", "-nXP", "-j", ",".join(jobs), "-o", "JobID,State,ElapsedRaw").splitlines()
    states = {row.split("|")[0]: row.split("|")[1] for row in rows}
    assert states == dict.fromkeys(jobs, "COMPLETED")
    again = snakemake("--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout
    seconds = sum(int(row.split("|")[2]) for row in rows)
    (steps,) = set(re.findall(r"(\d+ of \d+) steps \(100%\) done", done.stdout))
    return (
        f"\n{plan.study.study}: {len(plan.runs)} runs, {len(facts)} captures, {len(jobs)} Slurm jobs, all COMPLETED; "
        f"{steps} steps done in {took_s:.0f} s ({seconds / len(jobs):.0f} s a job)"
    )
