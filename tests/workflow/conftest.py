"""A copy of the checkout with a study of seconds, run once by real Snakemake; tests look at it or at copies of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.small_study import ARCHITECTURE, STUDY
from tunemap import corpora

LEFT_BEHIND = shutil.ignore_patterns(
    ".git",
    ".venv",
    "environments",
    "results",
    "logs",
    ".snakemake",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
)
FULL, LORA = "small.arithmetic.full.seed-0", "small.arithmetic.lora.seed-0"
BASE = "small.arithmetic.base"
SECRETS = {  # planted in the environment of the finished study
    "HF_TOKEN": "hf_planted_b0a1",
    "WANDB_API_KEY": "wandb-planted-b0a2",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+b0a3",
    "TUNEMAP_TEST_PASSWORD": "planted-b0a4",
}


@dataclass(frozen=True)
class Checkout:
    """A working copy in which Snakemake is run as a user runs it."""

    root: Path

    @property
    def study_file(self) -> Path:
        return self.root / "study.yaml"

    @property
    def results(self) -> Path:
        return self.root / "results" / "small"

    def study(self) -> dict:
        return yaml.safe_load(self.study_file.read_text())

    def write_study(self, study: dict) -> None:
        self.study_file.write_text(yaml.safe_dump(study, sort_keys=False))

    def environment(self, **extra: str) -> dict[str, str]:
        """A user's, in which Python keeps what it compiled: the sources of a new checkout have to be compiled once."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("TUNEMAP_")}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | extra

    def command(self, *arguments: str) -> list[str]:
        profile = ["--profile", "profiles/local", "--configfile", self.study_file.name]
        return [sys.executable, "-m", "snakemake", *arguments, *profile]

    def snakemake(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.root, env=self.environment(**extra), capture_output=True, text=True
        )

    def interrupt_after_first(self, outcomes: list[Path], **extra: str) -> None:
        """Start Snakemake and press Ctrl-C as soon as the first of these runs has ended."""
        process = subprocess.Popen(
            self.command(),
            cwd=self.root,
            env=self.environment(**extra),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        try:
            deadline = time.monotonic() + 300
            while not any(map(is_final, outcomes)):
                assert process.poll() is None, "the workflow ended before it could be interrupted"
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process in the foreground
            assert process.wait(timeout=120) != 0
        finally:
            process.kill()
            process.wait()

    def planned(self) -> set[str]:
        """Jobs that a dry run plans, as `rule` or `rule run-id`, without the final target."""
        done = self.snakemake("--dry-run", TUNEMAP_PLANNING="off")
        assert done.returncode == 0, done.stdout + done.stderr
        text = done.stdout + done.stderr
        jobs = re.split(r"^(?:local)?rule ", text, flags=re.MULTILINE)[1:]
        planned = set()
        for job in jobs:
            run = re.search(r"wildcards:.*?run=([^,\s]+)", job)
            planned.add(job.split(":")[0] + (f" {run[1]}" if run else ""))
        return planned - {"all"}

    def outcome(self, run: str) -> dict:
        return json.loads((self.results / "runs" / run / "outcome.json").read_text())


def _heed_interrupts() -> None:
    """A suite that was started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_final(outcome: Path) -> bool:
    """Whether a run has ended; while it trains, its outcome says what is true if nobody writes another."""
    return outcome.exists() and json.loads(outcome.read_text())["outcome"] == "ok"


def make_checkout(repository: Path, root: Path, study: dict = STUDY) -> Checkout:
    """A fresh copy of the checkout at `root`, with the study and the data it names."""
    shutil.copytree(repository, root, ignore=LEFT_BEHIND, symlinks=True)
    (root / "data" / "qwen2").mkdir(parents=True)
    (root / "data" / "qwen2" / "config.json").write_text(json.dumps(ARCHITECTURE))
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "data" / "tokenizer")
    checkout = Checkout(root)
    checkout.write_study(study)
    return checkout


@pytest.fixture(scope="session")
def modules_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("modules")


@dataclass(frozen=True)
class Interrupted:
    """A study that was stopped by Ctrl-C; `ended` is what the runs' outcomes said then, of those that had ended."""

    checkout: Checkout
    environment: dict[str, str]
    ended: dict[str, str]


@pytest.fixture(scope="session")
def interrupted(repository, tmp_path_factory, modules_folder) -> Interrupted:
    """The study when the first of its two trainings has ended."""
    checkout = make_checkout(repository, tmp_path_factory.mktemp("finished") / "checkout")
    recorder = repository / "tests" / "workflow" / "record_modules"
    environment = {"PYTHONPATH": str(recorder), "TUNEMAP_RECORD_MODULES": str(modules_folder), **SECRETS}
    outcomes = {run: checkout.results / "runs" / run / "outcome.json" for run in (FULL, LORA)}
    checkout.interrupt_after_first(list(outcomes.values()), **environment)
    ended = {run: path.read_text() for run, path in outcomes.items() if is_final(path)}
    return Interrupted(checkout, environment, ended)


@pytest.fixture(scope="session")
def finished(interrupted) -> Checkout:
    """The study after a complete run, which took two starts; do not change it."""
    done = interrupted.checkout.snakemake(**interrupted.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return interrupted.checkout


@pytest.fixture
def copy(finished, tmp_path) -> Checkout:
    """A copy of the finished study, metadata and times included, to edit."""
    shutil.copytree(finished.root, tmp_path / "checkout", symlinks=True)
    return Checkout(tmp_path / "checkout")
