"""A workflow that is stopped in the middle goes on where it was."""

import signal
import subprocess
import time

from .conftest import BASE, FULL, LORA, make_checkout


def test_interrupted_study_finishes_without_repeating_runs(repository, tmp_path):
    checkout = make_checkout(repository, tmp_path / "checkout")
    process = subprocess.Popen(
        checkout.command(),
        cwd=checkout.root,
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    outcomes = [checkout.results / "runs" / run / "outcome.json" for run in (FULL, LORA)]
    deadline = time.monotonic() + 300
    while not any(path.exists() for path in outcomes) and time.monotonic() < deadline:
        assert process.poll() is None, "the workflow ended before it could be interrupted"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    first = {path: path.stat().st_mtime_ns for path in outcomes if path.exists()}
    assert first

    done = checkout.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    for path, written in first.items():
        assert path.stat().st_mtime_ns == written, f"{path} was computed again"
    assert {checkout.outcome(run)["outcome"] for run in (FULL, LORA, BASE)} == {"ok"}
    assert (checkout.results / "report.html").exists()
