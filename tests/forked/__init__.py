"""Processes forked from one server that has imported torch, transformers and peft, for tests that run many workers.

What runs in them is what the launcher starts. A worker imports for seconds and trains a tiny model for half of one.
"""

import multiprocessing
import os
import runpy
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


def popen(command: list[str], *, env: dict[str, str], start_new_session: bool) -> Any:
    """`subprocess.Popen` as the launcher calls it; a run of one process is forked, several are left to torchrun."""
    if command[1:3] == WORKER and start_new_session:
        return _Forked(command[3:], env)
    return subprocess.Popen(command, env=env, start_new_session=start_new_session)


class _Forked:
    """What the launcher needs of a `subprocess.Popen`."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._process = fork(_work, arguments, environment)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode


def _work(arguments: list[str], environment: dict[str, str]) -> None:
    """Be a worker, as if started with these arguments and this environment."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for folder in environment["PYTHONPATH"].split(os.pathsep):
        if (customised := Path(folder) / "sitecustomize.py").exists():  # Python runs the first when it starts
            runpy.run_path(str(customised))
            break
    from tunemap.training import worker

    sys.argv = [worker.__file__, *arguments]
    worker.main()
