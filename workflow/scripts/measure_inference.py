"""Measure latency, speed and memory of a finished run when it is used."""

import argparse
from pathlib import Path

from tunemap.run import Run
from tunemap.script import run_script
from tunemap.startup import quick_imports


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of the run, as `tunemap plan --json` prints it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to measure")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the tokenised rows")
    parser.add_argument("--outcome", type=Path, required=True, help="outcome.json of the run")
    parser.add_argument("--weights", type=Path, required=True, help="folder of what was learned")
    parser.add_argument("--output", type=Path, required=True, help="json file to write: a record per form")
    values = vars(parser.parse_args())
    with quick_imports():
        from tunemap.inference import measure_to_file
    measure_to_file(Run.from_json(values.pop("spec")), **values)


if __name__ == "__main__":
    run_script(main)
