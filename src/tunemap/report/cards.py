"""Cards of the page: one per run and one per point, which every number leads to.

A run's card has what is needed to trust or repeat it: how it differs from the baseline's run, how memory and loss
went, which gates it passed, the end of its log, and the command that makes it again. Cards are made one at a time,
so that a study of ten thousand runs needs no more memory than its tables.
"""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tunemap.report.formats import records
from tunemap.report.points import flat_factors
from tunemap.report.scene import Scene, outcome_word
from tunemap.report.sections import with_interval
from tunemap.report.waterfall_figure import MEMORY_PARTS

Row = dict[str, Any]
DEFAULT_STUDY = "config/config.yaml"  # what the Snakefile reads without --configfile
LOG_LINES = 15
LOG_CHARACTERS = 1500
LOG_TAIL_BYTES = 16_384
CURVE_POINTS = 60
CURVE_WIDTH, CURVE_HEIGHT = 320, 90  # units of the curve's drawing
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\t\n\x20-\x7e\xa0-\U0010ffff]")
NUMBERS = (  # label, column of runs.csv, factor, digits, unit
    ("Throughput", "tokens_per_second", 1.0, 0, "real tokens/s"),
    ("Step time, median", "step_time_median_s", 1e3, 2, "ms"),
    ("Step time, 95th percentile", "step_time_p95_s", 1e3, 2, "ms"),
    ("Peak memory, allocated", "peak_allocated_bytes", 2**-20, 1, "MiB"),
    ("Peak memory, reserved", "peak_reserved_bytes", 2**-20, 1, "MiB"),
    ("Energy of 10,000 tokens", "energy_per_10k_tokens_joules", 1.0, 1, "J"),
    ("Cost of 10,000 tokens", "cost_per_10k_tokens", 1.0, 6, ""),
    ("MFU, measured ceiling", "mfu_measured", 100.0, 1, "%"),
    ("Training loss at the end", "train_loss", 1.0, 4, "nats/token"),
    ("Trainable parameters", "trainable_parameters", 1.0, 0, ""),
    ("Training time", "train_time_s", 1.0, 1, "s"),
    ("Wall time", "wall_time_s", 1.0, 1, "s"),
)


@dataclass(frozen=True)
class RunCard:
    """One run; texts are escaped by the template."""

    card: str
    run: str
    outcome: str
    word: str
    reason: str | None
    numbers: tuple[tuple[str, str], ...]
    memory: tuple[tuple[str, float, str], ...]  # part, share of the peak, MiB
    curve: Markup | None
    baseline: str | None
    differences: tuple[tuple[str, str, str, str], ...]  # factor, value, the baseline's, where it came from
    gates_passed: int
    gates_tripped: tuple[str, ...]
    log_tail: str
    command: str
    digest: str


@dataclass(frozen=True)
class PointCard:
    """The runs of a point side by side; each number leads to its run's card."""

    card: str
    label: str
    experiment: str
    means: tuple[tuple[str, str], ...]
    runs: tuple[tuple[str, str, tuple[str, ...]], ...]  # card, seed or name, cells
    factors: tuple[tuple[str, str], ...]


def run_card_id(run: str) -> str:
    """Where a run's card stands in the page."""
    return f"run-{run}"


def point_card_ids(scenes: list[Scene]) -> dict[str, dict[str, str]]:
    """Where the cards of an experiment's points stand, by experiment and label."""
    return {
        scene.name: {point["point"]: f"point-{scene.name}-{number}" for number, point in enumerate(scene.points, 1)}
        for scene in scenes
    }


# --- points -----------------------------------------------------------------------------------------------

POINT_RUN_COLUMNS = ("Outcome", "Accuracy, %", "Throughput, tokens/s", "Peak memory, MiB", "Loss")


def point_cards(scene: Scene, ids: dict[str, str], planned: dict[str, Any]) -> Iterator[PointCard]:
    """The cards of one experiment, in the order of its table."""
    groups = {str(label): records(rows) for label, rows in scene.runs.groupby("point", sort=False)}
    for point in scene.points:
        runs = groups.get(point["point"], [])
        means = [(label, _number(point, name, factor, digits, unit)) for label, name, factor, digits, unit in NUMBERS]
        flat = flat_factors(planned[runs[0]["run"]]) if runs else {}
        yield PointCard(
            ids[point["point"]],
            point["point"],
            scene.name,
            tuple((label, text) for label, text in means if text),
            tuple(
                (
                    run_card_id(run["run"]),
                    f"seed {run['seed']:.0f}" if point["method_kind"] != "base" else "untouched model",
                    _run_cells(run),
                )
                for run in runs
            ),
            tuple((key, _text(value)) for key, value in flat.items() if key != "seed"),
        )


def _run_cells(run: Row) -> tuple[str, ...]:
    return (
        outcome_word(run["outcome"]),
        "—" if run["accuracy"] is None else f"{100 * run['accuracy']:.1f}",
        _cell(run, "tokens_per_second", 1, 0),
        _cell(run, "peak_allocated_bytes", 2**-20, 1),
        _cell(run, "train_loss", 1, 4),
    )


def _cell(row: Row, name: str, factor: float, digits: int) -> str:
    return "—" if row[name] is None else f"{row[name] * factor:,.{digits}f}"


# --- runs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunContext:
    """What the cards of all runs share."""

    study: str
    planned: dict[str, Any]
    baselines: dict[str, str]  # run -> the baseline's run with the same seed
    gates: dict[str, list[Row]]
    logs_dir: Path | None
    study_file: str | None


def run_cards(runs: list[Row], losses_path: Path, context: RunContext) -> Iterator[RunCard]:
    """The cards of all runs in the plan's order; loss curves are read along, one run at a time."""
    curves = read_curves(losses_path)
    waiting = next(curves, None)
    for run in runs:
        curve = None
        if waiting is not None and waiting[0] == run["run"]:
            curve, waiting = waiting[1], next(curves, None)
        yield _run_card(run, curve, context)


def _run_card(run: Row, curve: list[tuple[float, float]] | None, context: RunContext) -> RunCard:
    name = run["run"]
    gates = context.gates.get(name, [])
    tripped = [gate for gate in gates if gate["passed"] in (False, "False")]
    baseline = context.baselines.get(name)
    accuracy = [] if run["accuracy"] is None else [("Accuracy", _accuracy(run))]
    numbers = [(label, _number(run, column, factor, digits, unit)) for label, column, factor, digits, unit in NUMBERS]
    reason = run["reason"] or (run["evaluation_reason"] if run["evaluation_outcome"] not in ("ok", "skipped") else None)
    place = ", ".join(filter(None, [run["phase"], f"step {run['step']:.0f}" if run["step"] is not None else None]))
    return RunCard(
        card=run_card_id(name),
        run=name,
        outcome=run["outcome"],
        word=outcome_word(run["outcome"]),
        reason=f"{place}: {reason}" if reason and place else reason,
        numbers=(*accuracy, *((label, text) for label, text in numbers if text)),
        memory=_memory(run),
        curve=draw_curve(curve) if curve else None,
        baseline=baseline,
        differences=_differences(name, baseline, context.planned),
        gates_passed=len(gates) - len(tripped),
        gates_tripped=tuple(f"{gate['gate']}: {gate['message'] or 'no message'}" for gate in tripped),
        log_tail=log_tail(context.logs_dir, name),
        command=repeat_command(context.study, name, context.study_file, is_base=run["method_kind"] == "base"),
        digest=context.planned[name]["digest"],
    )


def _accuracy(run: Row) -> str:
    low, high = 100 * run["accuracy_low"], 100 * run["accuracy_high"]
    return f"{100 * run['accuracy']:.1f} % ({low:.1f} to {high:.1f}), {run['correct']:.0f} of {run['examples']:.0f}"


def _number(row: Row, name: str, factor: float, digits: int, unit: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{with_interval(row, name, factor, digits)} {unit}".strip()


def _memory(run: Row) -> tuple[tuple[str, float, str], ...]:
    """The parts of the peak that were measured."""
    peak = run["peak_allocated_bytes"]
    found = [(word, run[part]) for part, word in MEMORY_PARTS.items() if run[part]]
    if not peak or not found:
        return ()
    return tuple((word, 100 * value / peak, f"{value / 2**20:,.1f}") for word, value in found)


def _differences(run: str, baseline: str | None, planned: dict[str, Any]) -> tuple[tuple[str, str, str, str], ...]:
    if baseline is None or baseline == run:
        return ()
    this, other = flat_factors(planned[run]), flat_factors(planned[baseline])
    origins = planned[run].get("provenance", {})
    return tuple(
        (key, _text(this.get(key)), _text(other.get(key)), str(origins.get(key, "")))
        for key in dict.fromkeys([*this, *other])
        if this.get(key) != other.get(key)
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def repeat_command(study: str, run: str, study_file: str | None, *, is_base: bool = False) -> str:
    """The command line that makes one run again, and nothing else, from a checkout of the same version."""
    target = f"evaluations/{run}/evaluation.json" if is_base else f"runs/{run}/outcome.json"
    return f"{study_command(study_file)} --force {shlex.quote(f'results/{study}/{target}')}"


def study_command(study_file: str | None) -> str:
    """The command line that makes a whole study; the default study needs no --configfile."""
    given = "" if study_file == DEFAULT_STUDY else f" --configfile {shlex.quote(study_file or 'STUDY.yaml')}"
    return f"snakemake --profile profiles/local{given}"


def log_tail(logs_dir: Path | None, run: str) -> str:
    """The last lines that a run printed, without colours and other control codes; empty where there is no log."""
    path = logs_dir / "train" / f"{run}.log" if logs_dir else None
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]  # a progress bar's last state
    cleaned = ESCAPES.sub("", "\n".join(lines)).strip().splitlines()
    return "\n".join(cleaned[-LOG_LINES:])[-LOG_CHARACTERS:]


# --- curves -----------------------------------------------------------------------------------------------


def read_curves(path: Path) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(run, [(step, loss)]) from losses.csv, whose rows lie together by run; one run in memory at a time."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        for run, rows in groupby(csv.DictReader(file), key=lambda row: row["run"]):
            yield run, [(float(row["step"]), float(row["loss"])) for row in rows]


def draw_curve(curve: list[tuple[float, float]]) -> Markup:
    """A loss curve as a small SVG with its ends in words; no ids, no style of its own."""
    every = max(1, -(-len(curve) // CURVE_POINTS))
    kept = [*curve[::every], *([curve[-1]] if (len(curve) - 1) % every else [])]
    first, last = curve[0][0], curve[-1][0]
    lowest, highest = min(loss for _, loss in curve), max(loss for _, loss in curve)
    across = CURVE_WIDTH / ((last - first) or 1)
    down = CURVE_HEIGHT / ((highest - lowest) or 1)
    places = " ".join(f"{(step - first) * across:.0f},{(highest - loss) * down:.0f}" for step, loss in kept)
    text = f"Training loss from {curve[0][1]:.3g} at step {first:.0f} to {curve[-1][1]:.3g} at step {last:.0f}"
    return Markup(
        f'<svg class="curve" viewBox="-4 -4 {CURVE_WIDTH + 8} {CURVE_HEIGHT + 8}" role="img" aria-label="{text}">'
        f'<path d="M0 {CURVE_HEIGHT}H{CURVE_WIDTH}M0 0V{CURVE_HEIGHT}"/><polyline points="{places}"/></svg>'
        f"<p class=below>{text}; highest {highest:.3g}, lowest {lowest:.3g}.</p>"
    )
