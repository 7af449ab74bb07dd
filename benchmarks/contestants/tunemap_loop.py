"""TuneMap's own worker, as its launcher starts it: python tunemap_loop.py WORKLOAD_FOLDER RESULT_FILE RUN_FILE.

The run file is one of the folder.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

from workload import Stopwatch, Workload

from tunemap.training import worker
from tunemap.training.heartbeat import Heartbeat


def main() -> None:
    """Train, with a stopwatch at the sign of life that the loop gives at the end of each step."""
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    work = Workload.load(folder)
    watch = Stopwatch(result, work)
    beat = Heartbeat.beat

    def timed(self: Heartbeat, step: int, phase: str) -> None:
        if phase == "data" and step > 0:  # the beginning of a step is the end of the one before
            watch.step_ended()
        beat(self, step, phase)

    def stop(self: Heartbeat) -> None:
        watch.step_ended()

    Heartbeat.beat, Heartbeat.stop = timed, stop  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv[1:] = arguments_of(folder, sys.argv[3], work.device, Path(scratch))
        job = worker._parse(sys.argv[1:])
        worker._train(job, worker.Progress(job.work, is_main=True))
        watch.save(**_own(Path(scratch)))


def arguments_of(folder: Path, run_file: str, device: str, scratch: Path) -> list[str]:
    """What the launcher tells its worker; a checkpoint, of which there is none, would be nobody's."""
    given = {"run-file": folder / run_file, "device": device, "checkpoint-identity": "peers"}
    given |= {name: folder / name for name in ("model", "dataset", "tokens")}
    given |= {"work": scratch, "weights": scratch / "weights"}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def _own(work: Path) -> dict[str, Any]:
    with (work / "steps.rank0.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["measured"] == "1"]
    seconds = sum(float(row["step_time_s"]) for row in measured)
    tokens = sum(int(row["real_tokens"]) for row in measured)
    return {"losses": [float(row["loss"]) for row in rows], "own_tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    main()
