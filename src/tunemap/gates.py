"""Validity gates: checks that a measurement means what it says, as pure functions that return a result with its reason.

A fatal gate that did not pass makes a run `invalid`; one that is not fatal is a warning printed in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_TRUNCATED_SHARE = 0.01


@dataclass(frozen=True)
class GateResult:
    """What one gate found."""

    gate: str
    passed: bool
    fatal: bool
    message: str


def label_gates(statistics: Mapping[str, Any], *, accept_truncation: bool) -> list[GateResult]:
    """Gates `labels` and `truncation` on the statistics of a tokenised dataset.

    A training example without a label token teaches nothing (all of them: the loss is NaN) and is never accepted.
    More than 1 % of prompts or answers cut is fatal unless the study says `accept_truncation`.
    """
    rows, without = statistics["rows"], statistics["examples_without_label_tokens"]
    limit = f"max_length {statistics['max_length']}"
    labels = GateResult(
        gate="labels",
        passed=without == 0,
        fatal=True,
        message=f"{without} of {rows} training examples ({_share(without, rows)}) have no label token at {limit}"
        + (": raise max_length or shorten the prompt template" if without else ""),
    )
    answers, prompts = statistics["truncated_answer_share"], statistics["truncated_prompt_share"]
    kept = statistics["label_tokens_kept_share"]
    truncated = max(answers, prompts) > LARGEST_TRUNCATED_SHARE
    advice = " (accepted by accept_truncation)" if accept_truncation else ": raise max_length, or set accept_truncation"
    truncation = GateResult(
        gate="truncation",
        passed=not truncated,
        fatal=truncated and not accept_truncation,
        message=f"{answers:.2%} of answers and {prompts:.2%} of prompts are cut at {limit}; "
        f"{kept:.1%} of label tokens are kept" + (advice if truncated else ""),
    )
    return [labels, truncation]


def disjoint_gate(dataset: Mapping[str, Any], statistics: Mapping[str, Any] | None = None) -> GateResult:
    """Gate `disjoint` on dataset.json: no test row is trained on, nor stands in the prompt template as an example."""
    overlap = dataset["overlap"]
    shown = (statistics or {}).get("rows_in_template", {}).get("test", 0)
    message = f"{overlap['remaining_rows']} training rows equal a row of test split {dataset['splits']['test']!r}"
    if overlap["removed_rows"]:
        message += f"; {overlap['removed_rows']} that did were left out of training"
    if shown:
        message += f"; {shown} test rows stand in the prompt template as examples"
    return GateResult("disjoint", overlap["remaining_rows"] == 0 and shown == 0, True, message)


def order_gate(order_hashes: Mapping[str, str]) -> GateResult:
    """Gate `order`: runs (name -> data_order_hash) that are compared saw the same examples in the same order."""
    groups: dict[str, list[str]] = {}
    for run, order_hash in order_hashes.items():
        groups.setdefault(order_hash, []).append(run)
    if len(groups) <= 1:
        return GateResult("order", True, True, f"{len(order_hashes)} runs saw the same examples in the same order")
    described = "; ".join(f"{order_hash[:12]}: {', '.join(runs)}" for order_hash, runs in groups.items())
    return GateResult("order", False, True, f"runs saw different examples or another order: {described}")


def generation_limit_gate(statistics: Mapping[str, Any], max_new_tokens: int) -> GateResult:
    """Gate `generation_limit`: outputs may grow as long as the longest reference answer with its end-of-sequence."""
    longest = statistics["longest_reference_tokens"]
    return GateResult(
        gate="generation_limit",
        passed=max_new_tokens >= longest,
        fatal=False,
        message=f"max_new_tokens {max_new_tokens}; the longest reference answer has {longest} tokens"
        + ("" if max_new_tokens >= longest else ": longer answers are cut and count as wrong"),
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "none"
