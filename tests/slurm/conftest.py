"""Clusters, and checkouts that submit to them as a user would."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.workflow.conftest import STUDY, Checkout, make_checkout
from tunemap.study_file import load_plan

# For tests in which nothing needs to be learned: says where it ran, waits, and ends as `behaviour.json` tells.
STUB = Path(__file__).with_name("stub_train_run.py")
MAKE_FOLDER = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--destination") + 1])
folder.mkdir()
(folder / "model.safetensors").write_bytes(b"weights")
"""
FOR_TESTS = (  # the partition of the test clusters, and impatience
    ("slurm_partition: main ", "slurm_partition: gpu "),
    ("slurm-init-seconds-before-status-checks: 20", "slurm-init-seconds-before-status-checks: 5"),
    ("max-status-checks-per-second: 0.2", "max-status-checks-per-second: 10"),
    ("latency-wait: 60", "latency-wait: 5"),
)
LIMIT_S = 900.0  # hosts of continuous integration are slow now and then


@dataclass(frozen=True)
class SlurmCheckout(Checkout):
    """A checkout whose profile was edited as profiles/README.md says, for one of the test clusters."""

    cluster: Cluster

    def environment(self, **extra: str) -> dict[str, str]:
        mine = super().environment(**extra)
        programs = os.pathsep.join([str(Path(sys.executable).parent), self.cluster.environment["PATH"]])
        return mine | self.cluster.environment | {"PATH": programs}

    def command(self, *arguments: str) -> list[str]:
        """The literal command, with the study of the test."""
        return ["snakemake", *arguments, "--profile", "slurm", "--configfile", self.study_file.name]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Snakemake as a process of its own session, its messages in snakemake.log."""
        log = (self.root / "snakemake.log").open("ab")
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def targets(self) -> list[str]:
        """The outcomes of all runs but the row without fine-tuning."""
        runs = load_plan(self.study_file, data_root=str(self.root / "data")).runs.values()
        return [f"results/small/runs/{run.id}/outcome.json" for run in runs if not run.is_base]

    @property
    def log(self) -> str:
        return (self.root / "snakemake.log").read_text()

    def edit_profile(self, *replacements: tuple[str, str]) -> None:
        path = self.root / "profiles" / "slurm" / "config.yaml"
        text = path.read_text()
        for before, after in replacements:
            assert before in text, before
            text = text.replace(before, after, 1)
        path.write_text(text)

    def behave(self, **of_runs: dict) -> None:
        """Put the stub in the place of training, with what each run (by the name of its method) shall do."""
        scripts = self.root / "workflow" / "scripts"
        (scripts / "train_run.py").write_text(STUB.read_text())
        for name in ("prepare_model", "prepare_dataset", "tokenize_dataset"):
            (scripts / f"{name}.py").write_text(MAKE_FOLDER)
        (self.root / "behaviour.json").write_text(json.dumps(of_runs))

    def reports(self) -> list[dict]:
        """What each start of the stub said, in the order of their starts."""
        found = [json.loads(path.read_text()) for path in (self.root / "stub").glob("*.json")]
        return sorted(found, key=lambda one: one["began"])

    def jobs(self) -> dict[str, str]:
        """State of each job in the queue by its comment."""
        rows = self.cluster.run("squeue", "-h", "-o", "%k %T").splitlines()
        return dict(row.rsplit(" ", 1) for row in rows)


@pytest.fixture(scope="session")
def cluster():
    """Two nodes of 4 GPUs, no accounting."""
    yield from _running(accounting=False)


@pytest.fixture(scope="session")
def accounting_cluster():
    """Two nodes of 4 GPUs, with slurmdbd."""
    yield from _running(accounting=True)


def _running(*, accounting: bool):
    if reason := why_not(accounting=accounting):
        pytest.skip(reason)
    cluster = Cluster(accounting=accounting)
    yield cluster
    cluster.stop()


@pytest.fixture
def submit_to(repository, tmp_path) -> Callable[..., SlurmCheckout]:
    """A fresh checkout with a study, for a cluster."""

    def make(cluster: Cluster, study: dict = STUDY, *, profile: tuple[tuple[str, str], ...] = ()) -> SlurmCheckout:
        checkout = SlurmCheckout(make_checkout(repository, tmp_path / "checkout", study).root, cluster)
        checkout.edit_profile(*FOR_TESTS, *profile)
        return checkout

    return make


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Look ten times a second until `condition` holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s:g} s"
        time.sleep(0.1)


def submitted(output: str) -> list[str]:
    """Slurm job ids in Snakemake's messages."""
    return re.findall(r"submitted with SLURM jobid (\d+)", output)
