"""What the captures of an experiment say: the time of a step by phase and category, and one step over time."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tunemap.errors import UserError
from tunemap.files import read_json

PHASES = ("data", "forward", "backward", "optimizer", "zero_grad", "unattributed")
LONGEST_OPERATORS = 5


@dataclass(frozen=True)
class Captured:
    """One captured run, per step and device: `wall_ms` by (phase, category) adds up to the busy part of the window."""

    run: str
    point: str
    wall_ms: dict[tuple[str, str], float]
    idle_ms: float
    operators: tuple[tuple[str, float], ...]  # longest ones with their share of the busy time
    profiled_to_unprofiled_ratio: float | None
    timeline: pd.DataFrame  # of its middle step, see `tunemap.trace.timeline`; without rows where no phase was seen

    @property
    def categories(self) -> Counter[str]:
        """Milliseconds by category over all phases."""
        total: Counter[str] = Counter()
        for (_, category), milliseconds in self.wall_ms.items():
            total[category] += milliseconds  # type: ignore[assignment]
        return total


def read_captures(facts_dir: Path, labels: dict[str, str]) -> list[Captured]:
    """The captured ones among the runs of `labels` (run -> point), in that order; failed captures are left out."""
    captures = []
    for run, point in labels.items():
        folder = facts_dir / run
        if (folder / "summary.json").exists():
            captures.append(_read(folder, run, point))
    return captures


def _read(folder: Path, run: str, point: str) -> Captured:
    described, summary = read_json(folder / "capture.json"), read_json(folder / "summary.json")
    devices = len(summary["devices"])
    if not devices:
        raise UserError(f"{folder}/summary.json: the capture saw no device at work; capture the run again")
    per_step_ms = 1e6 * described["steps"] * devices
    wall_ms: dict[tuple[str, str], float] = defaultdict(float)
    for row in pd.read_csv(folder / "phases.csv").itertuples():
        wall_ms[str(row.phase), str(row.category)] += float(row.wall_ns) / per_step_ms  # type: ignore[arg-type]
    kernels = pd.read_csv(folder / "kernels.csv").groupby("short_name")["wall_ns"].sum().nlargest(LONGEST_OPERATORS)
    busy_ms = sum(wall_ms.values())
    return Captured(
        run=run,
        point=point,
        wall_ms=dict(wall_ms),
        idle_ms=sum(device["idle_ns"] for device in summary["devices"]) / per_step_ms,
        operators=tuple((str(name), float(wall) / per_step_ms / busy_ms) for name, wall in kernels.items()),
        profiled_to_unprofiled_ratio=described["profiled_to_unprofiled_ratio"],
        timeline=_timeline(folder / "timeline.csv"),
    )


def _timeline(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"{path}: no such file; remove {path.parent}, and the workflow reads its capture again")
    return pd.read_csv(path, dtype={"name": str, "device": str})
