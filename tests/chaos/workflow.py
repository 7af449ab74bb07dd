"""Faults of a whole workflow: `make chaos`, or `python -m tests.chaos.workflow --seed 1 --faults 12`.

Snakemake trains and evaluates a run once undisturbed. Then, for each fault, a copy of the checkout loses that run, and
Snakemake starts again and is struck: its main process is killed, a second Snakemake is started beside it, or the
results lie on a disk of a few kilobytes that runs full (a tmpfs; needs the right to mount). What the message asks for
is done, Snakemake is started once more, and the results must be those of the undisturbed run. One line per fault goes
to benchmarks/results/chaos-workflow.csv.
"""

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.workflow.conftest import LORA, Checkout, make_checkout
from tunemap.training.lease import is_held, read_lease

from .campaign import LEFT_BEHIND, content_of
from .record import record, sums_by

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "benchmarks" / "results" / "chaos-workflow.csv"
TARGET = f"results/small/evaluations/{LORA}/evaluation.json"
WHOLE = (f"runs/{LORA}", f"evaluations/{LORA}")
LIMIT_S = 900.0
MOMENTS = ("lease.json", "progress.json", "checkpoint", "finished")  # of a run's work folder, in order


@dataclass(frozen=True)
class Row:
    """What became of one fault."""

    fault: str
    seed: int
    survived: bool
    lost: int  # results that were not what they are without the fault
    starts: int  # of Snakemake, until the study was finished
    seconds: float
    problem: str


class LostError(AssertionError):
    """A fault was not survived."""


class Started:
    """A checkout in which Snakemake is started as often as it takes."""

    def __init__(self, checkout: Checkout) -> None:
        self.checkout, self.starts = checkout, 0

    @property
    def work(self) -> Path:
        """What the run keeps until it has been recorded."""
        return self.checkout.results / "unfinished" / LORA

    def begin(self) -> subprocess.Popen[str]:
        """Snakemake, begun."""
        self.starts += 1
        return subprocess.Popen(
            self.checkout.command(TARGET), cwd=self.checkout.root, env=self.checkout.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *options: str) -> tuple[int, str]:
        """Snakemake, run to its end: exit code, and what it and its failed jobs said."""
        self.starts += 1
        done = subprocess.run(
            self.checkout.command(TARGET, *options), cwd=self.checkout.root, env=self.checkout.environment(),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S,
        )  # fmt: skip
        return done.returncode, done.stdout

    def wait_for(self, moment: str, process: subprocess.Popen[str]) -> bool:
        """Wait until the run has come so far; false if Snakemake ended before."""
        while process.poll() is None:
            if (self.work / moment).exists():
                return True
            time.sleep(0.01)
        return False

    def wait_for_launcher(self) -> None:
        """Wait until nobody trains the run, as the message asks."""
        deadline = time.monotonic() + LIMIT_S
        while (lease := read_lease(self.work)) is not None and is_held(lease, list) and time.monotonic() < deadline:
            time.sleep(0.1)

    def finish(self) -> None:
        """Start until the study is finished, doing what the messages say."""
        for _ in range(4):
            code, said = self.run()
            if code == 0:
                return
            if "--unlock" in said:
                self.run("--unlock")
            elif "still trains" in said:
                self.wait_for_launcher()
            else:
                raise LostError(f"the next start ends with {code}: {said[-500:]}")
        raise LostError(f"not finished after {self.starts} starts: {said[-500:]}")


# --- faults -------------------------------------------------------------------------------------------------


def kill_snakemake(started: Started, rng: random.Random) -> str:
    """SIGKILL to Snakemake's main process alone; its job lives on and nobody sees its end."""
    moment, process = rng.choice(MOMENTS), started.begin()
    if not started.wait_for(moment, process):
        raise LostError(f"ended before {moment}: {process.communicate()[0][-300:]}")
    time.sleep(rng.random())
    process.kill()
    process.wait()
    code, said = started.run()
    if code == 0 or "--unlock" not in said:
        raise LostError(f"a start after the kill ends with {code} and does not name --unlock: {said[-300:]}")
    started.finish()
    return f"kill -9 of Snakemake ({moment})"


def two_snakemakes(started: Started, rng: random.Random) -> str:
    """A second Snakemake on the same study is refused, by Snakemake's lock or without it by the run's lease."""
    options = rng.choice([(), ("--nolock",)])
    process = started.begin()
    if not started.wait_for("progress.json", process):
        raise LostError(f"ended before it trained: {process.communicate()[0][-300:]}")
    lease = read_lease(started.work)
    if lease is None:
        raise LostError("a run that trains has no lease")
    os.kill(lease.pid, signal.SIGSTOP)  # or it might end before the second has started
    code, said = started.run(*options)
    os.kill(lease.pid, signal.SIGCONT)
    words = "still trains" if options else "lock"
    if code == 0 or words not in said:
        raise LostError(f"the second start ends with {code} and does not say {words!r}: {said[-400:]}")
    said = process.communicate(timeout=LIMIT_S)[0]
    if process.returncode != 0:
        raise LostError(f"the first start ends with {process.returncode}: {said[-400:]}")
    return "two Snakemakes" + (" without lock" if options else "")


def full_disk(started: Started, rng: random.Random) -> str:
    """Results on a disk that runs full; the start after it has been enlarged finishes."""
    kilobytes, results = rng.choice([4, 16, 40, 80, 120, 160, 240]), started.checkout.results
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", results], check=True)
    try:
        code, said = started.run()
        if code == 0:
            raise LostError(f"{kilobytes} KiB were enough: {said[-200:]}")
        text = said + "".join(path.read_text() for path in (started.checkout.root / "logs").rglob("*.log"))
        advice = "free some space" in text or "when the disk is in order, start again" in text
        if "No space left on device" not in text or not advice:
            raise LostError(f"neither what happened nor what to do is said: {text[-400:]}")
        if "Traceback" in text.split("error: ")[-1]:
            raise LostError(f"a traceback: {text[-400:]}")
        subprocess.run(["mount", "-o", "remount,size=100m", results], check=True)
        started.finish()
        shutil.copytree(results, results.with_name("kept"))
    finally:
        subprocess.run(["umount", "--lazy", results], check=True)
    results.rmdir()
    results.with_name("kept").rename(results)
    return f"disk of {kilobytes} KiB full"


# --- campaign -----------------------------------------------------------------------------------------------


def content(checkout: Checkout) -> dict[str, Any]:
    """What training and evaluation left, without times."""
    files = [path for part in WHOLE for path in sorted((checkout.results / part).rglob("*")) if path.is_file()]
    files = [path for path in files if path.name != ".snakemake_timestamp"]
    return {str(path.relative_to(checkout.root)): content_of(path) for path in files}


def strays(checkout: Checkout) -> list[str]:
    """Processes that still work in the checkout."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == checkout.root:
                found.append(" ".join(process.cmdline())[:100])
        except (psutil.Error, OSError):
            continue
    return found


def strike(seed: int, whole: Checkout, expected: dict[str, Any], folder: Path, faults: list[Any]) -> Row:
    """Make the fault of a seed, and see whether it is survived."""
    rng, began, problem, lost = random.Random(seed), time.perf_counter(), "", 0
    fault: Callable[[Started, random.Random], str] = faults[seed % len(faults)]
    name = fault.__name__
    checkout = Checkout(folder / f"fault-{seed}")
    shutil.copytree(whole.root, checkout.root, symlinks=True)
    shutil.rmtree(checkout.results)
    started = Started(checkout)
    try:
        name = fault(started, rng)
        found = content(checkout)
        differing = [key for key, value in expected.items() if found.get(key) != value]
        lost = len(differing)
        if differing:
            raise LostError(f"differs in {', '.join(differing)}")
        left = [path.name for path in (checkout.root / "results").rglob("*") if LEFT_BEHIND.search(path.name)]
        if left := [one for one in left if one != "unfinished"]:
            raise LostError(f"left behind: {', '.join(left)}")
        if list((checkout.root / ".snakemake" / "locks").glob("*")):
            raise LostError("the lock is left behind")
        if running := strays(checkout):
            raise LostError(f"stray processes: {running}")
    except (LostError, subprocess.SubprocessError) as error:
        problem = re.sub(r"\s+", " ", str(error))
    shutil.rmtree(checkout.root)
    return Row(name, seed, not problem, lost, started.starts, round(time.perf_counter() - began, 1), problem)


def main() -> int:
    """Run the campaign of the command line, print its sums, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    began, rows = time.monotonic(), []
    faults: list[Any] = [kill_snakemake, two_snakemakes]
    if os.geteuid() == 0 and shutil.which("mount"):
        faults.append(full_disk)
    else:
        print("no right to mount: no disk runs full here", flush=True)
    with tempfile.TemporaryDirectory() as scratch, arguments.output.open("w", newline="") as file:
        whole = make_checkout(REPOSITORY, Path(scratch) / "whole")
        study = whole.study()  # slow enough to be struck, and with a checkpoint to resume from
        study["defaults"] |= {"max_steps": 30, "logging_steps": 5, "checkpoint_steps": 5, "max_new_tokens": 8}
        whole.write_study(study)
        code, said = Started(whole).run()
        assert code == 0, said
        expected = content(whole)
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        first = arguments.seed * 1_000_000
        for seed in range(first, first + arguments.faults):
            row = strike(seed, whole, expected, Path(scratch), faults)
            rows.append(row)
            writer.writerow(asdict(row))
            file.flush()
            print(f"seed {row.seed}: {row.fault}: {row.problem or 'survived'} ({row.seconds:.0f} s)", flush=True)
    survived, seconds = sum(row.survived for row in rows), time.monotonic() - began
    sums = {"by_fault": sums_by(map(asdict, rows), "fault", ("survived", "lost"))}
    record(arguments.output, seed=arguments.seed, seconds=seconds, sums=sums)
    print(f"seed {arguments.seed}, {seconds:.0f} s")
    print(f"{len(rows)} faults of a whole workflow, {survived} survived, {sum(row.lost for row in rows)} results lost")
    return 0 if survived == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
