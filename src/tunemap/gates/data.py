"""Gates on the data: labels survive tokenising, splits stay apart, every method sees the same order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunemap.gates.result import GateResult, gate

LARGEST_TRUNCATED_SHARE = 0.01


def label_gates(statistics: Mapping[str, Any], *, accept_truncation: bool) -> list[GateResult]:
    """Both gates on the statistics of a tokenised dataset."""
    return [labels_gate(statistics), truncation_gate(statistics, accept_truncation=accept_truncation)]


@gate(1)
def labels_gate(statistics: Mapping[str, Any]) -> GateResult:
    """Every training example has a token that the loss is taken over.

    Prevents: training on examples whose answer was cut away, which teach nothing and, alone in a batch, give NaN.
    Would have stopped: the distributed runs of NYU's published configuration, 4-shot prompts cut at 256 tokens,
    where no example of 7,473 keeps a label (F02).
    """
    rows, without = statistics["rows"], statistics["examples_without_label_tokens"]
    return GateResult(
        gate="labels",
        passed=without == 0,
        fatal=True,
        message=f"{without} of {rows} training examples ({_share(without, rows)}) have no label token at "
        f"max_length {statistics['max_length']}"
        + (": raise max_length or shorten the prompt template" if without else ""),
    )


@gate(1)
def truncation_gate(statistics: Mapping[str, Any], *, accept_truncation: bool) -> GateResult:
    """At most 1 % of prompts, answers or texts are cut; more is fatal unless the study accepts it by name.

    Prevents: learning answers without their end, so that the trained model never states its result, and classes of
    texts whose deciding words are not there.
    Would have stopped: NYU's accuracy of 52.67 % for LoRA, trained at 512 tokens with 83 % of answers cut (F02).
    """
    answers, prompts = statistics["truncated_answer_share"], statistics["truncated_prompt_share"]
    classification, max_length = statistics["answer_tokens"] is None, statistics["max_length"]
    truncated = max(answers, prompts) > LARGEST_TRUNCATED_SHARE
    advice = " (accepted by accept_truncation)" if accept_truncation else ": raise max_length, or set accept_truncation"
    return GateResult(
        gate="truncation",
        passed=not truncated,
        fatal=truncated and not accept_truncation,
        message=(
            f"{prompts:.2%} of texts are cut at max_length {max_length}"
            if classification
            else f"{answers:.2%} of answers and {prompts:.2%} of prompts are cut at max_length {max_length}; "
            f"{statistics['label_tokens_kept_share']:.1%} of label tokens are kept"
        )
        + (advice if truncated else ""),
    )


@gate(9)
def disjoint_gate(dataset: Mapping[str, Any], statistics: Mapping[str, Any] | None = None) -> GateResult:
    """No row of the named test split is trained on, nor stands in the prompt template as an example.

    Prevents: a score on questions whose answers the model was shown.
    Would have stopped: "standard train/test split" printed over 374 rows held out from train, which also chose the
    checkpoint (F13), and prompt examples taken from the training rows without saying so (F17).
    """
    overlap = dataset["overlap"]
    shown = (statistics or {}).get("rows_in_template", {}).get("test", 0)
    message = f"{overlap['remaining_rows']} training rows equal a row of test split {dataset['splits']['test']!r}"
    if overlap["removed_rows"]:
        message += f"; {overlap['removed_rows']} that did were left out of training"
    if shown:
        message += f"; {shown} test rows stand in the prompt template as examples"
    return GateResult("disjoint", overlap["remaining_rows"] == 0 and shown == 0, True, message)


@gate(9)
def order_gate(order_hashes: Mapping[str, str]) -> GateResult:
    """Runs that are compared (name -> data_order_hash) saw the same examples in the same order.

    Prevents: calling a difference of data a difference of methods.
    Would have stopped: comparing methods trained for 888, 1,770 and 4,450 steps under one name (F12), and with
    different step counts for LoRA, QLoRA and checkpointing (F29).
    """
    groups: dict[str, list[str]] = {}
    for run, order_hash in order_hashes.items():
        groups.setdefault(order_hash, []).append(run)
    if len(groups) <= 1:
        return GateResult("order", True, True, f"{len(order_hashes)} runs saw the same examples in the same order")
    described = "; ".join(f"{order_hash[:12]}: {', '.join(runs)}" for order_hash, runs in groups.items())
    return GateResult("order", False, True, f"runs saw different examples or another order: {described}")


@gate(11)
def generation_limit_gate(statistics: Mapping[str, Any], max_new_tokens: int) -> GateResult:
    """Outputs may grow as long as the longest reference answer with its end-of-sequence.

    Prevents: counting answers as wrong that were never allowed to end.
    Would have stopped: NYU's cap of 128 new tokens, below 40.6 % of the test references (F15).
    """
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
