"""The figures of a study, drawn from its tables: the same tables give the same bytes.

    figures/EXPERIMENT-KIND   .svg, .pdf, .png: tradeoff accuracy throughput memory loss waterfall scaling step
                              timeline roofline ranks
    figures/figures.json      title, caption and alternative text of each, for the report

A method has one colour in all figures of a study. Runs that failed are marked where their number would stand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from tunemap.collect import read_tables
from tunemap.errors import UserError, nearest
from tunemap.files import read_json, write_atomic
from tunemap.report.formats import records
from tunemap.report.loss_figure import draw_loss
from tunemap.report.point_figures import draw_accuracy, draw_memory, draw_throughput
from tunemap.report.published_figures import FIGURES as PUBLISHED_FIGURES
from tunemap.report.published_figures import published_figures
from tunemap.report.published_tables import Source
from tunemap.report.rank_map import draw_ranks
from tunemap.report.roofline_figure import draw_roofline
from tunemap.report.scaling_figure import draw_scaling
from tunemap.report.scene import Scene, scenes
from tunemap.report.step_figure import draw_step
from tunemap.report.timeline_figure import draw_timeline
from tunemap.report.tradeoff_figure import draw_tradeoff
from tunemap.report.waterfall_figure import draw_waterfall

STYLE = Path(__file__).with_name("tunemap.mplstyle")
FORMATS: dict[str, dict[str, Any]] = {  # no dates, so that equal input gives equal files
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}

PUBLISHED = "published"  # where a drawing belongs that repeats a published figure, in place of an experiment


@dataclass(frozen=True)
class Drawing:
    """What the report says about a figure; `name` is the file name without its ending."""

    name: str
    experiment: str
    kind: str
    title: str
    caption: str
    alt: str


def write_figures(tables_dir: Path, figures_dir: Path, plan_path: Path, *, processes: int = 1) -> None:
    """Draw every figure that has something to show, as SVG, PDF and PNG, and figures.json that describes them."""
    plan, facts_dir = read_json(plan_path), figures_dir.parent / "facts"
    drawn = _draw_all(plan, tables_dir, facts_dir, figures_dir, None, processes=processes)
    index = [asdict(one) for one in drawn]
    write_atomic(figures_dir / "figures.json", json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def describe(results_dir: Path) -> list[dict[str, str]]:
    """What figures.json should say of a study, from its tables; nothing is written."""
    plan = read_json(results_dir / "plan.json")
    return [asdict(one) for one in _draw_all(plan, results_dir / "tables", results_dir / "facts", None, None)]


def redraw(results_dir: Path, name: str, output_dir: Path, runs: Sequence[str] = ()) -> Drawing:
    """Draw one figure of a study again, from its tables, into any folder; with `runs`, only the points that hold them.

    Raises UserError that names the study's figures where it has none of this name, or nothing to show in it, and
    where a run is none of the experiment's.
    """
    plan = read_json(results_dir / "plan.json")
    names = [f"{experiment['name']}-{kind}" for experiment in plan["experiments"] for kind in KINDS]
    published = PUBLISHED_FIGURES.get(plan["report"].get("published"), ())
    if runs and name in published:
        raise UserError(f"figure {name} repeats a published one, whose points are given; leave --run out")
    names += published
    if name not in names:
        meant = nearest(name, names)
        raise UserError(f"no figure '{name}'{f'; did you mean {meant}?' if meant else '.'} Known: {', '.join(names)}")
    drawn = list(_draw_all(plan, results_dir / "tables", results_dir / "facts", output_dir, name, runs))
    if not drawn:
        raise UserError(f"figure {name} has nothing to show: its values were not measured in {results_dir}")
    return drawn[0]


def _draw_all(
    plan: dict[str, Any],
    tables_dir: Path,
    facts_dir: Path,
    output_dir: Path | None,
    only: str | None,
    runs: Sequence[str] = (),
    *,
    processes: int = 1,
) -> Iterator[Drawing]:
    tables = read_tables(tables_dir)
    asked = [
        (scene.only(runs) if runs else scene, kind)
        for scene in scenes(plan, tables, facts_dir)
        for kind in KINDS
        if only in (None, f"{scene.name}-{kind}")
    ]
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        drawn = (pool.map if pool else map)(partial(_draw, output_dir), asked)
        yield from (drawing for drawing in drawn if drawing is not None)
    study = plan["report"].get("published")
    if study is None or runs:  # a published figure has no points to choose from
        return
    rows = (records(table) for table in (tables.points, tables.runs, tables.comparisons, tables.gates))
    with matplotlib.style.context(STYLE):
        for name, title, figure, caption, alt in published_figures(
            study, Source(plan, *rows), tables.losses, facts_dir
        ):
            if only in (None, name):
                _save(figure, name, output_dir)
                yield Drawing(name, PUBLISHED, name, title, caption, alt)


def _draw(output_dir: Path | None, asked: tuple[Scene, str]) -> Drawing | None:
    """Draw one kind of figure of an experiment, in any process; None where it has nothing to show."""
    scene, kind = asked
    draw, title = KINDS[kind]
    with matplotlib.style.context(STYLE):
        drawn = draw(scene)
        if drawn is None:
            return None
        figure, caption, alt = drawn
        name = f"{scene.name}-{kind}"
        _save(figure, name, output_dir)
        return Drawing(name, scene.name, kind, title, caption, alt)


def _save(figure: Figure, name: str, output_dir: Path | None) -> None:
    if output_dir and figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # lays it out, once for all formats
        figure.set_layout_engine("none")
    for ending, metadata in FORMATS.items() if output_dir else ():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, metadata=metadata)
        write_atomic(output_dir / f"{name}.{ending}", buffer.getvalue())  # type: ignore[operator]


KINDS: dict[str, tuple[Callable[[Scene], tuple[Figure, str, str] | None], str]] = {
    "tradeoff": (draw_tradeoff, "Trade-off map"),
    "accuracy": (draw_accuracy, "Accuracy"),
    "throughput": (draw_throughput, "Throughput"),
    "memory": (draw_memory, "Peak memory"),
    "loss": (draw_loss, "Loss"),
    "waterfall": (draw_waterfall, "From the baseline, part by part"),
    "scaling": (draw_scaling, "Scaling over devices"),
    "step": (draw_step, "Where a step goes"),
    "timeline": (draw_timeline, "One step over time"),
    "roofline": (draw_roofline, "What limits the kernels"),
    "ranks": (lambda scene: draw_ranks(scene.ranks), "Ranks and importances by layer"),
}
