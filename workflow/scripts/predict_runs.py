"""Predict what each run of a study needs, once its models and tokens are there."""

import argparse
from pathlib import Path

from tunemap.planner.plan import predict_to_file
from tunemap.planner.table import Ticker
from tunemap.script import run_script


def main() -> None:
    """Read the command line and predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True, help="the plan of the study")
    parser.add_argument("--data-root", type=Path, default=Path(), help="where relative paths start")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    parser.add_argument("--output", type=Path, required=True, help="json file to write: run id -> prediction")
    arguments = parser.parse_args()
    predict_to_file(
        arguments.plan, arguments.data_root, arguments.output, results=arguments.results, progress=Ticker("planning")
    )


if __name__ == "__main__":
    run_script(main)
