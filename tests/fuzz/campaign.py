"""The whole fuzzing campaign: `make fuzz`, or `python -m tests.fuzz.campaign --seed 1 --studies 10000`.

Prints for each kind of input how many were taken, how many were refused and as what, and the slowest. An input that is
handled wrongly is written down with its seed, from which it can be made again, and the exit code is 1.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.record import record

from . import datasets, studies, traces
from .judge import TAKEN, FaultError, Verdict

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTS = {"studies": 10_000, "datasets": 2_000, "traces": 1_000}
SEEDS_APART = 1_000_000  # seeds of the inputs of one campaign follow each other; those of the next begin far away


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def inputs(self) -> int:
        return self.kinds.total() + len(self.faults)


def attempts(folder: Path) -> dict[str, Callable[[int], Verdict]]:
    """For each kind of input the function that makes and judges the one of a seed."""
    places = {name: folder / name for name in COUNTS}
    for place in places.values():
        place.mkdir()
    bases = studies.bases(REPOSITORY, places["studies"])
    originals = traces.originals(places["traces"])
    return {
        "studies": lambda seed: studies.attempt(seed, bases, places["studies"]),
        "datasets": lambda seed: datasets.attempt(seed, places["datasets"]),
        "traces": lambda seed: traces.attempt(seed, originals, places["traces"]),
    }


def run(attempt: Callable[[int], Verdict], first_seed: int, count: int) -> Tally:
    """Judge `count` inputs."""
    tally = Tally()
    for seed in range(first_seed, first_seed + count):
        try:
            verdict = attempt(seed)
        except FaultError as fault:
            tally.faults.append(f"seed {seed}: {str(fault)[:300]}")
            continue
        tally.kinds[verdict.kind] += 1
        tally.slowest_s = max(tally.slowest_s, verdict.seconds)
    return tally


def main() -> int:
    """Run the campaign of the command line and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--output", type=Path, help="csv file for the table; sums and machine go beside it as json")
    arguments = vars(parser.parse_args())
    seed, output = arguments.pop("seed"), arguments.pop("output")
    first_seed, began, found = seed * SEEDS_APART, time.perf_counter(), 0
    rows: list[dict[str, object]] = []
    sums: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, attempt in attempts(Path(folder)).items():
            started = time.perf_counter()
            tally = run(attempt, first_seed, arguments[name])
            seconds = time.perf_counter() - started
            refused = {kind: count for kind, count in tally.kinds.most_common() if kind != TAKEN}
            print(
                f"{name}: {tally.inputs} inputs from seed {first_seed} in {seconds:.0f} s, slowest "
                f"{1000 * tally.slowest_s:.0f} ms; {tally.kinds[TAKEN]} taken, {sum(refused.values())} refused: "
                + ", ".join(f"{kind} {count}" for kind, count in refused.items())
            )
            for fault in tally.faults:
                print(f"  FAULT {fault}")
            found += len(tally.faults)
            counts = {"inputs": tally.inputs, "faults": len(tally.faults), "slowest_ms": round(1000 * tally.slowest_s)}
            rows += [{"input": name, "became": kind, "count": count} for kind, count in tally.kinds.most_common()]
            sums[name] = counts | {"seconds": round(seconds)}
    if output:
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        record(output, seed=seed, seconds=time.perf_counter() - began, sums=sums)
    print(f"{found} inputs were handled wrongly")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
