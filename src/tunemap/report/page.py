"""The report of a study as one HTML file that opens offline: the answer first, then what it rests on.

Everything in it comes from the tables and figures; nothing is fetched, nothing is computed here but sentences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tunemap.collect import read_tables, write_tables
from tunemap.files import read_json, write_atomic
from tunemap.report import words
from tunemap.report.definitions import DEFINITIONS
from tunemap.report.figures import write_figures
from tunemap.report.formats import p_text, records, signed
from tunemap.report.scene import AXIS, GRID, INK, OUTCOME_WORDS, PAPER

Row = dict[str, Any]
PAGE_COLOURS = {INK: "currentColor", AXIS: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}


def build_report(plan_path: Path, results_dir: Path, output: Path) -> None:
    """From result files to the page: tables, figures and report of results/STUDY."""
    write_tables(plan_path, results_dir)
    write_figures(results_dir / "tables", results_dir / "figures", plan_path)
    write_report(plan_path, results_dir / "tables", results_dir / "figures", output)


def write_report(plan_path: Path, tables_dir: Path, figures_dir: Path, output: Path) -> None:
    """Write the page from tables and figures that were made before."""
    plan, tables = read_json(plan_path), read_tables(tables_dir)
    points, comparisons, runs = records(tables.points), records(tables.comparisons), records(tables.runs)
    gates = records(tables.gates)
    figures = [_figure(figures_dir, drawing) for drawing in read_json(figures_dir / "figures.json")]
    main = words.main_experiment(plan)["name"]
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    report = plan["report"]
    html = environment.get_template("template.html.j2").render(
        style=Markup((folder / "style.css").read_text()),
        study=plan["study"],
        title=report.get("title") or plan["study"],
        introduction=report.get("introduction"),
        answers=words.answers(_of(points, main), _of(comparisons, main)),
        main=main,
        map=next((figure for figure in figures if (figure.experiment, figure.kind) == (main, "tradeoff")), None),
        sections=[
            _section(experiment, _of(points, experiment["name"]), _of(comparisons, experiment["name"]), figures, main)
            for experiment in plan["experiments"]
        ],
        run_count=len(runs),
        ok_count=sum(run["outcome"] == "ok" for run in runs),
        scaling=[scaling_cells(row) for row in records(tables.scaling)],
        failed=[run | {"word": OUTCOME_WORDS.get(run["outcome"], run["outcome"])} for run in runs if _failed(run)],
        tripped=[gate for gate in gates if gate["passed"] in (False, "False")],
        gate_count=len(gates),
        definitions={key: one for key, one in DEFINITIONS.items() if any(run.get(key) is not None for run in runs)},
        environment=records(tables.environment),
    )
    write_atomic(output, html)


def scaling_cells(row: Row) -> list[str]:
    """One row of the scaling table as text."""

    def interval(name: str, digits: int, factor: float = 1.0) -> str:
        value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
        if value is None:
            return row["reason"] or "—"
        middle = f"{value * factor:.{digits}f}"
        return middle if low is None else f"{middle} ({low * factor:.{digits}f} to {high * factor:.{digits}f})"

    sent, peak = row["communication_bytes_per_step"], row["peak_allocated_bytes"]
    return [
        f"{row['mode']}: {row['method']} · {row['strategy']}",
        f"{row['gpus']}",
        "—" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        interval("speed_up", 2),
        interval("efficiency", 0, 100),
        "—" if peak is None else f"{peak / 2**20:,.1f}",
        "—" if sent is None else f"{sent / 2**20:,.2f}",
    ]


def _of(rows: list[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def _failed(run: Row) -> bool:
    return run["outcome"] != "ok" or run["evaluation_outcome"] not in ("ok", "skipped")


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
    svg = (figures_dir / f"{drawing['name']}.svg").read_text()
    return Picture(
        drawing["experiment"],
        drawing["kind"],
        drawing["title"],
        drawing["caption"],
        inline(svg, drawing["name"], drawing["alt"]),
    )


def inline(svg: str, name: str, alt: str) -> Markup:
    """An SVG file for use inside a page: its own ids, the page's greys, a text for readers who do not see it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, replacement in PAGE_COLOURS.items():
        body = body.replace(colour, replacement)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, f"{name}.svg has no viewBox"
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} '
        f'role="img" aria-label="{Markup.escape(alt)}">{rest}'
    )


# --- sections ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """An experiment in the page."""

    name: str
    question: str
    vary: str
    verdict: str
    columns: list[str]
    rows: list[list[Cell]]
    caveats: list[str]
    figures: list[Picture]


def _section(
    experiment: dict[str, Any], points: list[Row], comparisons: list[Row], figures: list[Picture], main: str
) -> Section:
    by_label = {(row["model"], row["dataset"], row["point"]): row for row in comparisons}
    places = len({(point["model"], point["dataset"]) for point in points})
    rows = [_cells(point, by_label.get((point["model"], point["dataset"], point["point"]))) for point in points]
    caveats: dict[str, list[str]] = {}
    for row in comparisons:
        for caveat in filter(None, [row["caveat"], f"not compared: {row['refused']}" if row["refused"] else None]):
            caveats.setdefault(caveat, []).append(row["point"])
    return Section(
        name=experiment["name"],
        question=experiment["question"],
        vary=", ".join(experiment["vary"]) or "nothing",
        verdict=words.verdict([row for row in comparisons if by_label and not _is_base(points, row)])
        + (" Points are compared within each model and dataset." if places > 1 else ""),
        columns=COLUMNS,
        rows=rows,
        caveats=[f"{', '.join(names)}: {caveat}." for caveat, names in caveats.items()],
        figures=[
            one
            for one in figures
            if one.experiment == experiment["name"] and (one.kind, one.experiment) != ("tradeoff", main)
        ],
    )


def _is_base(points: list[Row], comparison: Row) -> bool:
    return any(point["point"] == comparison["point"] and point["method_kind"] == "base" for point in points)


COLUMNS = [
    "Point",
    "Runs ok",
    "Accuracy, %",
    "Throughput, tokens/s",
    "Peak memory, MiB",
    "Loss",
    "Trainable parameters",
    "Pareto front",
]
Cell = tuple[str, str]  # a value, and below it how it compares with the baseline


def _cells(point: Row, comparison: Row | None) -> list[Cell]:
    """One row of an experiment's table; an em dash is a value that does not exist."""
    compared = comparison if comparison and not comparison["refused"] else {}
    is_baseline = comparison is None and point["method_kind"] != "base"
    accuracy = words.accuracy_text(point).replace(" %", "")
    cells = [
        (point["point"], "baseline" if is_baseline else ""),
        (f"{point['seeds']} of {point['runs']}", ""),
        (accuracy, _difference(compared)),
        (_with_interval(point, "tokens_per_second", 1, 0), _ratio(compared, "throughput")),
        (_with_interval(point, "peak_allocated_bytes", 2**-20, 1), _ratio(compared, "memory")),
        ("" if point["train_loss"] is None else f"{point['train_loss']:.3g}", ""),
        ("" if point["trainable_parameters"] is None else f"{point['trainable_parameters']:,.0f}", ""),
        (point["front"] or "", ""),
    ]
    return [(value or "—", below) for value, below in cells]


def _difference(row: Row) -> str:
    if row.get("accuracy_difference") is None:
        return ""
    low, high = signed(100 * row["accuracy_difference_low"]), signed(100 * row["accuracy_difference_high"])
    test = f", p {p_text(row['accuracy_p_holm'])}" if row["accuracy_p_holm"] is not None else ""
    return f"{signed(100 * row['accuracy_difference'])} ({low} to {high}): {row['accuracy_verdict']}{test}"


def _ratio(row: Row, measure: str) -> str:
    ratio, low, high = (row.get(f"{measure}_ratio{suffix}") for suffix in ("", "_low", "_high"))
    if ratio is None:
        return ""
    text = f"{ratio:.2f}×"
    if low is not None and high is not None and low != high:
        text += f" ({low:.2f} to {high:.2f})"
    verdict = row.get(f"{measure}_verdict")
    return f"{text}: {verdict}" if verdict else text


def _with_interval(point: Row, name: str, factor: float, digits: int) -> str:
    if point[name] is None:
        return ""
    text = f"{point[name] * factor:,.{digits}f}"
    low, high = point[f"{name}_low"], point[f"{name}_high"]
    if low is None or low == high:
        return text
    return f"{text} ({low * factor:,.{digits}f} to {high * factor:,.{digits}f})"
