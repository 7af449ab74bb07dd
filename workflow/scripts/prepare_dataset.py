"""Write a dataset's rows to train.jsonl and test.jsonl, whatever their source."""

import argparse
from pathlib import Path

from tunemap.config import DatasetConfig
from tunemap.data.sources import prepare
from tunemap.script import run_script


def main() -> None:
    """Read the command line and prepare the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of one entry of `datasets`")
    parser.add_argument("--data-root", type=Path, default=Path(), help="where relative paths start")
    parser.add_argument("--destination", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    prepare(DatasetConfig.model_validate_json(arguments.spec), arguments.destination, data_root=arguments.data_root)


if __name__ == "__main__":
    run_script(main)
