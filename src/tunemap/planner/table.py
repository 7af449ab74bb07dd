"""The planning table: what each run of a study needs, whether it fits, what all of them take. Imports no torch."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunemap.planner.prediction import Prediction

GIB = 1 << 30
SILENT_S = 2.0  # work that is done by then needs no progress
COLORS = {"fits": "green", "tight": "yellow", "cannot": "red", "unknown": "dim"}
SHOWN_REASONS = 6


def planning_table(found: Mapping[str, Prediction], *, seeds: Mapping[str, str]) -> Table:
    """One row per run; runs that differ in their seed alone share one, under the id that `seeds` gives each of them."""
    table = Table(title="Planned", title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("memory", "of", "one step", "run", "energy", "cost"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    shared: dict[str, list[Prediction]] = {}
    for name, one in found.items():
        shared.setdefault(seeds.get(name, name), []).append(one)
    for name, alike in shared.items():
        one = alike[0]
        many = f" ×{len(alike)}" if len(alike) > 1 else ""
        verdict = Text(one.verdict + (f": {one.reason}" if one.reason else ""), style=COLORS[one.verdict])
        table.add_row(
            name + many,
            _bytes(one.device_peak_bytes),
            _bytes(one.memory_bytes),
            span(one.step_seconds_low, one.step_seconds_high, seconds),
            span(one.seconds_low, one.seconds_high, seconds),
            span(one.energy_joules_low, one.energy_joules_high, energy),
            span(one.cost_low, one.cost_high, lambda value: f"{value:.2f}"),
            verdict,
        )
    return table


def totals(found: Mapping[str, Prediction]) -> list[str]:
    """What all runs take together, and what leaving out those that cannot fit would save."""
    verdicts, sums = Counter[str](one.verdict for one in found.values()), summary(found)
    device = next((one.device for one in found.values()), "")
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in COLORS if verdicts[verdict])
    lines = [f"{len(found)} runs on {device}: {counts or 'none'}"]
    currency = next((one.currency for one in found.values() if one.currency), None)

    def parts(suffix: str) -> str:
        said = [f"{span(sums[f'seconds_low{suffix}'], sums[f'seconds_high{suffix}'], seconds)}"]
        if sums[f"energy_joules_high{suffix}"]:
            low, high = sums[f"energy_joules_low{suffix}"], sums[f"energy_joules_high{suffix}"]
            said.append(f"{span(low, high, energy)} (by power limit)")
        if currency:
            low, high = sums[f"cost_low{suffix}"], sums[f"cost_high{suffix}"]
            said.append(f"{span(low, high, lambda value: f'{value:,.2f}')} {currency}")
        return ", ".join(said)

    if sums["seconds_high"]:
        lines.append(f"training them one after the other: {parts('')}")
    if sums["seconds_high_of_cannot"]:
        lines.append(f"leaving out what cannot fit would save {parts('_of_cannot')} of it")
    untimed = sum(one.seconds_high is None for one in found.values())
    if untimed:
        lines.append(f"no time for {untimed} runs: their number of steps or their device's speed is not known")
    return lines


def summary(found: Mapping[str, Prediction]) -> dict[str, float]:
    """Totals over runs: seconds, energy and money at both ends, and what the runs that cannot fit would take of it."""
    totals: dict[str, float] = {}
    for name in ("seconds", "energy_joules", "cost"):
        for end in ("low", "high"):
            key = f"{name}_{end}"
            totals[key] = sum(getattr(one, key) or 0.0 for one in found.values())
            totals[f"{key}_of_cannot"] = sum(getattr(one, key) or 0.0 for one in found.values() if one.fits is False)
    return totals


def span(low: float | None, high: float | None, words: Callable[[float], str]) -> str:
    """A range, or one value where both ends read the same; empty where nothing is known."""
    if low is None or high is None:
        return ""
    first, last = words(low), words(high)
    return last if first == last else f"{first} – {last}"


def seconds(value: float) -> str:
    """A duration in the largest unit that leaves a number above 1."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 10 * size else f"{value / size:.0f} {unit}"
    return f"{value * 1e3:.0f} ms"


def energy(joules: float) -> str:
    """Energy in Wh or kWh."""
    return f"{joules / 3.6e6:.1f} kWh" if joules >= 3.6e6 else f"{joules / 3600:.0f} Wh"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / GIB:.1f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"


class Ticker:
    """Progress with the time that is left, on standard error, for work of more than two seconds."""

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what, self._stream = what, stream or sys.stderr
        self._began = self._said = time.monotonic()
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Tell how much is done; called as often as one likes."""
        now = time.monotonic()
        elapsed = now - self._began
        terminal = self._stream.isatty()
        if done == total:
            if self._shown and terminal:
                print(file=self._stream, flush=True)
            return
        if elapsed < SILENT_S or (not terminal and now - self._said < 10 and self._shown):
            return
        left = f", {seconds(elapsed / done * (total - done))} left" if done else ""
        end = "\r" if terminal else "\n"
        print(f"{self._what}: {done} of {total}{left}   ", file=self._stream, end=end, flush=True)
        self._shown, self._said = True, now


def print_plan(console: Console, found: Mapping[str, Prediction], seeds: Mapping[str, str]) -> None:
    """The table with its totals and the notes behind it."""
    console.print(planning_table(found, seeds=seeds))
    for line in totals(found):
        console.print(line, markup=False)
    for note in _notes(found.values()):
        console.print(f"note: {note}", markup=False)


def _notes(found: Iterable[Prediction]) -> list[str]:
    counted = Counter(note for one in found for note in one.notes)
    return [f"{note} ({runs} runs)" for note, runs in counted.most_common(SHOWN_REASONS)]
