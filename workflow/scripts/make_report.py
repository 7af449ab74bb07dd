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
    parser.add_argument("--logs", type=Path, help="folder of the study's logs; their ends stand in the cards of runs")
    parser.add_argument("--study-file", help="the study's file, for the commands that repeat a run")
    parser.add_argument("--output", type=Path, required=True, help="html file to write")
    arguments = parser.parse_args()
    write_report(
        arguments.plan,
        arguments.results,
        arguments.output,
        logs_dir=arguments.logs,
        study_file=arguments.study_file,
    )


if __name__ == "__main__":
    run_script(main)
