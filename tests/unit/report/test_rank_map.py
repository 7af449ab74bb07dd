"""Chosen ranks as a table and as heat maps, and the gate on adapters that are not alike."""

import pandas as pd
import pytest

from tunemap.collect import RANK_COLUMNS, rank_rows
from tunemap.report.comparisons import compare
from tunemap.report.points import Result
from tunemap.report.rank_map import draw_ranks

LINEAR, HOME_MADE = "peft.tuners.lora.layer.Linear", "peft.tuners.lora.variants.Other"


def module(layer, part, rank, importance=None):
    return {f"model.layers.{layer}.{part}": {"shape": [8, 8], "rank": rank, "importance": importance}}


def plan_of(ranks, importances=None):
    modules = {}
    for index, rank in enumerate(ranks):
        modules |= module(
            index // 2, "self_attn.q_proj" if index % 2 else "mlp.up_proj", rank, (importances or ranks)[index]
        )
    return {"settings": {"reference_rank": 8}, "modules": modules}


def result(run, plan=None, **planned):
    return Result(run, {"method": {"kind": "gora"}, **planned}, "ok", facts={"gora": plan} if plan else {})


def table(**plans):
    rows = list(rank_rows({run: result(run, plan) for run, plan in plans.items()}))
    frame = pd.DataFrame(rows, columns=list(RANK_COLUMNS))
    return frame.assign(point=frame["run"])


def test_table_has_a_row_per_module_with_its_layer_and_part():
    rows = list(rank_rows({"a": result("a", plan_of([4, 9])), "full": result("full")}))
    assert [tuple(row[name] for name in RANK_COLUMNS) for row in rows] == [
        ("a", "model.layers.0.mlp.up_proj", 0, "up_proj", 4, 8, 4),
        ("a", "model.layers.0.self_attn.q_proj", 0, "q_proj", 9, 8, 9),
    ]


def numbers(axes):
    return [text.get_text() for text in axes.texts]


def test_map_shows_ranks_layer_by_layer_and_importances_relative_to_the_largest():
    figure, caption, alt = draw_ranks(table(gora=plan_of([4, 9, 5, 16], [1.0, 2.0, 0.5, 4.0])))
    ranks, importances, *_ = figure.axes
    assert numbers(ranks) == ["4", "9", "5", "16"]
    assert numbers(importances) == ["0.25", "0.50", "0.12", "1.00"]
    assert [label.get_text() for label in ranks.get_xticklabels()] == ["up_proj", "q_proj"]
    assert "Reference rank 8" in caption
    assert "gora: ranks 4 to 16" in alt


@pytest.mark.parametrize("plans", [{}, {"lora": plan_of([8, 8, 8, 8])}])
def test_equal_ranks_draw_nothing(plans):
    assert draw_ranks(table(**plans)) is None


def test_more_methods_than_fit_are_counted():
    figure, caption, _ = draw_ranks(table(**{f"m{number}": plan_of([4, 5 + number]) for number in range(8)}))
    assert len([axes for axes in figure.axes if axes.texts]) == 6
    assert "3 more in tables/ranks.csv" in caption


def adapter_gates(first, second, vary=("method",)):
    """The gate between two runs of an experiment, each given as (layer class, method parameters)."""
    runs, results = {}, {}
    for name, (layer, method) in (("first", first), ("second", second)):
        planned = {
            "model_name": "m",
            "model": {},
            "dataset_name": "d",
            "dataset": {},
            "method_name": name,
            "method": {"kind": "gora", **method},
            "factors": {"seed": 0},
            "provenance": {},
        }
        runs[name] = planned
        results[name] = Result(name, planned, "ok", facts={"adapter_layers": {layer: 4}} if layer else {})
    experiment = {"name": "e", "vary": list(vary), "runs": list(runs), "base_runs": []}
    plan = {"report": {"baseline_method": "second"}, "runs": runs, "experiments": [experiment]}
    _, comparisons, gates = compare(plan, results)
    return [gate for gate in gates if gate["gate"] == "same_adapters"], comparisons[0]


def test_alike_adapters_pass():
    (gate,), row = adapter_gates((LINEAR, {"adapter_dtype": "float32"}), (LINEAR, {"adapter_dtype": "float32"}))
    assert gate["passed"]
    assert "other adapters" not in (row["caveat"] or "")


def test_other_dtype_is_said_with_the_comparison():
    (gate,), row = adapter_gates((LINEAR, {"adapter_dtype": "bfloat16"}), (LINEAR, {"adapter_dtype": "float32"}))
    assert not gate["passed"]
    assert "first has other adapters than second: bfloat16 against float32" in row["caveat"]


def test_other_layer_class_trips_over_bases_that_are_alike_only():
    (gate,), _ = adapter_gates((HOME_MADE, {}), (LINEAR, {}))
    assert not gate["passed"]
    (gate,), _ = adapter_gates((HOME_MADE, {"quantization_type": "nf4"}), (LINEAR, {}))
    assert gate["passed"]


@pytest.mark.parametrize("other", [None, "peft.tuners.vera.layer.Linear"])
def test_methods_outside_the_lora_family_are_not_compared_so(other):
    assert adapter_gates((LINEAR, {}), (other, {}))[0] == []


def test_experiment_about_the_dtype_may_vary_it():
    first, second = ((LINEAR, {"adapter_dtype": dtype}) for dtype in ("bfloat16", "float32"))
    (gate,), _ = adapter_gates(first, second, vary=("method", "method.adapter_dtype"))
    assert gate["passed"]
