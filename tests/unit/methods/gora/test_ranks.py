"""GoRA's ranks against golden values of the released code and against what the rank rule promises."""

import math

import pytest
import torch
from gora_examples import SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st

from tunemap.errors import UserError
from tunemap.methods import gora
from tunemap.methods.parameters import lora_closed_form


def test_golden_importances(golden, golden_inputs):
    allocations = golden["official_code"]["synthetic_allocation"]
    frobenius = allocations["parser_defaults(union_frobenius_norm,linear,1..9999)"]["importance"]
    assert len(golden_inputs) == 28
    for name, (weight, gradient) in golden_inputs.items():
        expected = allocations[SCRIPTS]["importance"][name]
        assert gora.importance(weight, gradient) == pytest.approx(expected, rel=1e-5)
        assert gora.frobenius_importance(weight, gradient) == pytest.approx(frobenius[name], rel=1e-5)


@pytest.mark.parametrize(
    ("preset", "min_rank", "max_rank", "variant"),
    [
        ("official_scripts", 4, 32, SCRIPTS),
        ("official_scripts", 0, None, "no_clamp(linear)"),
        ("official_scripts", 1, 9999, "parser_defaults(union_frobenius_norm,linear,1..9999)"),
        ("official_scripts", 4, 32, "grad_frobenius_norm"),
        ("official_scripts", 4, 32, "union_nuc_norm"),
        ("paper", 4, 32, "paper_text_nearest_sqrt"),
    ],
)
def test_golden_ranks(golden, golden_shapes, preset, min_rank, max_rank, variant):
    allocations = golden["official_code"]["synthetic_allocation"]
    expected = golden["paper_text"][variant] if preset == "paper" else allocations[variant]
    importances = expected.get("importance", allocations[SCRIPTS]["importance"])
    ranks = gora.allocate_ranks(
        importances, golden_shapes, reference_rank=8, min_rank=min_rank, max_rank=max_rank, preset=preset
    )
    assert ranks == expected["rank"]
    assert lora_closed_form(golden_shapes, 8) == 32768


def test_golden_ranks_of_our_own_importances(golden, golden_inputs, golden_shapes):
    importances = {name: gora.importance(w, g) for name, (w, g) in golden_inputs.items()}
    bounds = {"reference_rank": 8, "min_rank": 4, "max_rank": 32}
    scripts = gora.allocate_ranks(importances, golden_shapes, **bounds, preset="official_scripts")
    paper = gora.allocate_ranks(importances, golden_shapes, **bounds, preset="paper")
    assert scripts == golden["official_code"]["synthetic_allocation"][SCRIPTS]["rank"]
    assert paper == golden["paper_text"]["paper_text_nearest_sqrt"]["rank"]


LLAMA_LIKE = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "up": (128, 64), "down": (64, 128)}
PRESETS = ["paper", "official_scripts", "exact_budget"]
BOUNDS = {"reference_rank": 8, "min_rank": 4, "max_rank": 32}
some_importances = st.lists(st.floats(1e-8, 1.0), min_size=12, max_size=12)


def modules(count: int) -> dict[str, tuple[int, int]]:
    kinds = list(LLAMA_LIKE.items())
    return {f"layers.{i // 6}.{kinds[i % 6][0]}": kinds[i % 6][1] for i in range(count)}


@pytest.mark.parametrize("preset", PRESETS)
@given(values=some_importances, scale=st.floats(1e-6, 1e5))
@settings(max_examples=100, deadline=None)
def test_ranks_do_not_depend_on_the_loss_scale(preset, values, scale):
    shapes = modules(12)
    importances = dict(zip(shapes, values, strict=True))
    scaled = {name: value * scale for name, value in importances.items()}
    assert gora.allocate_ranks(importances, shapes, **BOUNDS, preset=preset) == gora.allocate_ranks(
        scaled, shapes, **BOUNDS, preset=preset
    )


@pytest.mark.parametrize("preset", PRESETS)
@given(values=some_importances)
@settings(max_examples=60, deadline=None)
def test_ranks_grow_with_importance_and_keep_their_bounds(preset, values):
    shapes = modules(12)
    importances = dict(zip(shapes, values, strict=True))
    ranks = gora.allocate_ranks(importances, shapes, **BOUNDS, preset=preset)
    for one in shapes:
        assert 4 <= ranks[one] <= min(32, *shapes[one])
        for other in shapes:
            if shapes[one] == shapes[other] and importances[one] > importances[other] * (1 + 1e-9):
                assert ranks[one] >= ranks[other]


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_importances_give_the_reference_rank_times_mean_over_own_feature(preset):
    shapes = modules(12)
    ranks = gora.allocate_ranks(dict.fromkeys(shapes, 0.3), shapes, **BOUNDS, preset=preset)
    feature = math.sqrt if preset == "paper" else float
    mean = sum(feature(sum(shape)) for shape in shapes.values()) / len(shapes)
    for name, shape in shapes.items():
        assert abs(ranks[name] - 8 * mean / feature(sum(shape))) <= 1
    same_shape = dict.fromkeys("abc", (64, 64))
    assert set(gora.allocate_ranks(dict.fromkeys("abc", 0.1), same_shape, **BOUNDS, preset=preset).values()) == {8}


@given(values=some_importances)
@settings(max_examples=60, deadline=None)
def test_unclamped_script_ranks_spend_at_most_the_budget_and_miss_less_than_one_rank_each(values):
    shapes = dict.fromkeys(modules(12), (400, 400)) | {"odd": (300, 500)}
    importances = dict(zip(shapes, [*values, 0.5], strict=True))
    ranks = gora.allocate_ranks(
        importances, shapes, reference_rank=8, min_rank=0, max_rank=None, preset="official_scripts"
    )
    missing = lora_closed_form(shapes, 8) - lora_closed_form(shapes, ranks)
    assert 0 <= missing < lora_closed_form(shapes, 1)


@given(values=some_importances)
@settings(max_examples=60, deadline=None)
def test_exact_budget_misses_less_than_one_rank_of_a_module_that_can_still_grow(values):
    shapes = modules(12)
    importances = dict(zip(shapes, values, strict=True))
    ranks = gora.allocate_ranks(importances, shapes, **BOUNDS, preset="exact_budget")
    missing = lora_closed_form(shapes, 8) - lora_closed_form(shapes, ranks)
    growing = [sum(shape) for name, shape in shapes.items() if ranks[name] < min(32, *shape)]
    assert 0 <= missing < min(growing)


@pytest.mark.parametrize("preset", ["paper", "official_scripts"])
@given(values=some_importances)
@settings(max_examples=60, deadline=None)
def test_clamped_count_stays_between_the_bounds(preset, values):
    shapes = modules(12)
    ranks = gora.allocate_ranks(dict(zip(shapes, values, strict=True)), shapes, **BOUNDS, preset=preset)
    assert 4 / 8 <= lora_closed_form(shapes, ranks) / lora_closed_form(shapes, 8) <= 32 / 8


def test_ranks_never_exceed_the_smaller_side_of_the_weight():
    shapes = {"narrow": (3, 50), "wide": (64, 64)}
    importances = {"narrow": 0.9, "wide": 0.1}
    for preset in [*PRESETS, "uniform"]:
        ranks = gora.allocate_ranks(importances, shapes, **BOUNDS, preset=preset)
        assert ranks["narrow"] == 3, preset


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importance_that_is_not_finite_is_named(value):
    with pytest.raises(UserError, match=r"importance of a is (nan|inf)"):
        gora.allocate_ranks({"a": value, "b": 1.0}, {"a": (8, 8), "b": (8, 8)}, **BOUNDS, preset="paper")


def test_all_zero_importances_allocate_nothing():
    with pytest.raises(UserError, match="every importance is zero"):
        gora.allocate_ranks({"a": 0.0}, {"a": (8, 8)}, **BOUNDS, preset="paper")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scale", [1e-6, 1 / 3, 3.0, 7.0, 1e5])
def test_near_ties_do_not_flip_with_the_loss_scale(preset, scale):
    shapes = modules(12)
    values = [1.0, 0.625, 0.25, 0.625, 0.9999999999999999, 0.25, 0.875, 0.5625, 0.25, 0.5, 1.0, 1.0]
    importances = dict(zip(shapes, values, strict=True))
    scaled = {name: value * scale for name, value in importances.items()}
    assert gora.allocate_ranks(importances, shapes, **BOUNDS, preset=preset) == gora.allocate_ranks(
        scaled, shapes, **BOUNDS, preset=preset
    )


def test_importance_is_unchanged_by_moving_scale_from_weight_to_gradient():
    w, g = torch.randn(12, 7), torch.randn(12, 7)
    assert gora.importance(4 * w, g / 4) == pytest.approx(gora.importance(w, g), rel=1e-6)
    assert gora.importance(w, 3 * g) == pytest.approx(3 * gora.importance(w, g), rel=1e-6)
