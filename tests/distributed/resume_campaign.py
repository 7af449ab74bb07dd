"""The table of resumption: `make resume`, or `python -m tests.distributed.resume_campaign --seed 1`.

Each row is a run of six steps with a checkpoint every second one. It is trained once undisturbed and once killed
(SIGKILL to all its processes) at a step drawn from the seed, or at every step for the rows of `EVERY_STEP`; then it is
started again. It is survived where loss, gradient norm and learning rate of every rank and step and every byte of the
saved weights are those of the undisturbed run. Rows go to benchmarks/results/resume-cpu.csv.
"""

import argparse
import csv
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.record import record, sums_by
from tests.distributed import ranks
from tests.forked import start_server
from tunemap.run import Run
from tunemap.study import reasons_against

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = REPOSITORY / "benchmarks" / "results" / "resume-cpu.csv"
LAYOUTS = (("single", 1), ("ddp", 2), ("fsdp", 2), ("hybrid", 4))
STEPS, CHECKPOINT_STEPS = 6, 2
METHODS: dict[str, dict[str, Any]] = {  # dropout shows that each rank's random generator is restored
    "full": {},
    "lora": {"dropout": 0.1},
    "qlora": {"dropout": 0.1},
    "gora": {"dropout": 0.1},
    "adalora": {},
}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"batching": "packed"},
    "length_grouped": {"batching": "length_grouped"},
    "accumulation": {"gradient_accumulation": 2},
    "fp16 with scaler": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "recomputation": {"gradient_checkpointing": True},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor")},
    "galore_adamw": {"optimizer": "galore_adamw", "galore_rank": 4, "galore_update_steps": 3},
    "lomo": {"optimizer": "lomo", "max_grad_norm": None, "learning_rate": 0.3},
    "adalomo": {"optimizer": "adalomo", "max_grad_norm": None, "learning_rate": 0.03},
}
OPTIMIZED = ("full", "lora")  # methods that all optimizers are tried with
EVERY_STEP = (("lora", "single", "plain"), ("full", "fsdp", "plain"), ("qlora", "ddp", "accumulation"))
COMPARED = ("loss", "gradient_norm", "learning_rate", "real_tokens")


@dataclass(frozen=True)
class Row:
    """What became of one run that was killed."""

    method: str
    strategy: str
    processes: int
    technique: str
    killed_at_step: int
    resumed_after_step: int
    identical: bool
    seconds: float
    problem: str


@dataclass(frozen=True)
class Cell:
    """One row of the table before it is run."""

    method: str
    strategy: str
    processes: int
    technique: str

    def run(self, **factors: Any) -> Run:
        """The run of this cell; smaller batches in 4 processes are what accumulation leaves."""
        settings = (TECHNIQUES | OPTIMIZERS)[self.technique] | factors
        return ranks.make_run(self.method, self.strategy, self.processes, METHODS[self.method], **settings)

    @property
    def passes_per_step(self) -> int:
        """Forward passes of each process in a step."""
        return int(self.run().factors.gradient_accumulation)


def cells() -> Iterator[Cell]:
    """Every cell of the table."""
    for method, (strategy, processes), technique in itertools.product(METHODS, LAYOUTS, TECHNIQUES | OPTIMIZERS):
        if technique in TECHNIQUES or method in OPTIMIZED:
            yield Cell(method, strategy, processes, technique)


def kills_of(cell: Cell, rng: random.Random) -> list[int]:
    """The steps at which a cell is killed, one after the other."""
    every = (cell.method, cell.strategy, cell.technique) in EVERY_STEP
    return list(range(STEPS)) if every else [rng.randrange(STEPS)]


def rows_of(cell: Cell, kills: list[int], material: ranks.Material, folder: Path) -> Iterator[Row]:
    """Train a cell undisturbed, then kill it at each of the steps and resume it."""
    undisturbed = ranks.train(cell.run(), material, folder / "undisturbed")
    for step in kills:
        started = time.perf_counter()
        where = folder / f"killed-{step}"
        after = step // CHECKPOINT_STEPS * CHECKPOINT_STEPS
        problem = ""
        try:
            _kill_and_compare(cell, material, where, step, after, undisturbed)
        except AssertionError as error:
            problem = str(error).strip().splitlines()[-1][:300] if str(error) else "an assertion failed"
        seconds = round(time.perf_counter() - started, 2)
        yield Row(*vars(cell).values(), step, after, not problem, seconds, problem)


def _kill_and_compare(
    cell: Cell, material: ranks.Material, where: Path, step: int, after: int, undisturbed: ranks.Finished
) -> None:
    run = cell.run(checkpoint_steps=CHECKPOINT_STEPS)
    killed = ranks.train(
        run, material, where, sabotage={"rank": -1, "step": step * cell.passes_per_step, "how": "killed"}
    )
    assert set(killed.exit_codes) == {-9}, f"killed, the processes ended with {killed.exit_codes}"
    resumed = ranks.train(run, material, where)
    said = f"resuming after step {after}" if after else "no checkpoint: starting from the first step"
    assert said in resumed.log, f"not said: {said}"
    for rank, column in itertools.product(range(cell.processes), COMPARED):
        found, expected = resumed.column(column, rank), undisturbed.column(column, rank)
        assert len(expected) == STEPS, f"rank {rank}: {len(expected)} steps"
        assert repr(found) == repr(expected), f"{column} of rank {rank}: {found} instead of {expected}"
    expected_weights, found_weights = (_weights(one) for one in (undisturbed, resumed))
    assert expected_weights, "no weights"
    assert found_weights == expected_weights, "the weights differ"


def _weights(finished: ranks.Finished) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in finished.weights.glob("*.safetensors")}


def main() -> int:
    """Run the whole table, print its sums, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="a method, strategy or technique")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    rng, started, rows, refused = random.Random(arguments.seed), time.monotonic(), [], {}
    start_server(REPOSITORY)
    with tempfile.TemporaryDirectory() as folder, arguments.output.open("w", newline="") as file:
        material = ranks.prepare_material(Path(folder))
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for number, cell in enumerate(cells()):
            if reasons := reasons_against(cell.run()):
                refused[cell] = reasons[0]
                continue
            kills = kills_of(cell, rng)  # drawn for cells that are left out too: the others stay the same
            if arguments.only not in (None, cell.method, cell.strategy, cell.technique):
                continue
            for row in rows_of(cell, kills, material, Path(folder) / str(number)):
                rows.append(row)
                writer.writerow(asdict(row))
                file.flush()
                if row.problem:
                    print(f"{cell} killed at {row.killed_at_step}: {row.problem}", flush=True)
    for reason, count in sorted(Counter(refused.values()).items()):
        print(f"refused before a run starts: {count} cells: {reason}")
    identical, seconds = sum(row.identical for row in rows), time.monotonic() - started
    sums = {
        "by_method": sums_by(map(asdict, rows), "method", ("identical",)),
        "by_strategy": sums_by(map(asdict, rows), "strategy", ("identical",)),
        "by_technique": sums_by(map(asdict, rows), "technique", ("identical",)),
        "refused": dict(Counter(refused.values())),
    }
    record(arguments.output, seed=arguments.seed, seconds=seconds, sums=sums)
    print(f"seed {arguments.seed}, {seconds:.0f} s")
    print(f"{len(rows)} kills in {len(set(map(_cell_of, rows)))} cells, {identical} resumed bit for bit")
    return 0 if identical == len(rows) else 1


def _cell_of(row: Row) -> tuple[str, str, str]:
    return row.method, row.strategy, row.technique


if __name__ == "__main__":
    sys.exit(main())
