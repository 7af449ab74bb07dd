"""Who trains beside us, where they are installed, and how they take turns.

On a CPU all train at the same time: a contestant rests (SIGSTOP, sent by itself) at the end of each of its turns and is
woken when it is its turn again. What it leaves is read when its work is over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contestants.workload import Workload

from tunemap.training.launch import KEEP_FREED_MEMORY

HERE = Path(__file__).resolve().parent

OWN, RECOMMENDED = "tunemap", "tunemap, recommended"
PEFT_URL, PEFT_REPOSITORY = "https://github.com/huggingface/peft", "peft-repository"  # and where its clone lies
PEFT_COMMIT = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
NOT_INSTALLED = "not installed; make peers-install"


@dataclass(frozen=True)
class Contestant:
    """A script of benchmarks/contestants, the environment it runs in (None: ours), whether its labels are the same.

    arguments: more words for its command line.
    """

    script: str
    requirements: tuple[str, ...] | None = None
    same_labels: bool = True
    arguments: tuple[str, ...] = ()


COMMON = ("torch==2.13.0", "numpy==2.4.6", "peft==0.21.2", "accelerate==1.15.0")  # to all environments
CONTESTANTS = {
    OWN: Contestant("tunemap_loop.py", arguments=("run.json",)),
    RECOMMENDED: Contestant("tunemap_loop.py", arguments=("recommended.json",)),
    "trainer": Contestant("hf_trainer.py"),
    "trl": Contestant("trl_sft.py", ("trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0", *COMMON)),
    "peft": Contestant("peft_comparison.py", same_labels=False),
    "optimum-benchmark": Contestant(
        "optimum_bench.py",
        ("optimum-benchmark==0.6.0", "transformers==4.57.6", "datasets==5.0.1", *COMMON),  # it needs transformers < 5
        same_labels=False,
    ),
}


def install(environments: Path, names: list[str]) -> None:
    """Make the environments of the peers that need one, and fetch PEFT's repository at its commit for its loop."""
    for name in names:
        requirements = CONTESTANTS[name].requirements
        if requirements is None:
            continue
        place = environments / name
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)
    repository = environments / PEFT_REPOSITORY
    if "peft" in names and not repository.exists():
        git = ["git", "-C", repository]
        fetch = [*git, "fetch", "--quiet", "--depth=1", PEFT_URL, PEFT_COMMIT]
        subprocess.run(["git", "init", "--quiet", repository], check=True)
        if subprocess.run(fetch).returncode:
            shutil.rmtree(repository)
            sys.exit(
                f"no {PEFT_URL} from here; put a clone of it, at commit {PEFT_COMMIT}, at {repository}, or leave out "
                "peft with --peers"
            )
        subprocess.run([*git, "checkout", "--quiet", "FETCH_HEAD"], check=True)


def is_installed(name: str, environments: Path) -> bool:
    """Whether what a contestant starts from is there; what an environment lacks, its start tells."""
    needed = [python_of(name, environments), *([environments / PEFT_REPOSITORY] if name == "peft" else [])]
    return all(path.exists() for path in needed)


def command_of(name: str, folder: Path, result: Path, environments: Path) -> list[str | Path]:
    """What starts a contestant on the workload in `folder`."""
    contestant = CONTESTANTS[name]
    script = HERE / "contestants" / contestant.script
    return [python_of(name, environments), script, folder, result, *contestant.arguments]


def python_of(name: str, environments: Path) -> Path:
    """The Python that a contestant starts in."""
    return environments / name / "bin" / "python" if CONTESTANTS[name].requirements else Path(sys.executable)


def one_gpu(known: Mapping[str, str]) -> dict[str, str]:
    """The variables that show a process the first of the GPUs that `known` variables show, and no other.

    The Trainer, and TRL with it, spreads a model over all GPUs that it sees (nn.DataParallel) and gives each of them a
    batch; ours trains on one.
    """
    given = known.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the driver's first, not the fastest
    return {"CUDA_VISIBLE_DEVICES": given.partition(",")[0].strip()}


def environment_of(name: str, work: Workload, environments: Path, *, everywhere: bool = False) -> dict[str, str]:
    """The environment in which a contestant runs; `everywhere` gives our launcher's allocator to all."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(work.threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= one_gpu(os.environ) if work.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    if name in (OWN, RECOMMENDED) or everywhere:
        quiet |= KEEP_FREED_MEMORY  # as our launcher starts its workers
    return os.environ | threads | quiet | {"PEFT_REPOSITORY": str(environments / PEFT_REPOSITORY)}


def race(names: list[str], folder: Path, environments: Path, *, everywhere: bool) -> dict[str, dict[str, Any]]:
    """Run each contestant once, all in turns: tokens per second by our stopwatch and by their account, and losses.

    One that is not installed has an error in place of them, as one that fails.
    """
    work = Workload.load(folder)
    absent = {name: {"error": NOT_INSTALLED} for name in names if not is_installed(name, environments)}
    with tempfile.TemporaryDirectory() as scratch:
        started: dict[str, subprocess.Popen[bytes]] = {}
        waiting = [name for name in names if name not in absent]
        try:
            while waiting:
                for name in waiting:
                    if name in started:
                        started[name].send_signal(signal.SIGCONT)
                    else:
                        place = Path(scratch) / name
                        place.mkdir()
                        known = environment_of(name, work, environments, everywhere=everywhere)
                        started[name] = _start(
                            command_of(name, folder, place / "result.json", environments), known, place
                        )
                    _until_it_rests(started[name])
                waiting = [name for name in reversed(waiting) if started[name].returncode is None]
        finally:
            for process in started.values():
                process.kill()
        return {name: absent.get(name) or _read(Path(scratch) / name, work) for name in names}


def _start(command: list[str | Path], environment: dict[str, str], place: Path) -> subprocess.Popen[bytes]:
    with (place / "output").open("w") as output:
        return subprocess.Popen(command, env=environment, cwd=place, stdout=output, stderr=subprocess.STDOUT)


def _until_it_rests(process: subprocess.Popen[bytes]) -> None:
    """Wait until a contestant's turn is over, or its work."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)


def _read(place: Path, work: Workload) -> dict[str, Any]:
    """What a contestant left."""
    result = place / "result.json"
    if not result.exists():
        said = (place / "output").read_text()
        print(said, file=sys.stderr)
        return {"error": (said.strip().splitlines() or ["no message"])[-1]}
    known: dict[str, Any] = json.loads(result.read_text())
    if not np.isfinite(known["losses"]).all():
        return {"error": "a loss is no number"}
    wall_s, cpu_s = np.transpose(known.pop("turns_wall_and_cpu_s")) / work.steps_per_turn
    return known | {"tokens_per_second": work.tokens_per_step / wall_s.mean(), "wall_s": wall_s, "cpu_s": cpu_s}


def orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The names in another order each round."""
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        yield order if turn % 2 == 0 else order[::-1]
