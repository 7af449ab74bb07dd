"""A workflow that is stopped in the middle goes on where it was."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from .conftest import BASE, FULL, LORA

NEW_RUNS = [run.replace("seed-0", "seed-1") for run in (FULL, LORA)]


def _heed_interrupts() -> None:
    """A suite that was started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_final(outcome: Path) -> bool:
    """Whether a run has ended; while it trains, its outcome says what is true if nobody writes another."""
    return outcome.exists() and json.loads(outcome.read_text())["outcome"] == "ok"


def test_interrupted_study_finishes_without_repeating_runs(copy):
    checkout, study = copy, copy.study()  # model and data are prepared; two runs with another seed are to be trained
    del study["experiments"][0]["profile"]
    checkout.write_study(study | {"experiments": [one | {"seeds": [1]} for one in study["experiments"]]})
    (checkout.results / "report.html").unlink()
    process = subprocess.Popen(
        checkout.command(),
        cwd=checkout.root,
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    outcomes = [checkout.results / "runs" / run / "outcome.json" for run in NEW_RUNS]
    deadline = time.monotonic() + 300
    while not any(map(_is_final, outcomes)) and time.monotonic() < deadline:
        assert process.poll() is None, "the workflow ended before it could be interrupted"
        time.sleep(0.1)
    first = {path: path.read_text() for path in outcomes if _is_final(path)}
    assert first
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process in the foreground
    assert process.wait(timeout=120) != 0
    assert not all(map(_is_final, outcomes))

    done = checkout.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    for path, written in first.items():  # Snakemake may not have seen the end of the job, and runs it once more
        assert path.read_text() == written, f"{path} was computed again"
    assert {checkout.outcome(run)["outcome"] for run in (*NEW_RUNS, BASE)} == {"ok"}
    assert (checkout.results / "report.html").exists()
