"""Write a model to a folder in hub layout: downloaded, copied, drawn at random, or built and pretrained here."""

import argparse
from pathlib import Path

from pydantic import TypeAdapter

from tunemap.config import ModelConfig
from tunemap.models import prepare
from tunemap.script import run_script


def main() -> None:
    """Read the command line and prepare the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="JSON of one entry of `models`")
    parser.add_argument("--data-root", type=Path, default=Path(), help="where relative paths start")
    parser.add_argument("--destination", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    model = TypeAdapter(ModelConfig).validate_json(arguments.spec)
    prepare(model, arguments.destination, data_root=arguments.data_root, show_progress=True)


if __name__ == "__main__":
    run_script(main)
