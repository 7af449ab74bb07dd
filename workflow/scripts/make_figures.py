"""Draw the figures of a study from its tables."""

import argparse
from pathlib import Path

from tunemap.report.figures import write_figures
from tunemap.script import run_script


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--figures", type=Path, required=True, help="folder to write")
    parser.add_argument("--processes", type=int, default=1, help="how many draw at a time")
    arguments = parser.parse_args()
    write_figures(arguments.results / "tables", arguments.figures, arguments.plan, processes=arguments.processes)


if __name__ == "__main__":
    run_script(main)
