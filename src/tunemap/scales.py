"""A study at another size: the same questions with other models, data and steps, and results of their own."""

from __future__ import annotations

from typing import Any, TypeVar

from tunemap.config import Experiment, ScaledExperiment, Section, Study, given
from tunemap.errors import UserError

SectionType = TypeVar("SectionType", bound=Section)


def at_scale(study: Study, name: str | None) -> Study:
    """The study with what its scale `name` replaces; None: the study as it stands.

    Models, datasets and methods are replaced whole, factors one by one, lists whole. The result is called STUDY-SCALE,
    so that its results lie beside those of the study and never among them. Raises UserError for an unknown scale, and
    where a scale names an experiment that the study does not have.
    """
    if name is None:
        return study
    if name not in study.scales:
        allowed = ", ".join(study.scales) or "none, the study has no scales"
        raise UserError(f"scale {name}: unknown; allowed: {allowed}")
    scale = study.scales[name]
    known = [experiment.name for experiment in study.experiments]
    if unknown := sorted(set(scale.experiments) - set(known)):
        raise UserError(f"scales.{name}.experiments: unknown experiment '{unknown[0]}'; declared: {', '.join(known)}")
    return study.model_copy(
        update={
            "study": f"{study.study}-{name}",
            "data_root": scale.data_root if scale.data_root is not None else study.data_root,
            "models": study.models | scale.models,
            "datasets": study.datasets | scale.datasets,
            "methods": study.methods | scale.methods,
            "defaults": _merged(study.defaults, scale.defaults),
            "experiments": [_scaled(one, scale.experiments.get(one.name)) for one in study.experiments],
            "hardware": _merged(study.hardware, scale.hardware),
            "scales": {},
        }
    )


def _merged(section: SectionType, changes: Section) -> SectionType:
    """The section with the keys that `changes` gives."""
    return type(section).model_validate(given(section) | given(changes))


def _scaled(experiment: Experiment, change: ScaledExperiment | None) -> Experiment:
    if change is None:
        return experiment
    lists: dict[str, Any] = {
        key: getattr(change, key) for key in ("seeds", "exclude", "only") if getattr(change, key) is not None
    }
    factors = {key: _merged(getattr(experiment, key), getattr(change, key)) for key in ("fixed", "vary")}
    return experiment.model_copy(update=factors | lists)
