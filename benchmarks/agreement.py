"""What the tests assert, as numbers: FLOPs in closed form against torch's counter, and the coverage of intervals.

    python benchmarks/agreement.py

The configurations and the simulated studies are those of the tests, read from their files.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tunemap import statistics
from tunemap.measure.flops import model_shape, step_flops

TESTS = Path(__file__).resolve().parent.parent / "tests" / "unit"
STUDIES = 2000


def flops_table() -> Table:
    """One row per configuration: counted by FlopCounterMode, computed in closed form, their difference."""
    tests = runpy.run_path(str(TESTS / "measure" / "test_flops.py"))
    table = Table(title="FLOPs of one step", title_justify="left")
    for column in ("configuration", "counted", "closed form", "difference"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for name, (config, trained, batches, options) in tests["CONFIGURATIONS"].items():
        counted = tests["counted"](config, trained, batches, options.get("gradient_checkpointing", False))
        predicted = step_flops(model_shape(config), trained, batches, **options).hardware_flops
        table.add_row(name, f"{counted:,}", f"{predicted:,}", f"{predicted / counted - 1:.2%}")
    return table


def coverage_table() -> Table:
    """Share of simulated studies whose 95 % interval holds the truth."""
    tests = runpy.run_path(str(TESTS / "test_statistics.py"))
    simulated, expected = tests["simulated"], tests["expected_accuracy"]

    def difficulty(rng: np.random.Generator) -> Any:
        return rng.normal(0, 1.5, 300)

    def accuracy_difference(rng: np.random.Generator) -> tuple[Any, float]:
        hard = difficulty(rng)
        sides = [simulated(rng, 5, level, hard, 0.4) for level in (1.1, 0.6)]
        return statistics.accuracy_difference(*sides).effect, expected(1.1, 0.4, 1.5) - expected(0.6, 0.4, 1.5)

    studies: dict[str, Callable[[np.random.Generator], tuple[Any, float]]] = {
        "accuracy of one run (Wilson, 300 examples)": lambda rng: (statistics.wilson(rng.binomial(300, 0.8), 300), 0.8),
        "mean over 3 seeds (t)": lambda rng: (statistics.mean(rng.normal(5, 2, 3)), 5.0),
        "throughput ratio, 3 seeds a side": lambda rng: (
            statistics.ratio(1.3 * np.exp(rng.normal(0, 0.02, 3)), np.exp(rng.normal(0, 0.02, 3))).effect,
            1.3,
        ),
        "accuracy over 5 seeds and 300 examples": lambda rng: (
            statistics.accuracy(simulated(rng, 5, 0.8, difficulty(rng), 0.4)),
            expected(0.8, 0.4, 1.5),
        ),
        "accuracy difference, 5 seeds a side": accuracy_difference,
    }
    table = Table(title=f"Coverage of 95 % intervals in {STUDIES:,} simulated studies", title_justify="left")
    table.add_column("quantity")
    table.add_column("coverage", justify="right")
    for name, study in studies.items():
        rng = np.random.default_rng(0)
        hits = [interval.low <= truth <= interval.high for interval, truth in (study(rng) for _ in range(STUDIES))]
        table.add_row(name, f"{np.mean(hits):.1%}")
    return table


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(flops_table())
    console.print(coverage_table())


if __name__ == "__main__":
    main()
