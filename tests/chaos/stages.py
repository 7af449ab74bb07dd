"""A study of seconds as a list of commands, each run in a forked process that can be made to fail at a chosen point.

Forked from one process that has imported torch once, a stage takes a fraction of a second, so that hundreds of faults
fit into minutes. What runs is the script of the stage, and in its processes the worker that it starts; only the start
of an interpreter is left out.
"""

import errno
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests import small_study
from tunemap.frozen import FrozenPlan, freeze
from tunemap.study_file import load_plan

REPOSITORY = Path(__file__).resolve().parents[2]
RUN, RESULTS = "small.arithmetic.lora.seed-0", "results/small"
STUDY = small_study.STUDY | {
    "methods": {"lora": {"kind": "lora", "rank": 2}},
    "defaults": small_study.STUDY["defaults"] | {"logging_steps": 2, "checkpoint_steps": 2, "max_new_tokens": 8},
    "experiments": [{"name": "methods", "question": "?", "vary": {"method": ["lora"]}, "profile": "torch"}],
    "hardware": {"device": "cpu"},
}
STAGES = (
    "prepare_model",
    "prepare_dataset",
    "tokenize_dataset",
    "train_run",
    "evaluate_run",
    "capture_run",
    "extract_facts",
    "make_tables",
    "make_figures",
    "make_report",
)
WITH_WORKERS = ("train_run", "evaluate_run", "capture_run")
LIMIT_S = 120.0


@dataclass(frozen=True)
class Fault:
    """What happens to one process at its n-th change of a file below the study's folder."""

    how: str  # killed; what the disk says: ENOSPC, EROFS, EDQUOT, EIO; or `clock` and the seconds by which it is set
    at: int
    where: str  # stage, or worker


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    code: int  # as waitstatus_to_exitcode gives it: negative for a signal
    output: str
    changes: dict[str, int]  # changes of files, by process: stage, worker


class Study:
    """One copy of the study's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def plan(self) -> FrozenPlan:
        values = json.loads((self.root / "plan" / "names.json").read_text())
        return FrozenPlan(values[0], values[1], json.loads((self.root / values[0]).read_text()))

    def make(self) -> None:
        """Write the study file, its data and its frozen plan."""
        from tunemap import corpora

        (self.root / "data" / "qwen2").mkdir(parents=True)
        (self.root / "data" / "qwen2" / "config.json").write_text(json.dumps(small_study.ARCHITECTURE))
        corpora.build_arithmetic_tokenizer().save_pretrained(self.root / "data" / "tokenizer")
        (self.root / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
        before = os.getcwd()
        os.chdir(self.root)
        try:
            plan = freeze(load_plan(Path("study.yaml")), Path("plan"), {})
        finally:
            os.chdir(before)
        (self.root / "plan" / "names.json").write_text(json.dumps([plan.report_file, plan.tables_file]))

    def copy(self, root: Path) -> "Study":
        """An independent copy; hard links would carry damage over."""
        shutil.copytree(self.root, root, symlinks=True)
        return Study(root)

    def paths(self) -> dict[str, str]:
        """The folders of the study, relative to its root."""
        run = self.plan.runs[RUN]
        return {
            "model": f"results/shared/models/{run.model_key}",
            "dataset": f"results/shared/datasets/{run.dataset_key}",
            "tokens": f"results/shared/tokens/{run.tokens_key}",
            "run": f"{RESULTS}/runs/{RUN}",
            "work": f"{RESULTS}/unfinished/{RUN}",
            "evaluation": f"{RESULTS}/evaluations/{RUN}",
            "capture": f"{RESULTS}/captures/{RUN}",
            "facts": f"{RESULTS}/facts/{RUN}",
            "tables": f"{RESULTS}/tables",
            "figures": f"{RESULTS}/figures",
            "report": f"{RESULTS}/report.html",
        }

    def outputs(self, stage: str) -> list[str]:
        """What a stage makes, relative to the root."""
        paths = self.paths()
        names = dict(
            zip(
                STAGES,
                ("model", "dataset", "tokens", "run", "evaluation", "capture", "facts", "tables", "figures", "report"),
                strict=True,
            )
        )
        return [paths[names[stage]]]

    def arguments(self, stage: str) -> list[str]:
        """The command line of a stage, as its rule has it."""
        plan, paths = self.plan, self.paths()
        run = plan.runs[RUN]
        trained = ["--outcome", f"{paths['run']}/outcome.json"]
        places = ["--model", paths["model"], "--tokens", paths["tokens"]]
        tables = ["--plan", plan.tables_file, "--results", RESULTS]
        lines: dict[str, list[str]] = {
            "prepare_model": ["--spec", plan.model_spec(run.model_key), "--data-root", "data",
                              "--destination", paths["model"]],
            "prepare_dataset": ["--spec", plan.dataset_spec(run.dataset_key), "--destination", paths["dataset"]],
            "tokenize_dataset": ["--spec", plan.tokens_spec(run.tokens_key), "--model", paths["model"],
                                 "--dataset", paths["dataset"], "--destination", paths["tokens"]],
            "train_run": ["--spec", plan.training_spec(RUN), "--device", "cpu", *places, "--dataset", paths["dataset"],
                          "--work", paths["work"], "--weights", f"{paths['run']}/weights",
                          "--steps", f"{paths['run']}/steps.csv", *trained],
            "evaluate_run": ["--spec", plan.evaluation_spec(RUN), "--device", "cpu", *places, *trained,
                             "--weights", f"{paths['run']}/weights", "--work", paths["work"],
                             "--evaluation", f"{paths['evaluation']}/evaluation.json",
                             "--predictions", f"{paths['evaluation']}/predictions.jsonl"],
            "capture_run": ["--spec", plan.training_spec(RUN), "--device", "cpu", *places, *trained,
                            "--folder", paths["capture"]],
            "extract_facts": ["--capture", paths["capture"], "--facts", paths["facts"]],
            "make_tables": tables,
            "make_figures": [*tables, "--figures", paths["figures"]],
            "make_report": ["--plan", plan.report_file, "--results", RESULTS, "--output", paths["report"]],
        }  # fmt: skip
        return lines[stage]

    def run(self, stage: str, fault: Fault | None = None, spoil: Callable[[], None] | None = None) -> Ended:
        """Run a stage to its end; `fault` strikes one of its processes, `spoil` is called in each worker first."""
        log, counts = self.root / "log.txt", self.root / "counts"
        shutil.rmtree(counts, ignore_errors=True)
        counts.mkdir()
        pid = os.fork()
        if pid == 0:
            _be_a_stage(self, stage, fault, spoil, log, counts)
        code = _wait(pid)
        changes = {path.name: len(path.read_bytes()) for path in counts.iterdir()}
        return Ended(code, log.read_text(errors="replace"), changes)


def stray_processes(grace_s: float = 3.0) -> list[str]:
    """Descendants of this process that outlive the stage that they belong to, ended here after being counted."""
    deadline = time.monotonic() + grace_s
    while True:
        living = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)
                elif not any("resource_tracker" in word or "forkserver" in word for word in process.cmdline()):
                    living.append(process)
            except (psutil.NoSuchProcess, ChildProcessError):
                continue
        if not living or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for process in living:
        process.kill()
    return [str(process) for process in living]


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def preload() -> None:
    """Import once what the stages need; compute nothing, for threads do not survive a fork."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    for name in (
        "bitsandbytes", "peft", "seaborn", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
        "transformers.models.qwen2.modeling_qwen2", "tunemap.data.sources", "tunemap.data.tokens", "tunemap.evaluate",
        "tunemap.evaluation", "tunemap.models.random", "tunemap.training.launch", "tunemap.training.worker",
        "tunemap.training.assemble", "tunemap.training.checkpoint", "tunemap.training.observe",
        "tunemap.training.weights", "tunemap.capture.launch", "tunemap.capture.worker", "tunemap.capture.extract",
        "tunemap.collect", "tunemap.report.figures", "tunemap.report.page",
    ):  # fmt: skip
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("qwen2")


# --- inside of the forked process ---------------------------------------------------------------------------


def _be_a_stage(
    study: Study, stage: str, fault: Fault | None, spoil: Callable[[], None] | None, log: Path, counts: Path
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setsid()
    os.chdir(study.root)
    subprocess.Popen = _forking_popen(fault, spoil, counts)  # type: ignore[misc, assignment]
    script = REPOSITORY / "workflow" / "scripts" / f"{stage}.py"
    sys.argv = [str(script), *study.arguments(stage)]
    _strike(fault, "stage", counts)
    _leave(lambda: runpy.run_path(str(script), run_name="__main__"))


def _leave(run: Callable[[], Any]) -> None:
    code = 0
    try:
        run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_REFUSED = {"open", "os.mkdir", "os.link", "os.symlink"}  # what a full disk does not allow


def _strike(fault: Fault | None, where: str, counts: Path) -> None:
    """Count the changes of files of this process, and let the fault happen at its number; a hook cannot be removed."""
    own, seen = os.getpid(), 0
    counter = os.open(counts / where, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    root = str(Path.cwd())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in _CHANGES
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not changes or os.getpid() != own or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(arguments[0]))
        if not isinstance(path, str) or not path.startswith(root + os.sep + "results"):
            return
        seen += 1
        os.write(counter, b".")
        if fault is None or fault.where != where or seen <= fault.at:
            return
        if fault.how == "killed":
            os.kill(own, signal.SIGKILL)
        if fault.how.startswith("clock"):
            if seen == fault.at + 1:
                _set_clock(float(fault.how.split()[1]))
            return
        if event in _REFUSED or fault.how == "EROFS":
            number = getattr(errno, fault.how)
            raise OSError(number, os.strerror(number), str(arguments[0]))

    sys.addaudithook(hook)


def _set_clock(seconds: float) -> None:
    """Let this process find its wall clock set by so much."""
    original = time.time
    time.time = lambda: original() + seconds

    class Jumped(datetime):
        """What the package asks for the time."""

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    for name, module in list(sys.modules.items()):
        if name.startswith("tunemap.") and getattr(module, "datetime", None) is datetime:
            module.datetime = Jumped  # type: ignore[attr-defined]


def _forking_popen(fault: Fault | None, spoil: Callable[[], None] | None, counts: Path) -> Any:
    original = subprocess.Popen

    class ForkingPopen(original):  # type: ignore[type-arg, misc, valid-type]
        """Forks for a worker of this package, starts anything else as ever."""

        def __new__(cls, command: Any, **options: Any) -> Any:
            if isinstance(command, list) and command[1:2] == ["-m"] and command[2].startswith("tunemap."):
                return _Forked(command, fault, spoil, counts, **options)
            return original(command, **options)

    return ForkingPopen


class _Forked:
    """A worker in a forked process, with what the launchers use of `subprocess.Popen`."""

    def __init__(
        self,
        command: list[str],
        fault: Fault | None,
        spoil: Callable[[], None] | None,
        counts: Path,
        env: dict[str, str],
        start_new_session: bool = False,
        **_: Any,
    ) -> None:
        self.returncode: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            return
        if start_new_session:
            os.setsid()
        os.environ.clear()
        os.environ |= env
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        from tunemap.training import worker

        worker._environment = lambda *_: {}  # type: ignore[assignment]  # asks git and nvidia-smi, in vain here
        _strike(fault, "worker", counts)
        if spoil:
            spoil()
        if os.getppid() != parent:
            os._exit(1)
        sys.argv = command[2:]
        _leave(importlib.import_module(command[2]).main)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 3600.0)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 3600.0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + LIMIT_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
