"""Names to meaning: the category of a kernel, the type of a collective, the phase of a host range.

The rules are data (categories.yaml, in order, first match wins). Names are classified once each, so the cost does
not depend on how often a kernel ran.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

OTHER = "other"
COMMUNICATION = "communication"
UNATTRIBUTED = "unattributed"

_SUFFIX = re.compile(r"(, (op_id|seq) = \d+)+$")
_HASHES = re.compile(r"^#+\s*(.*?)\s*#+$")


@dataclass(frozen=True)
class Rule:
    label: str
    pattern: re.Pattern[str]
    scope: str = "process"  # of a phase: "process" or "thread"
    waits: bool = False  # of an operator: its own time may be waiting for a collective


@dataclass(frozen=True)
class Rules:
    """Ordered rules; each method gives the label of the first rule that matches."""

    kernels: tuple[Rule, ...]
    operators: tuple[Rule, ...]
    collectives: tuple[Rule, ...]
    phases: tuple[Rule, ...]
    steps: re.Pattern[str]

    def kernel_category(self, name: str) -> str:
        """Category of a GPU kernel by its full name, `other` when no rule matches."""
        return _first(self.kernels, name, OTHER)

    def operator_category(self, name: str) -> str:
        """Category of a host operator of a trace without a GPU."""
        return _first(self.operators, name, OTHER)

    def collective(self, name: str) -> str:
        """Type of collective of a communication kernel or range."""
        return _first(self.collectives, name, OTHER)

    def phase(self, name: str) -> str | None:
        """Phase that a host range names, or None."""
        return _first(self.phases, bare_range_name(name), None)

    def is_step(self, name: str) -> bool:
        """Whether a host range encloses one training step."""
        return self.steps.search(bare_range_name(name)) is not None

    def keeps_range(self, name: str) -> bool:
        """Whether a reader must keep this host range; all others are skipped while reading."""
        return self.is_step(name) or self.phase(name) is not None

    @property
    def waiting_categories(self) -> frozenset[str]:
        """Categories of operators whose own time may be waiting for a collective."""
        return frozenset(rule.label for rule in self.operators if rule.waits)

    @property
    def thread_phases(self) -> frozenset[str]:
        """Phases that count only for work launched from the thread of their range."""
        return frozenset(rule.label for rule in self.phases if rule.scope == "thread")


def _first(rules: Iterable[Rule], name: str, default: Any) -> Any:
    return next((rule.label for rule in rules if rule.pattern.search(name)), default)


def bare_range_name(name: str) -> str:
    """A range name without what tools put around it: `## forward ##`, `forward, op_id = 7`, `bench.forward`."""
    name = _SUFFIX.sub("", name.strip())
    name = _HASHES.sub(r"\1", name)
    return name.removeprefix("bench.").removeprefix("tunemap.").removeprefix("phase:")


def short_name(name: str) -> str:
    """The function name of a demangled kernel: no return type, namespaces, template or call arguments.

    >>> short_name("void at::native::(anonymous namespace)::reduce_kernel<512, 1>(float*, int)")
    'reduce_kernel'
    """
    plain = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    head = re.split(r"[<(]", plain, maxsplit=1)[0].strip()
    return head.split(" ")[-1].split("::")[-1] or name


@cache
def load_rules() -> Rules:
    """The rules of categories.yaml, compiled."""
    text = resources.files("tunemap.trace").joinpath("categories.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    return Rules(
        kernels=_rules(data["kernels"], "category"),
        operators=_rules(data["operators"], "category"),
        collectives=_rules(data["collectives"], "collective"),
        phases=_rules(data["phases"], "phase"),
        steps=_compile(data["steps"]),
    )


def _rules(entries: list[dict[str, Any]], key: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(e[key], _compile(e["patterns"]), e.get("scope", "process"), e.get("waits", False)) for e in entries
    )


def _compile(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in patterns), re.IGNORECASE)
