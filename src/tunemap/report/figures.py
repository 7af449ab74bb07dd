"""The figures of a study, drawn from its tables: the same tables give the same bytes.

    figures/EXPERIMENT-tradeoff | accuracy | throughput | memory | loss | waterfall | step | ranks .svg .pdf .png
    figures/figures.json        title, caption and alternative text of each, for the report

A method has one colour in all figures of a study. Runs that failed are marked where their number would stand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from tunemap.collect import read_tables
from tunemap.files import read_json, write_atomic
from tunemap.report.loss_figure import draw_loss
from tunemap.report.point_figures import draw_accuracy, draw_memory, draw_throughput
from tunemap.report.rank_map import draw_ranks
from tunemap.report.scene import Scene, scenes
from tunemap.report.step_figure import draw_step
from tunemap.report.tradeoff_figure import draw_tradeoff
from tunemap.report.waterfall_figure import draw_waterfall

STYLE = Path(__file__).with_name("tunemap.mplstyle")
FORMATS: dict[str, dict[str, Any]] = {  # no dates, so that equal input gives equal files
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@dataclass(frozen=True)
class Drawing:
    """What the report says about a figure; `name` is the file name without its ending."""

    name: str
    experiment: str
    kind: str
    title: str
    caption: str
    alt: str


def write_figures(tables_dir: Path, figures_dir: Path, plan_path: Path) -> None:
    """Draw every figure that has something to show, as SVG, PDF and PNG, and figures.json that describes them."""
    drawings = []
    with matplotlib.style.context(STYLE):
        for scene in scenes(read_json(plan_path), read_tables(tables_dir), figures_dir.parent / "facts"):
            for kind, (draw, title) in KINDS.items():
                drawn = draw(scene)
                if drawn is None:
                    continue
                figure, caption, alt = drawn
                name = f"{scene.name}-{kind}"
                for ending, metadata in FORMATS.items():
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=ending, metadata=metadata)
                    write_atomic(figures_dir / f"{name}.{ending}", buffer.getvalue())
                drawings.append(Drawing(name, scene.name, kind, title, caption, alt))
    index = [asdict(drawing) for drawing in drawings]
    write_atomic(figures_dir / "figures.json", json.dumps(index, indent=1, ensure_ascii=False) + "\n")


KINDS: dict[str, tuple[Callable[[Scene], tuple[Figure, str, str] | None], str]] = {
    "tradeoff": (draw_tradeoff, "Trade-off map"),
    "accuracy": (draw_accuracy, "Accuracy"),
    "throughput": (draw_throughput, "Throughput"),
    "memory": (draw_memory, "Peak memory"),
    "loss": (draw_loss, "Loss"),
    "waterfall": (draw_waterfall, "From the baseline, part by part"),
    "step": (draw_step, "Where a step goes"),
    "ranks": (lambda scene: draw_ranks(scene.ranks), "Ranks and importances by layer"),
}
