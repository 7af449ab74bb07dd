"""Train one run and write its outcome, also when it fails; start it again after a kill and it resumes."""

import argparse
from pathlib import Path

from tunemap.run import Run
from tunemap.script import run_script
from tunemap.training.launch import Paths, launch


def main() -> int:
    """Read the command line and launch the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of the run, as `tunemap plan --json` prints it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    for name, meaning in {
        "model": "folder of the prepared model",
        "dataset": "folder of the prepared rows",
        "tokens": "folder of the tokenised rows",
        "work": "folder of checkpoints, removed at the end",
        "weights": "folder to write what was learned to",
        "steps": "csv file to write, one row per step and rank",
        "outcome": "json file to write: how the run ended, and its measurements",
    }.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=meaning)
    parser.add_argument("--ceilings", type=Path, help="json file of `tunemap ceiling`, read if it is there")
    parser.add_argument(
        "--attempts-left", type=int, default=0, help="how often this is started again if host memory runs out"
    )
    values = vars(parser.parse_args())
    run, device, attempts_left = (values.pop(name) for name in ("spec", "device", "attempts_left"))
    return launch(Run.from_json(run), Paths(**values), device=device, attempts_left=attempts_left)


if __name__ == "__main__":
    run_script(main)
