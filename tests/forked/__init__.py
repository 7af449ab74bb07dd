"""Processes forked from one server that has imported torch, transformers and peft, for tests that run many workers.

What runs in them is what the launcher starts. A worker imports for seconds and trains a tiny model for half of one.
"""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

WORKER = ["-m", "tunemap.training.worker"]


def start_server(repository: Path) -> None:
    """Start the server, unless it runs; it computes nothing, for threads do not survive a fork."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in (str(repository / "src"), str(repository)) if path not in known]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, [*paths, *known]))}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.forked.preload"])


def fork(target: Any, *arguments: Any) -> BaseProcess:
    """Run a function in a process of the server; it ends with this one at the latest."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


class Popen:
    """What the launcher needs of `subprocess.Popen`, for a run of one process; several are left to torchrun."""

    def __new__(cls, command: list[str], **options: Any) -> Any:
        return super().__new__(cls) if command[1:3] == WORKER else subprocess.Popen(command, **options)

    def __init__(self, command: list[str], *, env: dict[str, str], start_new_session: bool) -> None:
        assert start_new_session
        self._process = fork(_work, command[3:], env)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode


def _work(arguments: list[str], environment: dict[str, str]) -> None:
    """Be a worker, as if started with these arguments and this environment."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    from tunemap.training import worker

    sys.argv = [worker.__file__, *arguments]
    worker.main()
