"""The report of a study as one HTML file that opens offline: the answer first, then what it rests on.

Everything in it comes from tables, figures, facts and logs; nothing is fetched, nothing is computed here but
sentences. The page is written as it is made, so that memory grows with the tables and not with the page.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tunemap.collect import read_tables
from tunemap.files import read_json, write_atomic_chunks
from tunemap.planner.calibration import CALIBRATION
from tunemap.report import words
from tunemap.report.calibration_plot import calibration_plot
from tunemap.report.cards import (
    POINT_RUN_COLUMNS,
    RunContext,
    point_card_ids,
    point_cards,
    run_card_id,
    run_cards,
    study_command,
)
from tunemap.report.definitions import DEFINITIONS
from tunemap.report.extras import (
    INFERENCE,
    PUBLISHED,
    inference_row,
    read_calibration,
    read_published,
    scaling_rows,
    windows,
)
from tunemap.report.figures import PUBLISHED as PUBLISHED_DRAWING
from tunemap.report.formats import records
from tunemap.report.gpu_advice import advise_on_gpus
from tunemap.report.map_data import map_data
from tunemap.report.published_tables import page_tables
from tunemap.report.scene import AXIS, GRID, INK, PAPER, Scene, outcome_word, scenes
from tunemap.report.sections import section

Row = dict[str, Any]
PAGE_COLOURS = {INK: "currentColor", AXIS: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
# Figures that explain; the others stand with their experiment.
WHY = ("waterfall", "step", "timeline", "roofline", "ranks")
MANY_WARNINGS = 6  # of one gate, that share a line of the table of gates
WINDOW_COLUMNS = ("Capture", "Window, ms", "Compute, %", "Exposed communication, %", "Exposed copies, %", "Idle, %")


def write_report(
    plan_path: Path,
    results_dir: Path,
    output: Path,
    *,
    logs_dir: Path | None = None,
    study_file: str | None = None,
) -> None:
    """Write the page from tables and figures that were made before.

    `logs_dir` holds `train/RUN.log`; `study_file` is what the commands of the page name after --configfile.
    """
    plan, tables = read_json(plan_path), read_tables(results_dir / "tables")
    drawn = scenes(plan, tables, results_dir / "facts")
    points, comparisons, runs = records(tables.points), records(tables.comparisons), records(tables.runs)
    gates = records(tables.gates)
    cards = point_card_ids(drawn)
    pictures = [_figure(results_dir / "figures", one) for one in read_json(results_dir / "figures" / "figures.json")]
    main = words.main_experiment(plan)["name"]
    tripped = _tripped(gates, cards)
    context = RunContext(plan["study"], plan["runs"], _baseline_runs(drawn), _by_subject(gates), logs_dir, study_file)
    folder = Path(__file__).parent
    report = plan["report"]
    chunks = (
        _environment()
        .get_template("template.html.j2")
        .generate(
            style=Markup((folder / "style.css").read_text(encoding="utf-8")),
            script=Markup((folder / "map.js").read_text(encoding="utf-8")),
            study=plan["study"],
            title=report.get("title") or plan["study"],
            introduction=report.get("introduction"),
            device=_most_common([point["device"] for point in points if point["experiment"] == main]),
            answers=words.answers(_of(points, main), _of(comparisons, main)),
            main=main,
            has_map=any(point["peak_allocated_bytes"] is not None for point in points),
            map=next((one for one in pictures if (one.experiment, one.kind) == (main, "tradeoff")), None),
            map_data=map_data(drawn, cards, main),
            sections=[
                section(one, _of(points, one["name"]), _of(comparisons, one["name"]), cards[one["name"]])
                for one in plan["experiments"]
            ],
            figures={
                one["name"]: [
                    figure
                    for figure in pictures
                    if figure.experiment == one["name"]
                    and figure.kind not in WHY
                    and (figure.kind, figure.experiment) != ("tradeoff", main)
                ]
                for one in plan["experiments"]
            },
            why=[
                (one["name"], found)
                for one in plan["experiments"]
                if (found := [fig for fig in pictures if fig.experiment == one["name"] and fig.kind in WHY])
            ],
            windows=windows(results_dir / "facts", plan, drawn),
            window_columns=WINDOW_COLUMNS,
            scaling=scaling_rows(records(tables.scaling)),
            gpu_advice=advise_on_gpus(plan, words.main_experiment(plan), _of(points, main), results_dir),
            calibration_plot=calibration_plot(results_dir / CALIBRATION, plan["study"]),
            calibration=read_calibration(
                results_dir / CALIBRATION, plan["study"], {run["run"]: run["outcome"] for run in runs}
            ),
            inference=[inference_row(row) for row in records(tables.inference)],
            inference_columns=INFERENCE,
            published=read_published(results_dir / "tables" / PUBLISHED),
            published_tables=page_tables(records(tables.published_tables)),
            published_figures=[figure for figure in pictures if figure.experiment == PUBLISHED_DRAWING],
            failed=[run | {"word": outcome_word(run["outcome"])} for run in runs if _failed(run)],
            tripped=tripped,
            gate_groups=_groups(tripped),
            fatal_gates=[gate for gate in tripped if gate["is_fatal"]],
            warnings=[gate for gate in tripped if not gate["is_fatal"]],
            gate_count=len(gates),
            definitions={key: one for key, one in DEFINITIONS.items() if any(run.get(key) is not None for run in runs)},
            environment=records(tables.environment),
            study_command=study_command(study_file),
            run_count=len(runs),
            ok_count=sum(run["outcome"] == "ok" for run in runs),
            runs=(_index_row(run) for run in runs),
            point_run_columns=POINT_RUN_COLUMNS,
            point_cards=(card for scene in drawn for card in point_cards(scene, cards[scene.name], plan["runs"])),
            run_cards=run_cards(runs, results_dir / "tables" / "losses.csv", context),
        )
    )
    write_atomic_chunks(output, chunks)


def _environment() -> jinja2.Environment:
    """Every text that comes from data is escaped: only Markup made here is not."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _of(rows: list[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def _failed(run: Row) -> bool:
    return run["outcome"] != "ok" or run["evaluation_outcome"] not in ("ok", "skipped")


def _most_common(values: list[str | None]) -> str | None:
    counts = Counter(value for value in values if value)
    return counts.most_common(1)[0][0] if counts else None


def _tripped(gates: list[Row], cards: dict[str, dict[str, str]]) -> list[Row]:
    """Gates that did not pass, fatal ones first, each with the card of its run or point."""
    tripped = []
    for gate in gates:
        if gate["passed"] in (True, "True"):
            continue
        of_run = gate["scope"] == "run"
        card = run_card_id(gate["subject"]) if of_run else cards.get(gate["experiment"], {}).get(gate["subject"], "")
        tripped.append(gate | {"is_fatal": gate["fatal"] in (True, "True") and of_run, "card": card})
    return sorted(tripped, key=lambda gate: not gate["is_fatal"])


def _groups(tripped: list[Row]) -> list[list[Row]]:
    """Rows of the table of gates: warnings of one gate together where they are many, each other one by itself."""
    counts = Counter(gate["gate"] for gate in tripped if not gate["is_fatal"])
    groups: dict[str | int, list[Row]] = {}
    for number, gate in enumerate(tripped):
        together = not gate["is_fatal"] and counts[gate["gate"]] >= MANY_WARNINGS
        groups.setdefault(gate["gate"] if together else number, []).append(gate)
    return list(groups.values())


def _by_subject(gates: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for gate in gates:
        if gate["scope"] == "run":
            found.setdefault(gate["subject"], []).append(gate)
    return found


def _baseline_runs(drawn: list[Scene]) -> dict[str, str]:
    """For each run, the run of its experiment's baseline that has the same seed; first experiment first."""
    found: dict[str, str] = {}
    for scene in drawn:
        runs = records(scene.runs)
        seeds = {(run["model"], run["dataset"], run["point"], run["seed"]): run["run"] for run in runs}
        for run in runs:
            label = scene.baselines.get((run["model"], run["dataset"]))
            baseline = seeds.get((run["model"], run["dataset"], label, run["seed"]))
            if baseline is not None and run["method_kind"] != "base":
                found.setdefault(run["run"], baseline)
    return found


def _index_row(run: Row) -> Row:
    """A line of the list of all runs."""
    cells = [
        outcome_word(run["outcome"]),
        "—" if run["accuracy"] is None else f"{100 * run['accuracy']:.1f}",
        "—" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}",
        "—" if run["peak_allocated_bytes"] is None else f"{run['peak_allocated_bytes'] / 2**20:,.1f}",
        "—" if run["train_loss"] is None else f"{run['train_loss']:.4f}",
    ]
    return {"card": run_card_id(run["run"]), "run": run["run"], "outcome": run["outcome"], "cells": cells}


# --- figures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page."""

    experiment: str
    kind: str
    title: str
    caption: str
    svg: Markup


def _figure(figures_dir: Path, drawing: dict[str, str]) -> Picture:
    svg = (figures_dir / f"{drawing['name']}.svg").read_text(encoding="utf-8")
    return Picture(
        drawing["experiment"],
        drawing["kind"],
        drawing["title"],
        drawing["caption"],
        inline(svg, drawing["name"], drawing["alt"]),
    )


PATH_DATA = re.compile(r' d="[^"]*"')
LONG_NUMBER = re.compile(r"(\d+\.\d)\d+")


def inline(svg: str, name: str, alt: str) -> Markup:
    """An SVG file for use inside a page: its own ids, the page's greys, a text for readers who do not see it.

    Paths keep a tenth of a point or of a unit of a font, which no screen shows; that halves the page.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = PATH_DATA.sub(lambda found: LONG_NUMBER.sub(r"\1", found.group()).replace("\n", " "), body)
    body = re.sub(r">\s+<", "><", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace(f"fill: {PAPER}", "fill: none", 1)  # the ground, under which the page's own shows
    for colour, replacement in PAGE_COLOURS.items():
        body = body.replace(colour, replacement)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, f"{name}.svg has no viewBox"
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} '
        f'role="img" aria-label="{Markup.escape(alt)}">{rest}'
    )
