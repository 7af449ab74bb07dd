"""Write the report of a study: one self-contained html file."""

import argparse
from pathlib import Path

from tunemap.report.page import write_report
from tunemap.script import run_script


def main() -> None:
    """Read the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--output", type=Path, required=True, help="html file to write")
    arguments = parser.parse_args()
    write_report(arguments.plan, arguments.results / "tables", arguments.results / "figures", arguments.output)


if __name__ == "__main__":
    run_script(main)
