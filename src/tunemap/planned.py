"""The runs of the workflow that spawned a process: `tunemap.frozen` writes its plan to a file that a variable names.

Apart from it, so that what only asks for the runs does not depend on how a study is planned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunemap.files import read_json
from tunemap.run import Run, canonical_json

VARIABLE = "TUNEMAP_FROZEN_PLAN"  # a list of files, of which the first has the whole plan


def planned_runs(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the plan says of each run, by its id; nothing where no workflow spawned this process."""
    if VARIABLE not in environment:
        return {}
    whole, *_ = json.loads(environment[VARIABLE])
    runs: dict[str, dict[str, Any]] = read_json(Path(whole))["runs"]
    return runs


def run_of(planned: dict[str, Any]) -> Run:
    """A run from its part of a plan, which says more of it."""
    return Run.from_json(canonical_json({key: planned[key] for key in Run.model_fields}))
