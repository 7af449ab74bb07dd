"""What Slurm is asked for, what it grants, and what happens to jobs that wait; training is a stub here."""

import time

import pytest

from tests.slurm.conftest import LIMIT_S, submitted, wait_until
from tests.workflow.conftest import STUDY

pytestmark = pytest.mark.slurm
ON_ONE_NODE = ("# set-resources: ", "set-resources:\n  train:\n    slurm_extra: --nodelist=n1\n# ")
ON_GPUS = STUDY | {
    "hardware": {"device": "cuda"},
    "experiments": [
        {
            "name": "devices",
            "question": "How many?",
            "fixed": {"method": "lora", "strategy": "ddp"},
            "vary": {"gpus": [2, 4]},
            "seeds": [0, 1],
        }
    ],
}


@pytest.mark.slow_slurm
def test_gpu_requests_arrive_and_full_nodes_are_waited_for(accounting_cluster, submit_to):
    checkout = submit_to(accounting_cluster, ON_GPUS, profile=(ON_ONE_NODE,))
    checkout.behave(lora={"sleep": 2})
    done = checkout.snakemake(*checkout.targets())
    assert done.returncode == 0, done.stdout + done.stderr
    reports = checkout.reports()
    devices = {one["job"]: set(one["visible"].split(",")) for one in reports}
    assert sorted(map(len, devices.values())) == [2, 2, 4, 4]
    assert {one["node"] for one in reports} == {"n1"}
    assert {one["configuration"] for one in reports} == {accounting_cluster.environment["SLURM_CONF"]}
    for one in reports:  # 4 + 4 GPUs on a node of 4: the second waits, whichever comes first
        for other in reports:
            at_once = one["began"] < other["began"] < one["ended"]
            assert not (at_once and devices[one["job"]] & devices[other["job"]])
    for job, visible in devices.items():
        row = accounting_cluster.run("sacct", "-nXP", "-j", job, "-o", "AllocTRES,ReqMem,TimelimitRaw,State")
        granted = dict(part.split("=") for part in row.split("|")[0].split(","))
        assert int(granted["gres/gpu"]) == len(visible)
        assert int(granted["cpu"]) == 2 * len(visible)  # a thread of the process, and one for what runs beside it
        assert granted["node"] == "1"
        assert "COMPLETED" in row


@pytest.mark.slow_slurm
def test_a_repeated_job_is_a_new_one_with_twice_the_memory_and_time(accounting_cluster, submit_to):
    checkout = submit_to(accounting_cluster, ON_GPUS | {"hardware": {"device": "cpu"}})
    checkout.behave(lora={"fails_first": True})
    target = checkout.targets()[0]
    done = checkout.snakemake(target)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    first, second = checkout.reports()
    assert (first["attempts_left"], second["attempts_left"]) == (1, 0)
    assert first["job"] != second["job"]
    assert len(submitted(output)) == 3  # tokens, and the run twice
    asked = [
        accounting_cluster.run("sacct", "-nXP", "-j", one["job"], "-o", "ReqMem,TimelimitRaw").strip().split("|")
        for one in (first, second)
    ]
    memory = [float(row[0].rstrip("MG")) for row in asked]
    assert memory[1] == pytest.approx(2 * memory[0], rel=0.02)
    assert int(asked[1][1]) == 2 * int(asked[0][1])


@pytest.mark.slow_slurm
@pytest.mark.parametrize("name", ["cluster", "accounting_cluster"])
def test_a_waiting_job_that_is_cancelled_is_submitted_once_more(request, submit_to, name):
    used = request.getfixturevalue(name)
    fixed = {"method": "lora", "strategy": "ddp", "gpus": 4}
    study = ON_GPUS | {"experiments": [{"name": "e", "question": "?", "fixed": fixed, "seeds": [0, 1]}]}
    checkout = submit_to(used, study, profile=(ON_ONE_NODE,))
    checkout.behave(lora={"sleep": 8})
    process = checkout.start(*checkout.targets())
    wait_until(lambda: "PENDING" in checkout.jobs().values() and len(checkout.reports()) == 1, "one job waits")
    (waiting,) = used.run("squeue", "-h", "-t", "PD", "-o", "%A").split()
    used.run("scancel", waiting)
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    assert len({one["run"] for one in checkout.reports()}) == 2
    assert waiting not in {one["job"] for one in checkout.reports()}
    assert len(submitted(checkout.log)) == 4  # tokens, two runs, and one of them again
    assert checkout.planned() & {f"train {one['run']}" for one in checkout.reports()} == set()


@pytest.mark.slow_slurm
def test_an_edited_study_does_not_touch_jobs_that_wait(cluster, submit_to):
    study = ON_GPUS | {"methods": {"lora": {"kind": "lora", "rank": 2}, "wide": {"kind": "lora", "rank": 3}}}
    fixed = {"strategy": "ddp", "gpus": 4}
    study["experiments"] = [{"name": "e", "question": "?", "fixed": fixed, "vary": {"method": ["lora", "wide"]}}]
    checkout = submit_to(cluster, study, profile=(ON_ONE_NODE,))
    checkout.behave(lora={"sleep": 8}, wide={"sleep": 8})
    process = checkout.start(*checkout.targets())
    wait_until(lambda: "PENDING" in checkout.jobs().values() and len(checkout.reports()) == 1, "one job waits")
    edited = study | {"methods": {"lora": {"kind": "lora", "rank": 4}, "wide": {"kind": "lora", "rank": 5}}}
    checkout.write_study(edited)
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    assert sorted(one["rank"] for one in checkout.reports()) == [2, 3]
    checkout.write_study(study | {"methods": edited["methods"] | {"lora": study["methods"]["lora"]}})
    assert {job for job in checkout.planned() if job.startswith("train")} == {
        "train small.arithmetic.wide.strategy-ddp.gpus-4.seed-0",
        "train small.arithmetic.base",  # never asked for until now
    }
    checkout.write_study(study)
    assert {job for job in checkout.planned() if job.startswith("train")} == {"train small.arithmetic.base"}


@pytest.mark.slow_slurm
def test_a_killed_workflow_is_not_started_twice(cluster, submit_to):
    checkout = submit_to(cluster, ON_GPUS, profile=(ON_ONE_NODE,))
    checkout.behave(lora={"sleep": 10})
    targets = checkout.targets()
    process = checkout.start(*targets)
    wait_until(lambda: len(checkout.reports()) > 0, "a job starts")
    process.kill()
    process.wait()
    assert checkout.snakemake("--unlock").returncode == 0
    again = checkout.snakemake(*targets)
    output = again.stdout + again.stderr
    assert again.returncode != 0
    assert "jobs of an earlier start of this study are still in Slurm's queue" in output
    assert "scancel" in output
    assert not submitted(output)
    wait_until(lambda: not checkout.jobs(), "the jobs end")
    began = {one["run"]: one["began"] for one in checkout.reports()}
    time.sleep(1)
    done = checkout.snakemake(*targets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["run"]: one["began"] for one in checkout.reports()} == began  # nothing ran again
