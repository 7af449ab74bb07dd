"""What the Slurm profile and the rules ask for, as a dry run of the literal command prints it; needs no Slurm."""

import re
import subprocess

import pytest
import yaml

from tests.workflow.conftest import FULL, STUDY, make_checkout
from tunemap.training.devices import visible_gpu_count

SLURM_DRY_RUN = ["snakemake", "--dry-run", "--profile", "slurm", "--configfile", "study.yaml"]
NO_TABLE = {"TUNEMAP_PLANNING": "off"}  # of predictions, which take seconds
NODES = {"strategy": "ddp", "gpus": 8, "nodes": 2, "threads_per_process": 3}


def test_jobs_ask_for_what_their_runs_need(repository, tmp_path):
    experiments = [
        {"name": "one", "question": "?", "fixed": {"method": "full", "time_limit_minutes": 100.0}}
        | {"profile": "auto", "roofline": True, "inference": True},
        {"name": "nodes", "question": "?", "fixed": {"method": "lora"} | NODES},
    ]
    study = STUDY | {"hardware": {"device": "cuda"}, "experiments": experiments}
    checkout = make_checkout(repository, tmp_path / "checkout", study)
    profile = checkout.root / "profiles" / "slurm" / "config.yaml"
    profile.write_text(profile.read_text().replace("runtime: 120 ", "runtime: 7 "))  # of rules that say nothing
    done = subprocess.run(
        SLURM_DRY_RUN,
        cwd=checkout.root,
        env=checkout.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = requests_of(done.stdout + done.stderr)
    (kernels,) = [needed for (rule, _), needed in asked.items() if rule == "measure_kernels"]
    assert (kernels["gpu"], kernels["nodes"]) == ("1", "1")
    single = asked["train", "small.arithmetic.full.time_limit_minutes-100.0.seed-0"]
    assert {key: single[key] for key in ("gpu", "nodes", "runtime", "slurm_partition")} == {
        "gpu": "1",
        "nodes": "1",
        "runtime": "120",
        "slurm_partition": "main",
    }
    assert not {"mpi", "tasks", "gres"} & set(single)  # with any of them the plugin starts something else
    name = next(run for rule, run in asked if rule == "train" and "nodes-2" in run)
    several = asked["train", name]
    assert {key: several[key] for key in ("gres", "nodes", "tasks", "mpi")} == {
        "gres": "gpu:4",
        "nodes": "2",
        "tasks": "2",
        "mpi": "srun",
    }
    assert "gpu" not in several
    assert {key: asked["evaluate", name][key] for key in ("gpu", "runtime", "attempts_left")} == {
        "gpu": "4",
        "runtime": "120",
        "attempts_left": "1",
    }
    assert next(needed["runtime"] for (rule, _), needed in asked.items() if rule == "measure_inference") == "120"
    assert kernels["runtime"] == "7"
    assert asked["train", "small.arithmetic.base"]["gpu"] == "0"


@pytest.mark.skipif(visible_gpu_count() > 0, reason="is about machines without a GPU")
def test_what_auto_is_where_no_gpu_is_seen_depends_on_where_jobs_go(repository, tmp_path):
    first, *others = STUDY["experiments"]
    study = STUDY | {"hardware": {"device": "auto"}, "experiments": [first | {"inference": True}, *others]}
    checkout = make_checkout(repository, tmp_path / "checkout", study)
    here = checkout.snakemake("--dry-run", "--cores", "3", **NO_TABLE)
    environment = checkout.environment(**NO_TABLE)
    there = subprocess.run(SLURM_DRY_RUN, cwd=checkout.root, env=environment, capture_output=True, text=True)
    asked_here, asked_there = (requests_of(done.stdout + done.stderr) for done in (here, there))
    for rule in ("train", "capture", "measure_inference"):  # what is timed on this CPU has it to itself
        assert (asked_here[rule, FULL]["threads"], asked_here[rule, FULL]["gpu"]) == ("3", "0")
        assert asked_there[rule, FULL]["gpu"] == "1"
    assert "threads" not in asked_here["evaluate", FULL]


def requests_of(dry_run: str) -> dict[tuple[str, str], dict[str, str]]:
    """Resources and threads (where they are not 1) by rule and run, as a dry run prints them."""
    asked = {}
    for job in re.split(r"^(?:local)?rule ", dry_run, flags=re.MULTILINE)[1:]:
        found = re.search(r"^    resources: (.*)$", job, flags=re.MULTILINE)
        threads = re.search(r"^    threads: (.*)$", job, flags=re.MULTILINE)
        run = re.search(r"wildcards:.*?run=([^,\s]+)", job)
        requested = dict(part.split("=") for part in found[1].split(", "))
        asked[job.split(":")[0], run[1] if run else ""] = requested | ({"threads": threads[1]} if threads else {})
    return asked


def test_every_key_of_the_profiles_has_its_reason(repository):
    for name in ("slurm", "local"):
        text = (repository / "profiles" / name / "config.yaml").read_text()
        assert yaml.safe_load(text)
        lines = text.splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if re.match(r"[a-z]", line):
                assert before.startswith("#") or "#" in line, line
