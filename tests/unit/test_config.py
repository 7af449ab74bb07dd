"""The typed study: types are strict, numbers finite, every key documented; defaults are those that are printed."""

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tunemap import config
from tunemap.config import (
    EVALUATION_FACTORS,
    FACTOR_SECTIONS,
    METHOD_CLASSES,
    METHOD_PARAMETERS,
    POINT_KEYS,
    Defaults,
    Experiment,
    Factors,
    Fixed,
    LoraMethod,
    PartialFactors,
    RandomModel,
    Study,
    Vary,
    given,
)

SECTIONS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == config.__name__
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_documented(section):
    assert section.__doc__
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert set(undocumented) <= {"source", "kind"}  # what they choose is the section's own docstring


def test_unset_factors_have_their_defaults():
    factors = Factors()
    assert (factors.strategy, factors.gpus, factors.precision, factors.optimizer) == ("single", 1, "fp32", "adamw")
    assert not factors.gradient_checkpointing  # peft's preparation turns it on without being asked


def test_evaluation_factors_are_marked():
    assert {"evaluation_batch_size", "max_new_tokens", "extraction"} == EVALUATION_FACTORS


@pytest.mark.parametrize(
    ("factor", "value"),
    [
        ("gpus", 1.0), ("gpus", "1"), ("gpus", True), ("gpus", 0), ("learning_rate", "1e-4"), ("learning_rate", 0),
        ("learning_rate", math.nan), ("learning_rate", math.inf), ("weight_decay", math.inf),
        ("max_grad_norm", math.inf),
        ("epochs", math.inf), ("time_limit_minutes", math.nan), ("compile", 1), ("compile", "yes"),
        ("precision", "FP32"),
        ("seed", -1), ("max_steps", 0), ("surplus", 1),
    ],
)  # fmt: skip
def test_values_are_not_coerced(factor, value):
    with pytest.raises(ValidationError):
        Factors.model_validate({factor: value})


def test_a_whole_number_is_a_number():
    assert Factors.model_validate({"learning_rate": 1}).learning_rate == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, None, [1]])
def test_overrides_hold_finite_scalars(value):
    with pytest.raises(ValidationError):
        RandomModel(source="random", config="c", tokenizer="t", overrides={"x": value})


@pytest.mark.parametrize("name", ["a", "A1", "lora-r8", "a_b.c", "x" * 60])
def test_names(name):
    assert Experiment(name=name, question="?").name == name


@pytest.mark.parametrize("name", ["", " ", "-a", ".a", "a b", "a/b", "..", "é", "a\n", "x" * 61])
def test_names_that_no_file_should_have(name):
    with pytest.raises(ValidationError):
        Experiment(name=name, question="?")


@pytest.mark.parametrize("section", [PartialFactors, Defaults, Fixed, Vary])
def test_only_what_is_written_is_given(section):
    assert given(section()) == {}
    value: Any = [None] if section is Vary else None
    assert given(section.model_validate({"max_steps": value})) == {"max_steps": value}


def test_method_parameters_keep_their_dotted_names():
    assert given(Fixed.model_validate({"method.rank": 4})) == {"method.rank": 4}


def test_the_seed_is_set_by_seeds_alone():
    for section in FACTOR_SECTIONS:
        with pytest.raises(ValidationError):
            section.model_validate({"seed": [1] if section is Vary else 1})


def test_every_parameter_of_every_method_can_be_varied():
    parameters = {
        f"method.{name}" for method in METHOD_CLASSES for name in method.model_fields if name not in ("kind", "factors")
    }
    assert parameters == set(METHOD_PARAMETERS)
    assert parameters < set(POINT_KEYS)


def test_target_modules_may_be_a_list():
    method = LoraMethod.model_validate({"kind": "lora", "target_modules": ["q_proj", "v_proj"]})
    assert method.target_modules == ("q_proj", "v_proj")
    assert hash(method) == hash(LoraMethod(kind="lora", target_modules=("q_proj", "v_proj")))


def test_models_are_hashable():
    one, same, other = (RandomModel(source="random", config="c", tokenizer="t", overrides={"n": n}) for n in (1, 1, 2))
    assert hash(one) == hash(same)
    assert {one: 1}[same] == 1
    assert one != other


def test_a_study_needs_a_model_a_dataset_a_method_and_an_experiment():
    with pytest.raises(ValidationError) as refusal:
        Study.model_validate({"study": "x", "models": {}, "datasets": {}, "methods": {}, "experiments": []})
    assert {error["loc"][0] for error in refusal.value.errors()} == {"models", "datasets", "methods", "experiments"}
