"""From experiments to runs: expansion, precedence with provenance, shared runs, readable and stable ids."""

import copy
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tunemap.config import METHOD_PARAMETERS, Factors, Study
from tunemap.run import Run
from tunemap.study import LONGEST_ID, Plan, plan_study
from tunemap.study_file import load_plan

GOLDEN = Path(__file__).parent / "golden" / "quickstart_runs.json"
RUN_WILDCARD = re.compile(r"[A-Za-z0-9_.+-]+")  # workflow/rules/common.smk

STUDY: dict[str, Any] = {
    "study": "small",
    "models": {"tiny": {"source": "tiny"}, "other": {"source": "tiny", "seed": 1}},
    "datasets": {"sums": {"task": "arithmetic", "source": "made"}},
    "methods": {
        "full": {"kind": "full", "factors": {"learning_rate": 0.001}},
        "lora": {"kind": "lora", "rank": 4},
        "qlora": {"kind": "qlora"},
    },
    "defaults": {"model": "tiny", "dataset": "sums", "max_steps": 20},
    "experiments": [{"name": "e", "question": "?", "vary": {"method": ["full", "lora"]}}],
}


def study(*experiments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(STUDY) | copy.deepcopy(changes)
    if experiments:
        values["experiments"] = [
            {"name": f"e{index}", "question": "?"} | experiment for index, experiment in enumerate(experiments)
        ]
    return values


def problems_of(values: dict[str, Any]) -> list[str]:
    return plan_study(Study.model_validate(values))[1]


def plan(*experiments: dict[str, Any], **changes: Any) -> Plan:
    planned, problems = plan_study(Study.model_validate(study(*experiments, **changes)))
    assert problems == []
    return planned


def trained(planned: Plan) -> list[Run]:
    return [run for run in planned.runs.values() if not run.is_base]


# --- expansion --------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed():
    planned = plan(
        {"vary": {"method": ["full", "lora"], "gradient_checkpointing": [False, True]}, "seeds": [3, 1, 2]},
    )
    points = {(run.method_name, run.factors.gradient_checkpointing, run.factors.seed) for run in trained(planned)}
    assert points == {(method, on, seed) for method in ("full", "lora") for on in (False, True) for seed in (1, 2, 3)}
    [experiment] = planned.experiments
    assert experiment.vary == ("method", "gradient_checkpointing")
    assert [planned.runs[name].factors.seed for name in experiment.runs[:3]] == [3, 1, 2]
    assert len(experiment.runs) == 12


def test_an_experiment_without_vary_is_one_run():
    planned = plan({"fixed": {"method": "lora"}})
    assert planned.experiments[0].runs == ("tiny.sums.lora.seed-0",)
    assert planned.experiments[0].base_runs == ("tiny.sums.base",)


def test_runs_that_two_experiments_share_are_run_once():
    planned = plan(
        {"vary": {"method": ["full", "lora"]}, "seeds": [0, 1]},
        {"fixed": {"method": "lora"}, "vary": {"gradient_checkpointing": [False, True]}, "seeds": [0, 1]},
        {"fixed": {"method": "lora"}, "vary": {"method.rank": [2, 4]}, "seeds": [0, 1]},
    )
    shared = {"tiny.sums.lora.seed-0", "tiny.sums.lora.seed-1"}
    for experiment in planned.experiments:
        assert shared < set(experiment.runs)
    assert len(trained(planned)) == 4 + 2 + 2


def test_a_varied_parameter_does_not_multiply_methods_without_it():
    planned = plan({"vary": {"method": ["full", "lora"], "method.rank": [2, 8]}})
    assert planned.experiments[0].runs == (
        "tiny.sums.full.seed-0",
        "tiny.sums.lora.rank-2.seed-0",
        "tiny.sums.lora.rank-8.seed-0",
    )


def test_a_parameter_that_no_method_has_is_refused():
    assert problems_of(study({"fixed": {"method": "full", "method.rank": 3}})) == [
        "experiment e0: none of its methods (full) has the parameter 'rank'"
    ]


def test_the_same_key_fixed_and_varied_is_refused():
    [problem] = problems_of(study({"fixed": {"method": "lora", "gpus": 1}, "vary": {"gpus": [1]}}))
    assert problem == "experiment e0: 'gpus' is both in fixed and in vary; keep one"


@pytest.mark.parametrize("values", [[8, 8], [8, 16, 8]])
def test_a_value_twice_is_refused(values):
    [problem] = problems_of(study({"fixed": {"method": "lora"}, "vary": {"method.rank": values}}))
    assert problem == f"experiment e0: vary.method.rank holds a value twice: {values}"


def test_a_varied_model_and_dataset():
    datasets = {"sums": {"task": "arithmetic", "source": "made"}, "few": {"task": "gsm8k", "source": "hub", "id": "x"}}
    planned = plan(
        {"fixed": {"method": "lora"}, "vary": {"model": ["tiny", "other"], "dataset": ["sums", "few"]}},
        datasets=datasets,
    )
    assert {(run.model_name, run.dataset_name) for run in trained(planned)} == {
        ("tiny", "sums"), ("tiny", "few"), ("other", "sums"), ("other", "few")
    }  # fmt: skip
    assert len(planned.experiments[0].base_runs) == 4


def test_captures_are_the_first_seed_of_profiled_experiments():
    profiled = {"vary": {"method": ["full", "lora"]}, "seeds": [5, 6]}
    planned = plan(profiled | {"profile": "torch"}, profiled)
    assert planned.experiments[0].captures == ("tiny.sums.full.seed-5", "tiny.sums.lora.seed-5")
    assert planned.experiments[1].captures == ()


def test_rooflines_are_of_captured_points_on_one_gpu():
    spread = {"fixed": {"method": "lora", "strategy": "ddp"}, "vary": {"gpus": [1, 2]}, "seeds": [5, 6]}
    asked = spread | {"profile": "torch", "roofline": True}
    planned = plan(asked, spread | {"profile": "torch"})
    assert planned.experiments[0].rooflines == ("tiny.sums.lora.strategy-ddp.seed-5",)
    assert planned.experiments[1].rooflines == ()
    for wrong in (asked | {"profile": "none"}, asked | {"vary": {"gpus": [2]}}):
        _, problems = plan_study(Study.model_validate(study(wrong)))
        (problem,) = problems
        assert "roofline: needs a profile (auto, nsys or torch) and at least one point on one GPU" in problem


# --- exclude and only -------------------------------------------------------------------------------------

GRID = {"vary": {"method": ["full", "lora", "qlora"], "method.rank": [2, 8], "gradient_checkpointing": [False, True]}}


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        ({}, 2 + 4 + 4),
        ({"exclude": [{"method": "qlora"}]}, 6),
        ({"exclude": [{"method": ["qlora", "full"]}]}, 4),
        ({"exclude": [{"method": "lora", "gradient_checkpointing": True}]}, 8),
        ({"exclude": [{"method": "lora", "method.rank": 2}, {"gradient_checkpointing": True}]}, 1 + 1 + 2),
        ({"only": [{"method": "lora"}]}, 4),
        ({"only": [{"method.rank": [2, 8], "method": "lora"}, {"method": "full"}]}, 6),
        ({"only": [{"method": ["lora", "qlora"]}], "exclude": [{"method.rank": 8}]}, 4),
        ({"only": [{"method.rank": 8}]}, 4),
        ({"exclude": [{"seed": 1}], "seeds": [0, 1]}, 10),
        ({"exclude": [{"seed": [0, 1], "method": "full"}], "seeds": [0, 1, 2]}, 2 + 3 * 8),
    ],
)
def test_exclude_and_only(rules, count):
    assert len(trained(plan(GRID | rules))) == count


def test_a_parameter_of_the_method_itself_can_be_matched():
    planned = plan({"vary": {"method": ["full", "lora", "qlora"]}, "exclude": [{"method.rank": 4}]})
    assert [run.method_name for run in trained(planned)] == ["full", "qlora"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"exclude": [{"methd": "full"}]},
            "experiment e0: exclude: unknown key 'methd'; did you mean 'method'? Allowed",
        ),
        ({"only": [{"ranks": 2}]}, "experiment e0: only: unknown key 'ranks'"),
        ({"exclude": [{"method": "dora"}]}, "experiment e0: exclude {'method': 'dora'} matches no point of the grid"),
        ({"only": [{"method.rank": 3}]}, "experiment e0: only {'method.rank': 3} matches no point of the grid"),
        (
            {"exclude": [{"method": "full", "method.rank": 2}]},
            "experiment e0: exclude {'method': 'full', 'method.rank'",
        ),
        ({"exclude": [{"gradient_checkpointing": [False, True]}]}, "experiment e0: exclude and only leave no run"),
        (
            {"only": [{"method": "full"}], "exclude": [{"method": "full"}]},
            "experiment e0: exclude and only leave no run",
        ),
    ],
)
def test_rules_that_say_nothing_are_refused(rules, message):
    assert problems_of(study(GRID | rules))[0].startswith(message)


# --- precedence -------------------------------------------------------------------------------------------

LAYERS = ["defaults", "method lora", "fixed", "vary"]


@pytest.mark.parametrize("strongest", range(-1, len(LAYERS)))
def test_the_strongest_place_wins_and_is_named(strongest):
    """Each layer up to `strongest` sets its own learning rate; fixed and vary exclude each other."""
    set_layers = LAYERS[: strongest + 1]
    if "vary" in set_layers:
        set_layers.remove("fixed")
    rates = {layer: 0.1 * (index + 1) for index, layer in enumerate(LAYERS)}
    values = study({"fixed": {"method": "lora"}})
    if "defaults" in set_layers:
        values["defaults"]["learning_rate"] = rates["defaults"]
    if "method lora" in set_layers:
        values["methods"]["lora"]["factors"] = {"learning_rate": rates["method lora"]}
    if "fixed" in set_layers:
        values["experiments"][0]["fixed"]["learning_rate"] = rates["fixed"]
    if "vary" in set_layers:
        values["experiments"][0]["vary"] = {"learning_rate": [rates["vary"]]}
    planned, problems = plan_study(Study.model_validate(values))
    assert problems == []
    [run] = trained(planned)
    expected = set_layers[-1] if set_layers else "built-in default"
    assert run.factors.learning_rate == rates.get(expected, 1e-4)
    assert planned.provenance[run.id]["learning_rate"] == expected


def test_a_method_is_weaker_than_the_experiment_for_each_method_on_its_own():
    planned = plan({"fixed": {"learning_rate": 0.3}, "vary": {"method": ["full", "lora"]}})
    assert {run.factors.learning_rate for run in trained(planned)} == {0.3}
    planned = plan({"vary": {"method": ["full", "lora"]}})
    assert {run.method_name: run.factors.learning_rate for run in trained(planned)} == {"full": 0.001, "lora": 1e-4}


def test_null_is_a_value():
    planned = plan({"fixed": {"method": "lora", "max_steps": None}})
    [run] = trained(planned)
    assert run.factors.max_steps is None
    assert planned.provenance[run.id]["max_steps"] == "fixed"


def test_every_value_has_a_provenance():
    planned = plan({"vary": {"method": ["full", "lora", "qlora"]}, "fixed": {"method.rank": 2}})
    for run in trained(planned):
        origins = planned.provenance[run.id]
        parameters = {name for name in METHOD_PARAMETERS if hasattr(run.method, name.removeprefix("method."))}
        assert set(Factors.model_fields) | {"model", "dataset", "method"} | parameters == set(origins)
        assert origins["seed"] == "seeds"
        assert origins["method"] == "vary"
        assert origins["model"] == "defaults"
        assert origins.get("method.rank", "fixed") == "fixed"
        assert origins.get("method.dropout", "methods") == "methods"


# --- base rows --------------------------------------------------------------------------------------------


def test_one_base_row_serves_all_that_start_from_the_same():
    planned = plan({"vary": {"method": ["full", "lora"], "per_device_batch_size": [1, 2]}, "seeds": [0, 1]})
    assert planned.experiments[0].base_runs == ("tiny.sums.base",)
    base = planned.runs["tiny.sums.base"]
    assert base.is_base
    assert base.factors == Factors()


@pytest.mark.parametrize(
    ("vary", "ids"),
    [
        ({"precision": ["fp32", "bf16"]}, ["tiny.sums.base", "tiny.sums.base.precision-bf16"]),
        ({"max_new_tokens": [None, 9]}, ["tiny.sums.base", "tiny.sums.base.max_new_tokens-9"]),
        ({"max_length": [64]}, ["tiny.sums.base.max_length-64"]),
        ({"learning_rate": [0.1, 0.2], "weight_decay": [0.1]}, ["tiny.sums.base"]),
    ],
)
def test_what_changes_an_evaluation_makes_a_base_row_of_its_own(vary, ids):
    planned = plan({"fixed": {"method": "lora"}, "vary": vary})
    assert list(planned.experiments[0].base_runs) == ids
    for name in ids:
        base = planned.runs[name]
        assert all(getattr(base.factors, key) in values for key, values in vary.items() if key not in (
            "learning_rate", "weight_decay"
        ))  # fmt: skip


# --- ids --------------------------------------------------------------------------------------------------


def test_ids_name_what_differs_from_the_usual():
    planned = plan(
        {
            "fixed": {"method": "lora", "max_steps": None, "learning_rate": 5e-5, "gradient_checkpointing": True},
            "vary": {"method.target_modules": [["q_proj", "v_proj"]]},
            "seeds": [7],
        }
    )
    assert trained(planned)[0].id == (
        "tiny.sums.lora.target_modules-q_proj+v_proj.gradient_checkpointing-true.learning_rate-5e-05."
        "max_steps-none.seed-7"
    )


def test_a_value_equal_to_the_usual_is_not_in_the_id():
    planned = plan({"fixed": {"method": "lora", "method.rank": 4, "max_steps": 20, "gpus": 1}})
    assert trained(planned)[0].id == "tiny.sums.lora.seed-0"


@pytest.mark.parametrize("modules", [".*q_proj$", "../../etc", "a b", "ä", "x" * 300])
def test_ids_are_names_of_files_whatever_the_values(modules):
    planned = plan({"fixed": {"method": "lora"}, "vary": {"method.target_modules": ["all-linear", modules, [modules]]}})
    assert len(trained(planned)) == 3
    for name in planned.runs:
        assert RUN_WILDCARD.fullmatch(name)
        assert len(name) <= LONGEST_ID
        assert ".." not in name.split("/")


LONG = {
    "models": {"m" * 60: {"source": "tiny"}},
    "datasets": {"d" * 60: {"task": "arithmetic", "source": "made"}},
    "defaults": {"model": "m" * 60, "dataset": "d" * 60, "max_steps": 20},
}


def test_long_ids_end_in_a_digest_and_stay_apart():
    fixed = {"method": "lora", "precision": "bf16", "max_length": 777, "attention": "eager", "evaluation_batch_size": 3}
    vary = {"weight_decay": [0.1, 0.2], "max_new_tokens": [1000, 1001], "threads_per_process": [1, 2]}
    planned = plan({"fixed": fixed, "vary": vary, "seeds": [0, 1]}, **LONG)
    assert len(trained(planned)) == 16
    assert len(planned.experiments[0].base_runs) == 4
    for name, run in planned.runs.items():
        assert len(name) <= LONGEST_ID
        assert run.id == name
        assert run.training_spec()["id"] == name
        assert run.evaluation_spec()["method"]["kind"] == ("base" if run.is_base else "lora")


def test_the_same_id_for_different_runs_is_refused():
    models = {"a": {"source": "tiny"}, "a.b": {"source": "tiny", "seed": 1}}
    data = {"task": "arithmetic", "source": "made"}
    values = study(
        {"fixed": {"model": "a", "dataset": "b.c", "method": "lora"}},
        {"fixed": {"model": "a.b", "dataset": "c", "method": "lora"}},
        models=models,
        datasets={"b.c": data, "c": data},
        defaults={"max_steps": 20},
    )
    assert problems_of(values) == [
        f"experiment e1: two different runs would be called {name}; rename the model, dataset or method of one"
        for name in ("a.b.c.lora.seed-0", "a.b.c.base")
    ]


def test_ids_and_digests_of_the_default_study_do_not_drift(repository, tmp_path):
    """New ids move results, new digests make them stale. After a change on purpose: TUNEMAP_UPDATE_GOLDEN=1 pytest."""
    planned = load_plan(repository / "config/config.yaml")
    runs = {
        name: {
            "training": run.training_digest,
            "evaluation": run.evaluation_digest,
            "model": run.model_key,
            "dataset": run.dataset_key,
            "tokens": run.tokens_key,
        }
        for name, run in planned.runs.items()
    }
    if os.environ.get("TUNEMAP_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(runs, indent=1) + "\n")
    assert runs == json.loads(GOLDEN.read_text())


# --- digests ----------------------------------------------------------------------------------------------


def digests(values: dict[str, Any]) -> dict[str, set[str]]:
    planned, problems = plan_study(Study.model_validate(values))
    assert problems == []
    return {
        kind: {getattr(run, kind) for run in planned.runs.values()} for kind in ("training_digest", "evaluation_digest")
    }


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other"},
        {"data_root": "/elsewhere"},
        {"report": {"title": "Other", "introduction": "x", "baseline_method": "lora"}},
        {"hardware": {"device": "cpu"}},
        {
            "experiments": [
                {"name": "new", "question": "Other?", "vary": {"method": ["lora", "full"]}, "profile": "torch"}
            ]
        },
        {"prompt_templates": {"unused": "{prompt}"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_touch_a_run_changes_no_digest(change):
    assert digests(study(**change)) == digests(study())


def test_renaming_a_prompt_template_changes_nothing_that_training_is_given():
    def specs(name):
        datasets = {"sums": STUDY["datasets"]["sums"] | {"prompt_template": name}}
        planned = plan(datasets=datasets, prompt_templates={name: "Solve: {prompt}"})
        return {run.id: run.training_spec() for run in planned.runs.values()}

    assert specs("short") == specs("terse")
    assert all(spec["prompt_template"] == "Solve: {prompt}" for spec in specs("short").values())


def test_renaming_changes_no_digest():
    renamed = json.loads(
        json.dumps(study()).replace('"tiny":', '"small":').replace('"model": "tiny"', '"model": "small"')
        .replace('"sums"', '"problems"').replace('"lora":', '"adapter":').replace('"lora"]', '"adapter"]')
    )  # fmt: skip
    assert set(renamed["methods"]) == {"full", "adapter", "qlora"}
    assert digests(renamed) == digests(study())


@pytest.mark.parametrize("change", [{"evaluation_batch_size": 3}, {"max_new_tokens": 9}])
def test_evaluation_factors_do_not_retrain(change):
    before, after = digests(study()), digests(study(defaults=STUDY["defaults"] | change))
    assert before["training_digest"] == after["training_digest"]
    assert not before["evaluation_digest"] & after["evaluation_digest"]


def test_where_a_value_comes_from_is_in_no_digest():
    elsewhere = study({"fixed": {"max_steps": 20}, "vary": {"method": ["full", "lora"]}}, defaults={
        "model": "tiny", "dataset": "sums"
    })  # fmt: skip
    assert digests(elsewhere) == digests(study())


# --- the whole plan ---------------------------------------------------------------------------------------


def test_a_plan_is_json_that_its_runs_come_back_from():
    planned = plan(GRID | {"seeds": [0, 1]})
    values = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert list(values["runs"]) == list(planned.runs)
    for name, run in planned.runs.items():
        again = Run.model_validate_json(json.dumps({key: values["runs"][name][key] for key in Run.model_fields}))
        assert again.evaluation_digest == run.evaluation_digest == values["runs"][name]["evaluation_digest"]
        assert again.training_digest == values["runs"][name]["digest"]


def test_a_thousand_runs_are_planned_in_seconds(tmp_path):
    import yaml

    values = study(
        *(
            {
                "fixed": {"method": "lora", "learning_rate": 0.01 * (index + 1)},
                "vary": {"method.rank": [1, 2, 4, 8, 16], "gradient_checkpointing": [False, True]},
                "seeds": list(range(10)),
            }
            for index in range(10)
        )
    )
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(values))
    started = time.process_time()
    planned = load_plan(path)
    assert len(planned.to_dict()["runs"]) == 1001
    assert time.process_time() - started < 3
