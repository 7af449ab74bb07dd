"""Real runs on a real Slurm, disturbed in every way there is: nothing computed is lost, and the outcomes are right."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import LIMIT_S, submitted, wait_until
from tests.workflow.conftest import STUDY
from tunemap.files import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.slow_slurm]
LONG = STUDY | {
    "defaults": STUDY["defaults"] | {"max_steps": 1500, "checkpoint_steps": 20, "logging_steps": 10},
    "experiments": [{"name": "long", "question": "Does it survive?", "fixed": {"method": "lora"}}],
}
LORA = "small.arithmetic.lora.seed-0"
TARGET = f"results/small/runs/{LORA}/outcome.json"
SPREAD = {"strategy": "ddp", "gpus": 2}


def _log(checkout, run: str = LORA) -> str:
    path = checkout.root / "logs" / "small" / "train" / f"{run}.log"
    return path.read_text() if path.exists() else ""


def _has_checkpoint(checkout, run: str = LORA) -> bool:
    return (checkout.results / "unfinished" / run / "checkpoint" / "manifest.json").exists()


def _running(checkout) -> str:
    """Id of the one job that runs."""
    (row,) = checkout.cluster.run("squeue", "-h", "-t", "R", "-o", "%A %k").splitlines()
    assert "rule_train" in row
    return row.split()[0]


def _steps(checkout, run: str = LORA) -> list[int]:
    rows = (checkout.results / "runs" / run / "steps.csv").read_text().splitlines()[1:]
    return sorted(int(row.split(",")[1]) for row in rows)


def _processes(pattern: str, folder: Path) -> list[int]:
    """Processes of this checkout whose command line matches."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
            where = os.readlink(path.parent / "cwd")
        except OSError:
            continue
        if re.search(pattern, words) and where == str(folder):
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("how", ["scancel", "warning"])
def test_a_job_that_is_ended_resumes_in_a_new_one(cluster, submit_to, how):
    checkout = submit_to(cluster, LONG)
    process = checkout.start(TARGET)
    wait_until(lambda: _has_checkpoint(checkout), "a checkpoint")
    job = _running(checkout)
    if how == "scancel":
        cluster.run("scancel", job)
    else:  # as Slurm does before a time limit (--signal): to every process of the job's steps
        cluster.run("scancel", "--signal=URG", job)
        wait_until(lambda: "after the checkpoint of step" in _log(checkout), "the last checkpoint")
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    assert len(submitted(checkout.log)) == 3  # tokens, and the run twice
    assert re.search(r"resuming after step \d+", _log(checkout))
    assert checkout.outcome(LORA)["outcome"] == "ok"
    assert _steps(checkout) == list(range(1500))


def test_a_time_limit_is_warned_of_and_costs_nothing(accounting_cluster, submit_to):
    endless = LONG | {"defaults": LONG["defaults"] | {"max_steps": 100_000}}
    times = ("# set-resources: ", "set-resources:\n  train:\n    runtime: 3\n# ")
    checkout = submit_to(accounting_cluster, endless, profile=(times, ("retries: 1", "retries: 0")))
    done = checkout.snakemake(TARGET, SBATCH_SIGNAL="URG@40")  # up to a minute earlier: Slurm is not exact
    output = done.stdout + done.stderr
    assert done.returncode != 0
    job = submitted(output)[-1]
    assert "FAILED" in accounting_cluster.run(
        "sacct", "-nXP", "-j", job, "-o", "State"
    )  # not TIMEOUT: it stopped itself
    stopped = re.search(r"stopped after the checkpoint of step (\d+)", _log(checkout))
    assert stopped, _log(checkout)
    manifest = read_json(checkout.results / "unfinished" / LORA / "checkpoint" / "manifest.json")
    assert manifest["step"] == int(stopped[1])
    assert not (checkout.root / TARGET).exists()


def test_host_memory_is_tried_again_with_more(cluster, submit_to):
    memory = ("# set-resources: ", "set-resources:\n  train:\n    mem_mb: 500 * attempt ** 3\n# ")
    checkout = submit_to(cluster, LONG, profile=(memory,))
    done = checkout.snakemake(TARGET)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    logs = "".join(path.read_text() for path in (checkout.root / "logs" / "slurm" / "rule_train").rglob("*.log"))
    assert "exceeded memory limit" in logs
    assert checkout.outcome(LORA)["outcome"] == "ok"
    assert len(submitted(output)) == 3


def test_a_killed_rank_is_an_outcome_and_not_repeated(cluster, submit_to):
    study = LONG | {"experiments": [LONG["experiments"][0] | {"fixed": {"method": "lora"} | SPREAD}]}
    checkout = submit_to(cluster, study)
    (target,) = checkout.targets()
    run = Path(target).parent.name
    process = checkout.start(target)
    wait_until(lambda: _has_checkpoint(checkout, run), "a checkpoint")
    ranks = [pid for pid in _processes(r"-m tunemap\.training\.worker", checkout.root) if _rank(pid) == "1"]
    os.kill(ranks[0], signal.SIGKILL)
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    outcome = checkout.outcome(run)
    assert (outcome["outcome"], outcome["rank"]) == ("error", 1)
    assert "SIGKILL" in outcome["reason"]
    assert len(submitted(checkout.log)) == 2  # tokens and the run: not repeated


def _rank(pid: int) -> str | None:
    variables = dict(
        entry.split(b"=", 1) for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in entry
    )
    return variables.get(b"RANK", b"").decode() or None


def test_a_dead_slurmd_does_not_end_a_run(cluster, submit_to):
    checkout = submit_to(cluster, LONG)
    process = checkout.start(TARGET)
    wait_until(lambda: _has_checkpoint(checkout), "a checkpoint")
    node = cluster.run("squeue", "-h", "-j", _running(checkout), "-o", "%N").strip()
    cluster.kill_slurmd(node)
    wait_until(lambda: (checkout.root / TARGET).exists() and checkout.outcome(LORA)["outcome"] == "ok", "the end")
    cluster.start_slurmd(node)
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    assert len(submitted(checkout.log)) == 2
    assert "resuming" not in _log(checkout)


def test_a_preempted_run_resumes_in_the_same_job(cluster, submit_to):
    checkout = submit_to(cluster, LONG)
    process = checkout.start(TARGET)
    wait_until(lambda: _has_checkpoint(checkout), "a checkpoint")
    job = _running(checkout)
    ask = ("-p", "urgent", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 5")
    urgent = cluster.run("sbatch", "--parsable", *ask).strip()
    wait_until(lambda: cluster.run("squeue", "-h", "-j", urgent, "-o", "%T").strip() == "RUNNING", "urgent work")
    assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    _resumed_by_slurm(checkout, job)


def test_a_run_on_a_node_that_dies_resumes_on_another(accounting_cluster, submit_to):
    checkout = submit_to(accounting_cluster, LONG)
    process = checkout.start(TARGET)
    wait_until(lambda: _has_checkpoint(checkout), "a checkpoint")
    job = _running(checkout)
    node = accounting_cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()
    accounting_cluster.fail_node(node)
    try:
        assert process.wait(timeout=LIMIT_S) == 0, checkout.log
    finally:
        accounting_cluster.start_slurmd(node)
    _resumed_by_slurm(checkout, job)
    rows = accounting_cluster.run("sacct", "-nXPD", "-j", job, "-o", "State,NodeList").split()
    assert rows[0] == f"NODE_FAIL|{node}"
    assert rows[1].startswith("COMPLETED|")
    assert node not in rows[1]


def _resumed_by_slurm(checkout, job: str) -> None:
    """The run went on after its checkpoint in the same job: Slurm had put it back into the queue, Snakemake had not."""
    assert "Restarts=1 " in checkout.cluster.run("scontrol", "show", "job", job)
    assert submitted(checkout.log)[-1] == job
    assert len(submitted(checkout.log)) == 2  # tokens and the run
    assert re.search(r"resuming after step \d+", _log(checkout))
    assert checkout.outcome(LORA)["outcome"] == "ok"
    assert _steps(checkout) == list(range(1500))


def test_what_lives_on_after_the_workflow_was_killed_is_not_computed_again(cluster, submit_to):
    checkout = submit_to(cluster, LONG)
    process = checkout.start(TARGET)
    wait_until(lambda: _has_checkpoint(checkout), "a checkpoint")
    process.kill()
    process.wait()
    lease = read_json(checkout.results / "unfinished" / LORA / "lease.json")
    assert lease["slurm_job_id"] == _running(checkout)
    # a second launcher of the same run, started by hand
    again = subprocess.run(
        [*_launcher(checkout)], cwd=checkout.root, env=checkout.environment(), capture_output=True, text=True
    )
    assert again.returncode == 1
    assert f"is being trained by Slurm job {lease['slurm_job_id']}" in again.stderr
    assert f"scancel {lease['slurm_job_id']}" in again.stderr
    assert checkout.snakemake("--unlock").returncode == 0
    refused = checkout.snakemake(TARGET)
    assert refused.returncode != 0
    assert f"scancel {lease['slurm_job_id']}" in refused.stdout + refused.stderr
    wait_until(lambda: not checkout.jobs(), "the end of the job")
    written = (checkout.root / TARGET).read_text()
    done = checkout.snakemake(TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout.root / TARGET).read_text() == written
    assert "resuming" not in _log(checkout)


def _launcher(checkout) -> list[str]:
    """The command line of the launcher that runs now, to be started once more."""
    (pid,) = [pid for pid in _processes(r"^python workflow/scripts/train_run\.py", checkout.root) if _rank(pid) is None]
    return [word.decode() for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]


@pytest.mark.parametrize("method", ["full"])
def test_a_run_over_two_nodes_is_trained_and_captured(cluster, submit_to, method):
    experiment = {"name": "nodes", "question": "Across nodes?", "profile": "torch"}
    experiment["fixed"] = {"method": method, "strategy": "ddp", "gpus": 2, "nodes": 2}
    checkout = submit_to(cluster, STUDY | {"experiments": [experiment]})
    (target,) = checkout.targets()
    run = Path(target).parent.name
    done = checkout.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr + _log(checkout, run)
    outcome = checkout.outcome(run)
    assert outcome["outcome"] == "ok", outcome["reason"]
    assert {
        int(row.split(",")[0]) for row in (checkout.root / target).with_name("steps.csv").read_text().split()[1:]
    } == {0, 1}
    capture = json.loads((checkout.results / "captures" / run / "capture.json").read_text())
    assert capture["outcome"] == "ok", capture["reason"]
    assert sorted(path.name for path in (checkout.results / "captures" / run).glob("capture.rank*.json")) == [
        "capture.rank0.json",
        "capture.rank1.json",
    ]
