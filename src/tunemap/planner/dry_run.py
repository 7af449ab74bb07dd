"""Whether a command line of Snakemake asks for a plan in words, which is when the planning table belongs to it.

While the workflow is parsed Snakemake does not know yet that it will only be a dry run, so its arguments are read.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

DRY_RUN = ("--dry-run", "--dryrun")
SHORT = re.compile(r"-[Fafkpqvt]*n[A-Za-z]*")  # -n, alone or after others that take no value
# Answers for programs: a table would be in their way.
OTHER_ANSWERS = (
    "--dag", "--rulegraph", "--filegraph", "--d3dag", "--summary", "--detailed-summary", "--lint", "--quiet", "-q",
    "--list-rules", "--list-target-rules", "--print-compilation",
)  # fmt: skip
SWITCH = "TUNEMAP_PLANNING"  # `off` in the environment leaves the table out


def wants_table(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the table should be printed before the jobs."""
    names = [argument.partition("=")[0] for argument in arguments]
    dry = any(name in DRY_RUN or SHORT.fullmatch(name) for name in names)
    return dry and environment.get(SWITCH) != "off" and not any(name in OTHER_ANSWERS for name in names)


def print_table(study: Path, given: Mapping[str, str], package: Path) -> None:
    """Let another process predict the runs of a study file and print the table, below `package` in its path.

    `given`: data_root and scale, as `--config` gives them.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-m", "tunemap.cli", "plan", str(study), "--predict", *options],
        env=os.environ | {"PYTHONPATH": path},
    )
