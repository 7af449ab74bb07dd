"""The runs of the workflow that spawned a process: `tunemap.frozen` writes its plan to a file that a variable names.

Apart from it, so that what only asks for the runs does not depend on how a study is planned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunemap.files import read_json
from tunemap.run import Run, canonical_json

VARIABLE = "TUNEMAP_FROZEN_PLAN"  # a list of files, of which the first has the whole plan


def planned_runs(environment: Mapping[str, str]) -> Iterator[Run]:
    """All runs in the plan's order; none where no workflow spawned this process."""
    if VARIABLE in environment:
        whole, *_ = json.loads(environment[VARIABLE])
        for planned in read_json(Path(whole))["runs"].values():
            yield run_of(planned)


def run_of(planned: dict[str, Any]) -> Run:
    """A run from its part of a plan, which says more of it."""
    return Run.from_json(canonical_json({key: planned[key] for key in Run.model_fields}))
