"""What a gate returns, and the list of all gates that the table of docs/validity.md is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class GateResult:
    """What one gate found. Where a fatal gate did not pass, the run is `invalid`; any other trip is a warning."""

    gate: str
    passed: bool
    fatal: bool
    message: str


@dataclass(frozen=True)
class Gate:
    """A gate function with its number in the list of validity gates; the docstring says what it is for."""

    number: int
    function: Callable[..., GateResult]

    @property
    def name(self) -> str:
        """The name in results: that of the function without `_gate`."""
        return self.function.__name__.removesuffix("_gate")


GATES: list[Gate] = []  # filled as the package is imported


def gate(number: int) -> Callable[[Function], Function]:
    """Register a gate function. Its docstring has three parts: what must hold; `Prevents:`; `Would have stopped:`."""

    def register(function: Function) -> Function:
        GATES.append(Gate(number, function))
        return function

    return register


def tripped(results: Iterable[GateResult]) -> list[GateResult]:
    """The fatal gates that did not pass."""
    return [result for result in results if result.fatal and not result.passed]


def reason(results: Iterable[GateResult]) -> str:
    """Why a run is invalid, in one line."""
    return "; ".join(f"gate {result.gate}: {result.message}" for result in results)
