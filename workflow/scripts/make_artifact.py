"""Pack a study for reviewers: sources, settings, results, records, and a README that says how to check them."""

import argparse
from pathlib import Path

from tunemap.report.artifact import pack
from tunemap.script import run_script


def main() -> None:
    """Read the command line, which is run in the checkout, and pack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--results", type=Path, required=True, help="folder of the study's results")
    parser.add_argument("--study-file", required=True, help="the study's file")
    parser.add_argument("--output", type=Path, required=True, help="tar.gz file to write")
    arguments = parser.parse_args()
    pack(Path(), arguments.plan, arguments.results, arguments.output, study_file=arguments.study_file)


if __name__ == "__main__":
    run_script(main)
