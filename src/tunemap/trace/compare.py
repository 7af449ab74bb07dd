"""Why one run takes longer than another: a waterfall over the parts of the window that adds up exactly.

Every nanosecond of a window belongs to one row: computation to its (category, phase), exposed communication and
exposed copies to theirs, idle time to its (cause, phase). The differences of the rows therefore sum to the difference
of the windows. Runs with several devices are averaged over them; where both runs mark their steps, times are per step.
"""

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tunemap.errors import UserError
from tunemap.trace.categories import COMMUNICATION
from tunemap.trace.facts import Facts

Key = tuple[str, str, str]
"""(component, category, phase)"""

COMPONENTS = ("compute", "exposed_communication", "exposed_copy", "idle")


@dataclass(frozen=True)
class Comparison:
    """`table` has component, category, phase, a_ns, b_ns, delta_ns; the largest change comes first."""

    summary: dict[str, Any]
    table: dict[str, list[Any]]

    def lines(self, rows: int = 15) -> list[str]:
        """What the terminal shows."""
        s = self.summary
        unit = "device and step" if s["per_step"] else "device"
        lines = [
            f"ms per {unit}: A {s['a_window_ns'] / 1e6:.3f}, B {s['b_window_ns'] / 1e6:.3f}, "
            f"difference {s['delta_window_ns'] / 1e6:+.3f}",
            f"{'component':<22} {'category':<20} {'phase':<14} {'A ms':>12} {'B ms':>12} {'B - A':>12}",
        ]
        columns = list(zip(*self.table.values(), strict=True))
        for component, category, phase, a, b, delta in columns[:rows]:
            lines.append(
                f"{component:<22} {category:<20} {phase:<14} {a / 1e6:>12.3f} {b / 1e6:>12.3f} {delta / 1e6:>+12.3f}"
            )
        rest = sum(row[-1] for row in columns[rows:])
        if len(columns) > rows:
            lines.append(f"{'the other ' + str(len(columns) - rows) + ' rows':<84} {rest / 1e6:>+12.3f}")
        return lines


def compare_facts(a: Facts, b: Facts) -> Comparison:
    """The waterfall from run A to run B; raises `UserError` when one of them has no device work."""
    for name, facts in (("A", a), ("B", b)):
        if not facts.summary["devices"]:
            raise UserError(f"--compare: run {name} has no device work, so there is nothing to compare")
    kinds = [{d["device"] == "cpu" for d in facts.summary["devices"]} for facts in (a, b)]
    if kinds[0] != kinds[1]:
        raise UserError("--compare: one run is on a GPU and the other on a CPU; their times have different meanings")
    per_step = all(d["step_count"] for facts in (a, b) for d in facts.summary["devices"])
    parts = [_parts(facts, per_step) for facts in (a, b)]
    keys = sorted(parts[0].keys() | parts[1].keys())
    rows = [(key, parts[0].get(key, Fraction(0)), parts[1].get(key, Fraction(0))) for key in keys]
    rows.sort(key=lambda row: -abs(row[2] - row[1]))
    windows = [sum(part.values(), Fraction(0)) for part in parts]
    table: dict[str, list[Any]] = {
        "component": [key[0] for key, _, _ in rows],
        "category": [key[1] for key, _, _ in rows],
        "phase": [key[2] for key, _, _ in rows],
        "a_ns": [_number(x) for _, x, _ in rows],
        "b_ns": [_number(y) for _, _, y in rows],
        "delta_ns": [_number(y - x) for _, x, y in rows],
    }
    components = {
        component: _number(sum((y - x for key, x, y in rows if key[0] == component), Fraction(0)))
        for component in COMPONENTS
    }
    summary = {
        "per_step": per_step,
        "a_window_ns": _number(windows[0]),
        "b_window_ns": _number(windows[1]),
        "delta_window_ns": _number(windows[1] - windows[0]),
        "delta_by_component_ns": components,
    }
    return Comparison(summary, table)


def check_comparable(facts: Facts) -> None:
    """Read what a comparison reads; raises what reading it raises where facts that were kept lack some of it."""
    for device in facts.summary["devices"]:
        int(device["step_count"])
    _parts(facts, per_step=False)


def _parts(facts: Facts, per_step: bool) -> dict[Key, Fraction]:
    """Mean over the devices of the nanoseconds of each part, per step if asked; they sum to the mean window."""
    devices = facts.summary["devices"]
    weight = {
        (d["process"], str(d["device"])): Fraction(1, len(devices) * (d["step_count"] if per_step else 1))
        for d in devices
    }
    parts: dict[Key, Fraction] = defaultdict(Fraction)
    tables = facts.tables

    def add(table: str, nanoseconds: str, key_of: Any) -> None:
        columns = tables[table]
        for i, value in enumerate(columns[nanoseconds]):
            row = {name: column[i] for name, column in columns.items()}
            if value:
                parts[key_of(row)] += value * weight[row["process"], str(row["device"])]

    add("phases", "wall_ns", lambda r: (_component(r["category"]), r["category"], r["phase"]))
    add("copies", "wall_ns", lambda r: ("exposed_copy", f"{r['kind']} {r['scope']}", r["phase"]))
    add("gaps", "time_ns", lambda r: ("idle", r["cause"], r["phase"]))
    return parts


def _component(category: str) -> str:
    return "exposed_communication" if category == COMMUNICATION else "compute"


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
