"""Repeat the first steps of a run under a profiler."""

import argparse
from pathlib import Path

from tunemap.capture.launch import capture
from tunemap.run import Run
from tunemap.script import run_script


def main() -> None:
    """Read the command line and capture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of the run, as `tunemap plan --json` prints it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--backend", choices=["auto", "torch", "nsys", "ncu"], default="auto", help="which profiler")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the tokenised rows")
    parser.add_argument("--outcome", type=Path, required=True, help="outcome.json of the run")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write")
    values = vars(parser.parse_args())
    capture(Run.from_json(values.pop("spec")), **values)


if __name__ == "__main__":
    run_script(main)
