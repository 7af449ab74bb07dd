"""Evaluate one run (or the base model) on the test split; every prediction is kept."""

import argparse
from pathlib import Path

from tunemap.evaluation import evaluate_to_files
from tunemap.run import Run
from tunemap.script import run_script
from tunemap.training import finished
from tunemap.training.hostmemory import TRY_AGAIN, HostMemoryError


def main() -> int:
    """Read the command line and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of the run, as `tunemap plan --json` prints it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to evaluate")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the tokenised rows")
    parser.add_argument("--outcome", type=Path, required=True, help="outcome.json of the run")
    parser.add_argument("--weights", type=Path, required=True, help="folder of what was learned")
    parser.add_argument("--work", type=Path, required=True, help="folder of the finished training, not needed any more")
    parser.add_argument("--evaluation", type=Path, required=True, help="json file to write: accuracy and its interval")
    parser.add_argument("--predictions", type=Path, required=True, help="jsonl file to write: each test example")
    parser.add_argument(
        "--attempts-left", type=int, default=0, help="how often this is started again if host memory runs out"
    )
    values = vars(parser.parse_args())
    finished.forget(values.pop("work"))
    try:
        evaluate_to_files(Run.from_json(values.pop("spec")), **values)
    except HostMemoryError as error:
        print(error, flush=True)
        return TRY_AGAIN
    return 0


if __name__ == "__main__":
    run_script(main)
