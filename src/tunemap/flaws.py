"""Known flaws that a study would repeat, found in its plan; it runs only if it accepts each by its id.

The flaws are those of three published studies, numbered as in docs/validity.md. Accepting one lets a replication run
as it was published: the gates that stop the flaw warn in place of refusing, and the report says so beside the numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunemap.config import LowRankMethod
from tunemap.gates.result import GateResult
from tunemap.run import Run

# Gates that an accepted flaw turns into warnings. A run without any label is let in by F02 and ended by its loss, 0/0:
# finite_loss is let through by nothing.
LETS_THROUGH = {"F02": ("labels", "truncation"), "F04": ("fsdp_units",)}
BATCH_FACTORS = ("per_device_batch_size", "gradient_accumulation", "gpus")
MANY_FACTORS = 3  # varied together without a single step, they are no design; two may be tied by intention


@dataclass(frozen=True)
class Flaw:
    """One flaw of a plan: its id, what repeats it, and how to do without it."""

    id: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} ({self.id}); {self.remedy}, or write accept_flaws: [{self.id}]"


def run_flaws(run: Run) -> Iterator[Flaw]:
    """Flaws of a single run."""
    dataset, factors = run.dataset, run.factors
    if run.prompt_template is not None and dataset.accept_truncation and not run.is_base:
        what = f"dataset {run.dataset_name} trains on answers that its prompt template leaves no room for"
        yield Flaw("F02", what, "leave accept_truncation out and raise max_length")
    if factors.fsdp_unit == "model":
        yield Flaw("F04", "fsdp_unit model gathers the whole model at once", "use fsdp_unit block")
    if dataset.held_out_share is not None:
        what = f"dataset {run.dataset_name} is evaluated on {dataset.held_out_share:.0%} of its training rows"
        yield Flaw("F13", what, "leave held_out_share out")
    if factors.extraction == "hpml":
        yield Flaw("F14", "extraction hpml counts right answers as wrong", "use extraction lm_eval")


def experiment_flaws(runs: Collection[Run], vary: Collection[str]) -> Iterator[Flaw]:
    """Flaws of a comparison: what differs between the methods of an experiment besides what it varies."""
    if "method.adapter_dtype" not in vary:
        dtypes = {run.method_name: run.method.adapter_dtype for run in runs if isinstance(run.method, LowRankMethod)}
        if len(set(dtypes.values())) > 1:
            yield Flaw(
                "F05", f"adapters are kept in different dtypes ({_listed(dtypes)})", "give them one adapter_dtype"
            )
    if not set(BATCH_FACTORS) & set(vary):
        batches = {run.method_name: _global_batch(run) for run in runs}
        if len(set(batches.values())) > 1:
            what = f"methods are compared at different batch sizes ({_listed(batches)})"
            yield Flaw("F32", what, "give them one batch size, or vary it")
    if "gradient_checkpointing" not in vary:
        recomputing = {run.method_name: run.factors.gradient_checkpointing for run in runs}
        if len(set(recomputing.values())) > 1:
            named = ", ".join(name for name, on in recomputing.items() if on)
            what = f"gradient checkpointing is on for some methods only ({named})"
            yield Flaw("F39", what, "give it to all or to none, or vary it")
    if tied := _tied_factors(runs, vary):
        what = f"no two points differ in one factor alone; {', '.join(tied)} change together"
        yield Flaw("F40", what, "vary one factor at a time, or all combinations")


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _global_batch(run: Run) -> int:
    factors = run.factors
    return factors.per_device_batch_size * factors.gradient_accumulation * factors.gpus


def _tied_factors(runs: Collection[Run], vary: Collection[str]) -> list[str]:
    """The varied factors, if there are many and no two points differ in exactly one of them."""
    points = [{key: repr(_value(run, key)) for key in vary} for run in runs]
    moving = [key for key in vary if len({point[key] for point in points}) > 1]
    if len(moving) < MANY_FACTORS:
        return []
    for key in moving:
        seen: dict[tuple[str, ...], str] = {}
        for point in points:
            others = tuple(point[other] for other in moving if other != key)
            if seen.setdefault(others, point[key]) != point[key]:
                return []
    return moving


def _value(run: Run, key: str) -> Any:
    if key in ("model", "dataset", "method"):
        return getattr(run, f"{key}_name")
    return getattr(run.method if key.startswith("method.") else run.factors, key.removeprefix("method."), None)


def let_through(results: Iterable[GateResult], accepted: Collection[str]) -> list[GateResult]:
    """Results of gates, those that stop an accepted flaw as warnings that name it."""
    by_gate = {gate: flaw for flaw in accepted for gate in LETS_THROUGH.get(flaw, ())}
    return [
        replace(one, fatal=False, message=f"{one.message} (accepted: {by_gate[one.gate]})")
        if one.gate in by_gate and not one.passed
        else one
        for one in results
    ]
