"""Turn the rows of a dataset into the token ids of a model, and say what was cut, padded and packed."""

import argparse
import json
from pathlib import Path

from tunemap.data.tokens import tokenize
from tunemap.script import run_script


def main() -> None:
    """Read the command line and tokenise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON with max_length, prompt_template, system_prompt")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared model")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the prepared rows")
    parser.add_argument("--destination", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    spec = json.loads(arguments.spec)
    tokenize(
        arguments.dataset,
        arguments.model,
        arguments.destination,
        max_length=spec["max_length"],
        prompt_template=spec["prompt_template"],
        system_prompt=spec["system_prompt"],
    )


if __name__ == "__main__":
    run_script(main)
