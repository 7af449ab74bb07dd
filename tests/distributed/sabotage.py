"""Makes one rank of a run fail at a step, in the way that a test names. Runnable in place of the worker itself."""

import importlib
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

from tunemap.startup import quick_imports


def sabotage(rank: int, step: int, how: str) -> None:
    """Let this process fail as `how` says when it is `rank` and reaches `step`; rank -1 means every rank."""
    if rank not in (-1, int(os.environ.get("RANK", 0))):
        return
    with quick_imports():
        from tunemap.training import loop

    original, steps = loop.loss_sum, itertools.count()

    def failing_loss_sum(*arguments):
        if next(steps) == step:  # one forward pass per step, counted from this start of the process
            fail(how)
        return original(*arguments)

    loop.loss_sum = failing_loss_sum


def fail(how: str) -> None:
    """Note the time for tests that ask for it, and do the worst."""
    if "SABOTAGE_TIME" in os.environ:
        Path(os.environ["SABOTAGE_TIME"]).write_text(str(time.time()))
    if how == "out of memory":
        import torch

        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB "
            "of which 1.50 GiB is free."
        )
    if how == "exception":
        raise ValueError("the tokens of this rank are spoiled")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    raise AssertionError(how)


if __name__ == "__main__":
    sabotage(**json.loads(os.environ["SABOTAGE"]))
    worker = importlib.import_module(os.environ["SABOTAGED_WORKER"])
    sys.argv[0] = worker.__file__
    worker.main()
