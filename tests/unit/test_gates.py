"""The data gates: each passes on sound data and trips on the flaw that it is for."""

from typing import Any

import pytest

from tunemap.gates import GateResult, disjoint_gate, generation_limit_gate, label_gates, order_gate

SOUND = {
    "rows": 100,
    "max_length": 512,
    "examples_without_label_tokens": 0,
    "truncated_answer_share": 0.01,
    "truncated_prompt_share": 0.0,
    "label_tokens_kept_share": 0.999,
}


def results(accept_truncation: bool = False, **changes: Any) -> dict[str, GateResult]:
    return {gate.gate: gate for gate in label_gates(SOUND | changes, accept_truncation=accept_truncation)}


def test_sound_labels_pass() -> None:
    assert all(gate.passed for gate in results().values())


@pytest.mark.parametrize("accept_truncation", [False, True])
def test_an_example_without_a_label_is_never_accepted(accept_truncation: bool) -> None:
    gate = results(accept_truncation, examples_without_label_tokens=1)["labels"]
    assert (gate.passed, gate.fatal) == (False, True)
    assert gate.message.startswith("1 of 100 training examples (1.00%) have no label token at max_length 512")


@pytest.mark.parametrize("cut", ["truncated_answer_share", "truncated_prompt_share"])
def test_more_than_one_percent_cut_is_fatal_unless_accepted(cut: str) -> None:
    refused, accepted = (results(accept, **{cut: 0.0101})["truncation"] for accept in (False, True))
    assert (refused.passed, refused.fatal) == (False, True)
    assert "set accept_truncation" in refused.message
    assert (accepted.passed, accepted.fatal) == (False, False)
    assert "1.01%" in accepted.message


OVERLAP = {"removed_rows": 0, "remaining_rows": 0}


def test_disjoint_data_pass_and_say_what_was_removed() -> None:
    gate = disjoint_gate({"overlap": OVERLAP | {"removed_rows": 5}, "splits": {"test": "dev"}})
    assert gate.passed
    assert "'dev'; 5 that did were left out" in gate.message


def test_a_test_row_in_training_or_in_the_template_trips() -> None:
    dataset = {"overlap": OVERLAP, "splits": {"test": "test"}}
    assert not disjoint_gate(dataset | {"overlap": OVERLAP | {"remaining_rows": 1}}).passed
    assert not disjoint_gate(dataset, {"rows_in_template": {"train": 0, "test": 1}}).passed
    assert disjoint_gate(dataset, {"rows_in_template": {"train": 1, "test": 0}}).passed


def test_another_order_trips_and_names_the_runs() -> None:
    assert order_gate({"full": "abc", "lora": "abc"}).passed
    gate = order_gate({"full": "abc", "lora": "abc", "qlora": "xyz"})
    assert not gate.passed
    assert "abc: full, lora; xyz: qlora" in gate.message


@pytest.mark.parametrize(("limit", "passed"), [(127, False), (128, True)])
def test_a_generation_limit_below_the_references_is_a_warning(limit: int, passed: bool) -> None:
    gate = generation_limit_gate({"longest_reference_tokens": 128}, limit)
    assert (gate.passed, gate.fatal) == (passed, False)
