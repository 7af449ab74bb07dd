"""The plan that a running workflow keeps to, whatever happens to the study file meanwhile.

A job that waits in a queue parses the workflow anew when it starts. It must train what was planned when it was
submitted, not what config.yaml says by then: the first process writes the plan to a file named by its content and
hands the name to all it spawns.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tunemap.data.locate import source_files
from tunemap.errors import UserError
from tunemap.files import read_json, write_atomic
from tunemap.models.locate import model_files
from tunemap.paths import expanded
from tunemap.planned import VARIABLE, run_of
from tunemap.planner.cache import known_prediction
from tunemap.planner.prediction import Prediction
from tunemap.run import Run, canonical_json, digest
from tunemap.study import Plan

REPORT_WORDING = ("title", "introduction")  # what only the report reads
PLACES = ("data_root",)  # where things lie, which no table depends on


@dataclass(frozen=True)
class FrozenPlan:
    """A plan read from its file; answers what the rules of the workflow ask."""

    report_file: str  # the whole plan
    tables_file: str  # the plan without what only the report reads
    values: dict[str, Any]

    @property
    def study(self) -> str:
        """Name of the study."""
        return str(self.values["study"])

    @property
    def device(self) -> str:
        """`hardware.device` of the study."""
        return str(self.values["hardware"]["device"])

    @property
    def data_root(self) -> str:
        """Where relative paths start, with ~ and variables expanded."""
        return expanded(self.values["data_root"])

    @cached_property
    def runs(self) -> dict[str, Run]:
        """All runs by id."""
        return {name: run_of(values) for name, values in self.values["runs"].items()}

    @cached_property
    def _by_key(self) -> dict[str, dict[str, Run]]:
        keys = ("model_key", "dataset_key", "tokens_key")
        return {key: {getattr(run, key): run for run in self.runs.values()} for key in keys}

    @cached_property
    def _predictions(self) -> dict[str, Prediction]:
        return {}

    @property
    def captures(self) -> dict[str, str]:
        """Profilers by run: each run once, as the first of the experiments says that ask for it."""
        experiments = reversed(self.values["experiments"])
        return {run: experiment["profile"] for experiment in experiments for run in experiment["captures"]}

    @property
    def inferences(self) -> list[str]:
        """Runs whose inference is measured, each once however many experiments ask for it."""
        return list(dict.fromkeys(run for one in self.values["experiments"] for run in one["inferences"]))

    @property
    def rooflines(self) -> set[str]:
        """Runs whose kernels are measured one by one."""
        return {run for one in self.values["experiments"] for run in one["rooflines"]}

    def training_spec(self, run: str) -> str:
        """Canonical JSON of what training of a run depends on."""
        return canonical_json(self.runs[run].training_spec())

    def evaluation_spec(self, run: str) -> str:
        """Canonical JSON of what evaluation of a run depends on."""
        return canonical_json(self.runs[run].evaluation_spec())

    def prediction(self, run: str) -> Prediction | None:
        """What `tunemap plan` found out about a run; None where it was not asked."""
        if run not in self._predictions:  # an absent one is asked for again: data are prepared meanwhile
            hardware = self.values["hardware"]
            found = known_prediction(self.runs[run], device=hardware["device"], description=hardware["description"])
            if found is None:
                return None
            self._predictions[run] = found
        return self._predictions[run]

    def model_spec(self, key: str) -> str:
        """Canonical JSON of the model that a folder of prepared models holds."""
        return canonical_json(self._of("model_key", key).model.model_dump(mode="json"))

    def model_sources(self, key: str) -> list[str]:
        """Local files that the model is made from."""
        return [str(path) for path in model_files(self._of("model_key", key).model, Path(self.data_root))]

    def dataset_spec(self, key: str) -> str:
        """Canonical JSON of the dataset that a folder of prepared rows holds."""
        return canonical_json(self._of("dataset_key", key).dataset_spec())

    def dataset_sources(self, key: str) -> list[str]:
        """Local files that the rows are read from."""
        return [str(path) for path in source_files(self._of("dataset_key", key).dataset, Path(self.data_root))]

    def tokens_run(self, key: str) -> Run:
        """A run that uses a folder of tokens; all of them agree on what matters for it."""
        return self._of("tokens_key", key)

    def tokens_spec(self, key: str) -> str:
        """Canonical JSON of how rows become tokens."""
        return canonical_json(self._of("tokens_key", key).tokens_spec())

    def _of(self, kind: str, key: str) -> Run:
        runs = self._by_key[kind]
        if key not in runs:
            raise UserError(f"no run of study {self.study} uses {key}; it uses: {', '.join(runs)}")
        return runs[key]


def freeze(plan: Plan, folder: Path, environment: MutableMapping[str, str]) -> FrozenPlan:
    """Write the plan under names made of its content, and name it in `environment` for spawned jobs."""
    whole = plan.to_dict()
    wording = {key: value for key, value in whole["report"].items() if key not in REPORT_WORDING}
    tables = {key: value for key, value in whole.items() if key not in PLACES} | {"report": wording}
    report_file, tables_file = (_write(folder, name, values) for name, values in (("plan", whole), ("tables", tables)))
    environment[VARIABLE] = canonical_json([str(report_file.resolve()), str(report_file), str(tables_file)])
    return FrozenPlan(str(report_file), str(tables_file), whole)


def thaw(environment: MutableMapping[str, str]) -> FrozenPlan | None:
    """The plan of the workflow that spawned this process; None in the first process."""
    if VARIABLE not in environment:
        return None
    absolute, report_file, tables_file = json.loads(environment[VARIABLE])
    return FrozenPlan(report_file, tables_file, read_json(Path(absolute)))


def _write(folder: Path, name: str, values: dict[str, Any]) -> Path:
    path = folder / f"{name}-{digest(values)}.json"
    if not path.exists():
        write_atomic(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return path
