"""Validity gates: checks that a measurement means what it says, as pure functions that return a result with its reason.

A fatal gate that did not pass makes a run `invalid`; one that is not fatal is a warning printed in the report.
Each gate's docstring names the mistake that it prevents and the published number that it would have stopped;
`docs/validity.md` is generated from them, and GATES lists them all. By place:

    data         what is trained on and asked, before any training
    model        each factor took effect in the model that is trained
    training     what training did to weights, gradients and ranks
    measurement  times, tokens, FLOPs and the device
    comparison   what may be set beside what
"""

from tunemap.gates import comparison, measurement, model, training  # each of them fills GATES
from tunemap.gates.data import (
    disjoint_gate,
    generation_limit_gate,
    label_gates,
    labels_gate,
    order_gate,
    truncation_gate,
)
from tunemap.gates.result import GATES, GateResult, reason, tripped

__all__ = [
    "GATES",
    "GateResult",
    "comparison",
    "disjoint_gate",
    "generation_limit_gate",
    "label_gates",
    "labels_gate",
    "measurement",
    "model",
    "order_gate",
    "reason",
    "training",
    "tripped",
    "truncation_gate",
]
