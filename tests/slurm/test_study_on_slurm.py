"""The literal `snakemake --profile slurm` on a real Slurm with fake GPUs, from the study to the report."""

import json

import pytest

from tests.slurm.conftest import submitted
from tests.workflow.conftest import BASE, FULL, STUDY

pytestmark = pytest.mark.slurm
ONE_RUN = STUDY | {"experiments": [{"name": "one", "question": "Does it run?", "fixed": {"method": "full"}}]}


def test_a_study_runs_without_accounting(cluster, submit_to):
    checkout = submit_to(cluster, ONE_RUN)
    done = checkout.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert checkout.outcome(FULL)["outcome"] == "ok"
    assert (checkout.results / "report.html").exists()
    # the data are tokenised and the study planned; two runs are trained (one is the row without fine-tuning) and
    # evaluated; models and data come from this host
    assert len(submitted(output)) == 6
    assert not (checkout.results / "unfinished" / FULL).exists()
    assert json.loads((checkout.results / "evaluations" / BASE / "evaluation.json").read_text())["outcome"] == "ok"
    assert checkout.planned() == set()
