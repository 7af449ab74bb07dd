"""Runs: what they are made of decides their digest, whatever they are called."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tunemap.config import EVALUATION_FACTORS, DatasetConfig, Factors, ModelConfig
from tunemap.run import Run, RunMethod, canonical_json, differing_factors, digest

MODELS: list[dict[str, Any]] = [
    {"source": "tiny"},
    {"source": "tiny", "architecture": "distilbert", "seed": 3},
    {"source": "local", "path": "models/ä"},
    {"source": "hub", "id": "Qwen/Qwen2.5-0.5B", "revision": "abc"},
    {"source": "random", "config": "c", "tokenizer": "t", "overrides": {"n": 2, "x": 0.5, "tie": True, "act": "silu"}},
]
METHODS: list[dict[str, Any]] = [
    {"kind": "full", "factors": {"learning_rate": 0.1}},
    {"kind": "lora", "rank": 4, "alpha": 0.5, "target_modules": ["q_proj", "v_proj"]},
    {"kind": "lora", "target_modules": "all-linear", "factors": {"batching": "packed"}},
    {"kind": "qlora", "quantization_type": "fp4", "double_quantization": False},
    {"kind": "base"},
]
DATASETS: list[dict[str, Any]] = [
    {"task": "arithmetic", "source": "made", "train_rows": 10},
    {"task": "sst2", "source": "hub", "id": "glue", "subset": "sst2"},
    {"task": "generation", "source": "file", "train_file": "a.csv", "test_file": "b.csv", "prompt_template": "few"},
    {"task": "gsm8k", "source": "local", "path": "gsm8k", "system_prompt": 'say "…"', "accept_truncation": True},
]


def make(
    model: dict[str, Any] = MODELS[0],
    method: dict[str, Any] = METHODS[1],
    dataset: dict[str, Any] = DATASETS[0],
    template: str | None = None,
    names: tuple[str, str, str, str] = ("id", "m", "d", "x"),
    **factors: Any,
) -> Run:
    return Run(
        id=names[0],
        model_name=names[1],
        model=TypeAdapter(ModelConfig).validate_python(model),
        dataset_name=names[2],
        dataset=DatasetConfig.model_validate(dataset),
        method_name=names[3],
        method=TypeAdapter(RunMethod).validate_python(method),
        prompt_template=template,
        factors=Factors(**factors),
    )


# --- canonical JSON ---------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_reads_back(value):
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), json_values, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value, rng):
    keys = list(value)
    rng.shuffle(keys)
    shuffled = {key: value[key] for key in keys}
    assert canonical_json(shuffled) == canonical_json(value)
    assert digest(shuffled) == digest(value)


def test_canonical_json_is_this_text():
    value = {"b": [1, 2.5, None, True], "a": {"ö": '"'}, "c": 1e-05}
    assert canonical_json(value) == '{"a":{"ö":"\\""},"b":[1,2.5,null,true],"c":1e-05}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_digest(value):
    with pytest.raises(ValueError):
        digest({"x": value})


def test_digest_is_the_start_of_a_sha_256():
    # printf '{"a":1}' | sha256sum
    assert digest({"a": 1}) == "015abd7f5cc57a2d"


# --- specs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["source"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset["source"])
def test_json_round_trip(model, method, dataset):
    run = make(model, method, dataset, template="Q: {prompt}\n", learning_rate=1e-5, max_steps=7, epochs=None)
    again = Run.from_json(canonical_json(run.evaluation_spec()))
    assert again.evaluation_spec() == run.evaluation_spec()
    assert again.training_spec() == run.training_spec()
    assert (again.training_digest, again.evaluation_digest) == (run.training_digest, run.evaluation_digest)
    assert (again.model_key, again.dataset_key, again.tokens_key) == (run.model_key, run.dataset_key, run.tokens_key)
    assert again.model == run.model
    assert again.method.model_copy(update={"factors": run.method.factors}) == run.method


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["source"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["kind"])
def test_runs_are_hashable_and_frozen(model, method):
    run = make(model, method)
    assert {run: 1}[make(model, method)] == 1
    with pytest.raises(ValueError):
        run.id = "other"


@pytest.mark.parametrize("name", sorted(Factors.model_fields))
def test_every_factor_is_in_the_digest_that_it_belongs_to(name):
    changes = {
        "strategy": "ddp", "batching": "packed", "precision": "bf16", "gradient_checkpointing": True,
        "attention": "eager", "compile": True, "optimizer": "adamw_8bit", "schedule": "cosine",
        "fsdp_unit": "model", "extraction": "hpml", "reshard_after_forward": False,
        "logits": "label_tokens",
    }  # fmt: skip
    run, other = make(), make(**{name: changes.get(name, 77)})
    assert run.evaluation_digest != other.evaluation_digest
    assert (run.training_digest != other.training_digest) == (name not in EVALUATION_FACTORS)


def test_names_are_in_no_digest():
    run, other = make(), make(names=("other", "model", "data", "way"))
    assert run.training_digest == other.training_digest
    assert run.evaluation_digest == other.evaluation_digest


def test_the_name_of_a_template_is_in_no_digest_but_its_text_is():
    few, more = DATASETS[2], DATASETS[2] | {"prompt_template": "more"}
    assert make(dataset=few, template="Q: {prompt}").training_digest == make(
        dataset=more, template="Q: {prompt}"
    ).training_digest  # fmt: skip
    run, other = make(dataset=few, template="Q: {prompt}"), make(dataset=few, template="A: {prompt}")
    assert run.training_digest != other.training_digest
    assert run.dataset_key == other.dataset_key
    assert run.tokens_key != other.tokens_key


def test_factors_of_a_method_count_once_where_they_ended_up():
    method = {"kind": "full"}
    run = make(method=method | {"factors": {"learning_rate": 0.5}}, learning_rate=0.1)
    assert run.training_digest == make(method=method, learning_rate=0.1).training_digest


def test_a_changed_copy_does_not_keep_the_values_of_its_original():
    run = make()
    assert run.evaluation_digest  # whatever is remembered is remembered now
    copy = run.model_copy(update={"id": "copy", "factors": Factors(seed=9)})
    assert copy.training_spec()["id"] == "copy"
    assert copy.training_spec()["factors"]["seed"] == 9
    assert copy.training_digest != run.training_digest


# --- folders ----------------------------------------------------------------------------------------------


def test_rows_depend_on_neither_prompts_nor_what_is_accepted():
    plain = DATASETS[0]
    run = make(dataset=plain)
    for change in ({"system_prompt": "x"}, {"prompt_template": "t"}, {"accept_truncation": True}):
        assert make(dataset=plain | change).dataset_key == run.dataset_key
    for change in ({"seed": 1}, {"train_rows": 11}, {"test_rows": 5}, {"held_out_share": 0.1}):
        assert make(dataset=plain | change).dataset_key != run.dataset_key


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"max_length": 99}, False),
        ({"model": MODELS[1]}, False),
        ({"dataset": DATASETS[0] | {"seed": 5}}, False),
        ({"dataset": DATASETS[0] | {"system_prompt": "x"}}, False),
        ({"template": "{prompt}"}, False),
        ({"method": METHODS[0]}, True),
        ({"seed": 4}, True),
        ({"precision": "bf16"}, True),
        ({"batching": "packed"}, True),
    ],
)
def test_tokens_are_shared_by_runs_that_read_the_same(change, same):
    assert (make(**change).tokens_key == make().tokens_key) == same


def test_task_kinds():
    assert make(dataset=DATASETS[0]).task_kind == "generation"
    assert make(dataset=DATASETS[1]).task_kind == "classification"


# --- differences ------------------------------------------------------------------------------------------


def test_the_same_runs_do_not_differ():
    assert differing_factors(make(), make(names=("another-id", "m", "d", "x"))) == {}


def test_differences_are_named_as_in_the_study():
    first = make(seed=1, learning_rate=0.1, names=("a", "m", "d", "lora"))
    second = make(
        model=MODELS[4], method=METHODS[1] | {"rank": 16}, seed=2, learning_rate=0.1, names=("b", "big", "d", "lora")
    )
    assert differing_factors(first, second) == {
        "model_name": ("m", "big"),
        "model.source": ("tiny", "random"),
        "model.architecture": ("qwen2", None),
        "model.config": (None, "c"),
        "model.tokenizer": (None, "t"),
        "model.overrides.n": (None, 2),
        "model.overrides.x": (None, 0.5),
        "model.overrides.tie": (None, True),
        "model.overrides.act": (None, "silu"),
        "method.rank": (4, 16),
        "seed": (1, 2),
    }


factor_values = st.fixed_dictionaries(
    {}, optional={"seed": st.integers(0, 3), "gpus": st.integers(1, 3), "epochs": st.sampled_from([None, 0.5, 2.0])}
)


@given(factor_values, factor_values)
@settings(max_examples=50)
def test_differences_are_empty_exactly_for_equal_digests(left, right):
    first, second = make(**left), make(**right)
    differences = differing_factors(first, second)
    assert (not differences) == (first.evaluation_digest == second.evaluation_digest)
    assert differing_factors(second, first) == {key: (b, a) for key, (a, b) in differences.items()}
