"""Gates on comparisons: what may be set beside what, and what a difference may be called."""

from __future__ import annotations

from collections.abc import Sequence

from tunemap.gates.result import GateResult, gate

# Training without weight gradients of the frozen part needs 4 of 6 FLOPs per token and parameter.
LARGEST_ADAPTER_SPEED_UP = 1.5
MEMORY_PREDICTION_TOLERANCE = 0.10  # predicted against measured peak memory


@gate(7)
def equal_factors_gate(label: str, baseline: str, differing: Sequence[str]) -> GateResult:
    """Two points differ in nothing but the factors that their experiment varies: batch, data, versions, hardware.

    Prevents: a comparison of methods that is one of batch sizes, prompts, machines or library versions.
    Would have stopped: "3.6×" from batch 32 against batch 8 (F32), one paper's four configurations (F12), an A100 that
    was an A6000 (F38), and three runs that change four factors together (F40).
    """
    if not differing:
        return GateResult("equal_factors", True, False, f"equal to {baseline} but for the varied factors")
    message = f"{label} differs from {baseline} in more than the varied factors: {'; '.join(differing)}"
    return GateResult("equal_factors", False, False, message)


@gate(7)
def same_adapters_gate(label: str, baseline: str, differing: Sequence[str]) -> GateResult:
    """Two methods of the LoRA family differ in their numbers, not in the layer class or the dtype of their adapters.

    Prevents: crediting a method with the speed of other code or of a narrower dtype.
    Would have stopped: GoRA's "+15 % throughput", which is float32 against bfloat16 adapters in two layer classes
    (F05).
    """
    if not differing:
        return GateResult("same_adapters", True, False, f"adapter layers and dtype are those of {baseline}")
    message = f"{label} has other adapters than {baseline}: {'; '.join(differing)}; speeds compare these too"
    return GateResult("same_adapters", False, False, message)


@gate(8)
def speed_up_bound_gate(baseline: str, ratio: float, surely: float) -> GateResult:
    """An adapter method is at most 1.5 × as fast as full fine-tuning with the same batch; `surely`: the lower bound.

    Prevents: crediting a method with what its FLOPs cannot give.
    Would have stopped: speed-ups of 3.6× and 6.3× for LoRA (F32, F35).
    """
    message = (
        f"{ratio:.2f}× the throughput of {baseline} with the same batch; leaving out weight "
        f"gradients explains at most {LARGEST_ADAPTER_SPEED_UP}×"
    )
    return GateResult("speed_up_bound", surely <= LARGEST_ADAPTER_SPEED_UP, False, message)


@gate(8)
def memory_prediction_gate(predicted_bytes: float, measured_bytes: float) -> GateResult:
    """Predicted and measured peak memory agree within 10 %.

    Prevents: an explanation of memory that does not explain it.
    Would have stopped: FSDP peaks that the wrapping explains and the text did not (F04), and 1,840 MB for a run of
    1,306 MB (F31).
    """
    error = predicted_bytes / measured_bytes - 1
    message = f"predicted peak memory is {error:+.1%} off the measured, allowed: ±{MEMORY_PREDICTION_TOLERANCE:.0%}"
    return GateResult("memory_prediction", abs(error) <= MEMORY_PREDICTION_TOLERANCE, False, message)


@gate(12)
def interval_gate(label: str, baseline: str, *, known: bool) -> GateResult:
    """A ratio that ranks has an interval, and points inside each other's noise are "not distinguishable".

    Prevents: reading noise as signal.
    Would have stopped: "rank 16 is optimal" from one to four of 872 examples (F37), QLoRA "slightly lower" by 6 of 374
    questions (F13), and a ± that nobody defined (F25).
    """
    message = "throughput ratio has an interval"
    if not known:
        message = f"{label} against {baseline}: a throughput of one run has no interval and ranks nothing"
    return GateResult("interval", known, False, message)
