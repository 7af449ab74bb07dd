"""The gates: each passes on what is sound and trips on the flaw that it is for; docs/validity.md says which."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import call

import pytest

from tunemap.files import write_json
from tunemap.gates import (
    GATES,
    GateResult,
    disjoint_gate,
    generation_limit_gate,
    label_gates,
    order_gate,
    tripped,
    validity,
)
from tunemap.gates.measurement import device_gate, mfu_bounds_gate, throughput_gate, training_time_gate, wall_gate
from tunemap.gates.model import (
    adapters_gate,
    attention_gate,
    autocast_gate,
    compile_gate,
    fsdp_units_gate,
    quantised_layers_gate,
    recomputation_gate,
)
from tunemap.gates.training import finite_loss_gate, gradient_norm_gate, replicas_gate, trained_weights_gate
from tunemap.training.worker import _data_gates

SOUND = {
    "rows": 100,
    "max_length": 512,
    "examples_without_label_tokens": 0,
    "truncated_answer_share": 0.01,
    "truncated_prompt_share": 0.0,
    "label_tokens_kept_share": 0.999,
    "answer_tokens": {"mean": 100.0},
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


def test_texts_to_classify_may_be_cut_as_little_as_answers() -> None:
    texts = {"answer_tokens": None, "truncated_answer_share": 0, "truncated_prompt_share": 0.05}
    gate = results(**texts)["truncation"]
    assert (gate.passed, gate.fatal) == (False, True)
    assert gate.message == "5.00% of texts are cut at max_length 512: raise max_length, or set accept_truncation"


OVERLAP = {"removed_rows": 0, "remaining_rows": 0}


@pytest.mark.parametrize(("kind", "gates"), [("generation", ["disjoint", "labels", "truncation"]),
                                             ("classification", ["disjoint", "truncation"])])  # fmt: skip
def test_a_run_of_either_kind_looks_at_what_was_cut(tmp_path: Path, kind: str, gates: list[str]) -> None:
    write_json(tmp_path / "dataset.json", {"overlap": OVERLAP, "splits": {"test": "test"}})
    job: Any = SimpleNamespace(dataset=tmp_path, run=SimpleNamespace(dataset=SimpleNamespace(accept_truncation=False)))
    tokens: Any = SimpleNamespace(task_kind=kind, statistics=SOUND)
    assert [gate.gate for gate in _data_gates(job, tokens)] == gates


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


# --- the list of gates ------------------------------------------------------------------------------------


def all_gates():
    return GATES


# name -> (arguments that pass, arguments that trip, whether the trip is fatal). The tripping numbers are the
# published ones wherever there are any.
CASES: dict[str, tuple[Any, Any, bool]] = {
    "labels": (call(SOUND), call(SOUND | {"examples_without_label_tokens": 100}), True),
    "truncation": (
        call(SOUND, accept_truncation=False),
        call(SOUND | {"truncated_answer_share": 0.83}, accept_truncation=False),
        True,
    ),
    "disjoint": (
        call({"overlap": {"removed_rows": 0, "remaining_rows": 0}, "splits": {"test": "test"}}),
        call({"overlap": {"removed_rows": 0, "remaining_rows": 374}, "splits": {"test": "test"}}),
        True,
    ),
    "order": (call({"full": "a", "lora": "a"}), call({"full": "a", "lora": "b"}), True),
    "generation_limit": (
        call({"longest_reference_tokens": 413}, 448),
        call({"longest_reference_tokens": 413}, 128),
        False,
    ),
    "trainable_parameters": (call(18_464_768, 18_464_768), call(2_179_072, 18_464_768), True),
    "quantised_layers": (call(14, 14, asked=True), call(0, 14, asked=True), True),
    "recomputation": (call(56, 28, 1, asked=True), call(28, 28, 1, asked=True), True),
    "fsdp_units": (call(29, 28, sharded=True), call(1, 28, sharded=True), True),
    "resharding": (call(57, 29, 1, asked=True), call(57, 29, 1, asked=False), True),
    "optimizer_state": (call({"float32"}, {"float32"}), call({"bfloat16"}, {"float32"}), True),
    "attention": (call(["_flash_attention"], "sdpa"), call(["_flash_attention"], "eager"), True),
    "causality": (call(0.0, 0.3), call(0.2, 0.3), True),
    "documents_apart": (call(0.0, 0.3), call(0.2, 0.3), True),
    "adapters": (
        call({"peft.tuners.lora.layer.Linear": 196}, {"bfloat16"}, "bfloat16"),
        call({"peft.tuners.lora.layer.Linear": 196}, {"float32"}, "bfloat16"),
        True,
    ),
    "autocast": (call({"bfloat16": 99, "float32": 1}, "bfloat16"), call({"float32": 100}, "bfloat16"), True),
    "compile": (call(1, asked=True), call(0, asked=True), True),
    "finite_loss": (call([2.0, 1.0]), call([2.0, math.nan]), True),
    "gradient_norm": (call([1.0, 0.5], scaled=False), call([1.0, 0.0], scaled=False), True),
    "frozen_weights": (call([], 26), call(["norm.weight"], 26), True),
    "trained_weights": (call([], 28), call(["head.weight"] * 28, 28), True),
    "replicas": (call([["a", "a"]], "weights"), call([["a", "b"]], "weights"), True),
    "ranks_disjoint": (call(40, 40), call(40, 39), True),
    "batches": (
        call({"real_tokens": 1720}, {"real_tokens": 1720}),
        call({"real_tokens": 416}, {"real_tokens": 1720}),
        True,
    ),
    "throughput": (
        call({"tokens_per_second": 931.9, "step_period_mean_s": 0.446, "tokens_per_step_mean": 415.6}),
        call({"tokens_per_second": 931.9, "step_period_mean_s": 0.446, "tokens_per_step_mean": 1720.0}),
        True,
    ),
    "training_time": (call(170.0, 171.3, 10), call(103.6, 171.3, 10), False),
    "wall": (call(100.0, 2.0, 103.0), call(100.0, 2.0, 110.0), False),
    "flops": (call(1000, 1005), call(1000, 1011), False),
    "mfu_bounds": (call("mfu", 0.4), call("mfu", 1.01), True),
    "device": (
        call([{"process_ids": [7], "throttle_reasons": 0x4}], [7]),
        call([{"process_ids": [7, 8], "throttle_reasons": 0}], [7]),
        False,
    ),
    "cpu_share": (call(0.95, 1.0), call(0.29, 1.0), False),
    "equal_factors": (call("lora", "full", []), call("lora", "full", ["per_device_batch_size (32 against 8)"]), False),
    "same_adapters": (call("gora", "lora", []), call("gora", "lora", ["bfloat16 against float32"]), False),
    "speed_up_bound": (call("full", 1.3, 1.2), call("full", 3.6, 3.5), False),
    "memory_prediction": (call(1300e6, 1305.9e6), call(1840e6, 1305.9e6), False),
    "interval": (call("lora", "full", known=True), call("lora", "full", known=False), False),
}


def test_every_gate_of_the_list_has_a_case() -> None:
    assert {gate.name for gate in all_gates()} == set(CASES)
    assert {gate.number for gate in all_gates()} == set(range(1, 13))


@pytest.mark.parametrize("name", CASES)
def test_each_gate_passes_on_what_is_sound_and_trips_on_its_flaw(name: str) -> None:
    (gate,) = [gate for gate in all_gates() if gate.name == name]
    sound, flawed, fatal = CASES[name]
    passed, trip = (gate.function(*case.args, **case.kwargs) for case in (sound, flawed))
    assert (passed.gate, passed.passed) == (name, True)
    assert (trip.gate, trip.passed, trip.fatal) == (name, False, fatal)
    assert passed.message != trip.message
    assert tripped([passed, trip]) == ([trip] if fatal else [])


@pytest.mark.parametrize("name", CASES)
def test_each_docstring_names_the_mistake_and_the_published_number(name: str) -> None:
    (gate,) = [gate for gate in all_gates() if gate.name == name]
    explained = validity.explain(gate)
    assert all(explained[:3])
    assert set(explained.flaws) <= {f"F{number:02d}" for number in range(1, 45)}


def test_4_bits_unasked_and_checkpointing_unasked_trip() -> None:
    assert not quantised_layers_gate(14, 14, asked=False).passed
    assert not recomputation_gate(56, 28, 1, asked=False).passed
    assert not fsdp_units_gate(29, 28, sharded=False).passed
    assert not compile_gate(1, asked=False).passed


def test_recomputation_counts_every_micro_batch() -> None:
    assert recomputation_gate(2 * 28 * 3, 28, 3, asked=True).passed
    assert not recomputation_gate(2 * 28 * 3 - 28, 28, 3, asked=True).passed


@pytest.mark.parametrize(
    ("kernels", "asked", "passed", "fatal"),
    [
        ([], "eager", True, True),
        ([], "sdpa", False, False),  # torch's own fallback: slower, still what was asked for
        (["_scaled_dot_product_efficient_attention"], "sdpa", True, False),
        (["_scaled_dot_product_efficient_attention"], "flash_attention_2", False, False),
        (["_flash_attn_forward"], "flash_attention_2", True, False),
    ],
)
def test_attention_kernels(kernels: list[str], asked: str, passed: bool, fatal: bool) -> None:
    gate = attention_gate(kernels, asked)
    assert (gate.passed, gate.fatal) == (passed, fatal)


def test_home_made_and_mixed_adapter_layers_trip() -> None:
    assert not adapters_gate({"nyu.GoRALinear": 196}, {"float32"}, "float32").passed
    assert not adapters_gate({"peft.a.Linear": 1, "peft.b.Linear4bit": 1}, {"float32"}, "float32").passed
    assert not adapters_gate({}, set(), "float32").passed


def test_a_head_of_another_dtype_than_other_methods_heads_trips() -> None:
    layers = {"peft.a.Linear": 2, "peft.a.Embedding": 1}
    options: dict[str, Any] = {"trained_dtype": "float32", "one_class": False}
    assert adapters_gate(layers, {"bfloat16"}, "bfloat16", others={"float32"}, **options).passed
    assert not adapters_gate(layers, {"bfloat16"}, "bfloat16", others={"float32", "bfloat16"}, **options).passed


def test_autocast_allows_what_stays_in_float32_up_to_5_percent() -> None:
    assert autocast_gate({"bfloat16": 96, "float32": 4}, "bfloat16").passed
    assert not autocast_gate({"bfloat16": 94, "float32": 6}, "bfloat16").passed
    assert not autocast_gate({}, "bfloat16").passed


def test_finite_loss_names_the_step_also_after_a_resumption() -> None:
    assert "at step 11" in finite_loss_gate([1.0, math.inf], first_step=10).message


def test_a_scaler_may_overflow_at_some_steps_but_not_at_most() -> None:
    assert gradient_norm_gate([math.inf, math.nan, 1.0, 1.0, 1.0], scaled=True).passed
    assert not gradient_norm_gate([math.inf, math.nan, 1.0], scaled=True).passed
    assert not gradient_norm_gate([math.nan, 1.0], scaled=False).passed
    assert not gradient_norm_gate([], scaled=False).passed


def test_one_tensor_that_did_not_move_is_a_warning_and_all_of_them_are_fatal() -> None:
    assert not trained_weights_gate(["norm.weight"], 28).fatal
    assert "norm.weight" in trained_weights_gate(["norm.weight"], 28).message


def test_hybrid_replicas_are_compared_pair_by_pair() -> None:
    assert replicas_gate([["a", "a"], ["b", "b"]], "weights").passed
    assert not replicas_gate([["a", "a"], ["b", "c"]], "weights").passed


def test_no_measured_step_says_nothing_of_the_speed() -> None:
    gate = throughput_gate({"tokens_per_second": None})
    assert (gate.passed, gate.fatal) == (False, True)


def test_identities_allow_2_percent_and_their_stated_allowance() -> None:
    assert wall_gate(0.0, 0.0, 1.02).passed
    assert not wall_gate(0.0, 0.0, 1.05).passed
    assert training_time_gate(0.9, 1.0, windows=4).passed
    assert not training_time_gate(0.9, 1.0, windows=3).passed


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001])
def test_a_utilisation_outside_of_its_bounds_trips(value: float) -> None:
    assert not mfu_bounds_gate("mfu_measured", value).passed


def test_heat_and_strangers_are_told_from_the_power_cap() -> None:
    assert not device_gate([{"process_ids": [7], "throttle_reasons": 0x40}], [7]).passed
    assert device_gate([{"process_ids": None, "throttle_reasons": None}], [7]).passed
    # In a container the ids are the host's: one unknown process is ourselves, two are not.
    assert device_gate([{"process_ids": [4711], "throttle_reasons": 0}], [7]).passed
    assert not device_gate([{"process_ids": [4711, 4712], "throttle_reasons": 0}], [7]).passed


# --- docs/validity.md -------------------------------------------------------------------------------------


def test_validity_page_is_the_one_that_the_gates_generate(repository: Path) -> None:
    flaws = validity.read_flaws(repository / "docs" / "flaws.yaml")
    assert (repository / "docs" / "validity.md").read_text() == validity.page(flaws), (
        "run: python -m tunemap.gates.validity docs"
    )


def test_every_flaw_is_stopped_by_something_tested_or_says_why_not(repository: Path) -> None:
    flaws = validity.read_flaws(repository / "docs" / "flaws.yaml")
    assert [flaw.id for flaw in flaws] == [f"F{number:02d}" for number in range(1, 45)]
    gates = {gate.name for gate in all_gates()}
    for flaw in flaws:
        assert set(flaw.gates) <= gates, flaw.id
        assert flaw.out_of_reach or (flaw.tests and (flaw.gates or flaw.design)), flaw.id
        for test in flaw.tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in (repository / path).read_text(), f"{flaw.id}: no {test}"


def test_a_gate_that_claims_a_flaw_stands_beside_it(repository: Path) -> None:
    flaws = {flaw.id: flaw for flaw in validity.read_flaws(repository / "docs" / "flaws.yaml")}
    for gate in all_gates():
        for flaw in validity.explain(gate).flaws:
            assert gate.name in flaws[flaw].gates, f"{gate.name} names {flaw}, docs/flaws.yaml does not"
