"""Read the traces of a capture into facts: kernels, phases, communication, gaps."""

import argparse
from pathlib import Path

from tunemap.capture.extract import extract
from tunemap.script import run_script


def main() -> None:
    """Read the command line and extract."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capture", type=Path, required=True, help="folder of the capture")
    parser.add_argument("--roofline", type=Path, help="folder of the capture of single kernels")
    parser.add_argument("--facts", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    extract(arguments.capture, arguments.facts, roofline=arguments.roofline)


if __name__ == "__main__":
    run_script(main)
