"""`tunemap figure NAME`: draw one figure of a study again, for a paper, from the tables that are there."""

from __future__ import annotations

import argparse
from pathlib import Path

from tunemap.errors import UserError

DEFAULT_STUDY = Path("results/quickstart")


def add_figure_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `tunemap figure`."""
    parser.add_argument("name", help="EXPERIMENT-KIND, such as methods-tradeoff; a wrong name lists all")
    parser.add_argument(
        "--study", type=Path, default=DEFAULT_STUDY, metavar="results/STUDY", help=f"default: {DEFAULT_STUDY}"
    )
    parser.add_argument("--run", action="append", metavar="RUN", help="only the point of this run; may be given again")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write to (default: this one)")


def run_figure(arguments: argparse.Namespace) -> int:
    """Write NAME.svg, .pdf and .png, and print the caption."""
    from tunemap.report.figures import FORMATS, redraw  # matplotlib takes a second, which --help need not wait for

    if not (arguments.study / "plan.json").exists():
        raise UserError(f"{arguments.study}: no plan.json; give the folder of a study's results")
    drawing = redraw(arguments.study, arguments.name, arguments.output, arguments.run or ())
    for ending in FORMATS:
        print(arguments.output / f"{drawing.name}.{ending}")
    print(f"{drawing.title}. {drawing.caption}")
    return 0
