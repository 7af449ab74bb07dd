"""Collect all results of a study into tables."""

import argparse
from pathlib import Path

from tunemap.collect import write_tables
from tunemap.script import run_script


def main() -> None:
    """Read the command line and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results")
    arguments = parser.parse_args()
    write_tables(arguments.plan, arguments.results)


if __name__ == "__main__":
    run_script(main)
