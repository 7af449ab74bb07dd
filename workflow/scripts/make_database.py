"""Write a study as one SQLite file."""

import argparse
from pathlib import Path

from tunemap.report.database import write_database
from tunemap.script import run_script


def main() -> None:
    """Read the command line and write the database."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--output", type=Path, required=True, help="SQLite file to write")
    arguments = parser.parse_args()
    write_database(arguments.plan, arguments.results, arguments.output)


if __name__ == "__main__":
    run_script(main)
