"""GoRA against golden values of the released code and against the properties that its equations promise."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from tunemap.errors import UserError
from tunemap.methods import gora
from tunemap.methods.parameters import count_parameters, linear_shapes, lora_closed_form

torch.set_num_threads(1)


# --- golden values ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_folder(shared_data) -> Path:
    folder = shared_data.parent / "reference" / "gora"
    if not folder.is_dir():
        pytest.skip(f"no golden values of GoRA in {folder}")
    return folder


@pytest.fixture(scope="module")
def golden(golden_folder) -> dict:
    return json.loads((golden_folder / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden_shapes(golden) -> dict[str, tuple[int, int]]:
    return {name: tuple(shape) for name, shape in golden["shapes"].items()}


@pytest.fixture(scope="module")
def golden_inputs(golden_folder, golden_shapes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(W, mean of the four gradients) per module."""
    with np.load(golden_folder / "synthetic_inputs.npz") as arrays:
        return {
            name: (
                torch.from_numpy(arrays[f"W/{name}"]),
                torch.stack([torch.from_numpy(arrays[f"G{t}/{name}"]) for t in range(4)]).mean(0),
            )
            for name in golden_shapes
        }


SCRIPTS = "scripts(union_mean,linear,4..32)"


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


def test_golden_a_is_the_uniform_stream_and_golden_b_has_the_descending_sign(
    golden_folder, golden, golden_inputs, golden_shapes
):
    ranks = golden["official_code"]["synthetic_allocation"][SCRIPTS]["rank"]
    generator = torch.Generator().manual_seed(0)
    with np.load(golden_folder / "golden_arrays.npz") as arrays:
        for name, shape in golden_shapes.items():
            a = gora.initial_a(shape, int(ranks[name]), generator)
            assert torch.equal(a, torch.from_numpy(arrays[f"scripts/A/{name}"]))
            b = gora.initial_b(golden_inputs[name][1], a, alpha=16, gamma=0.05)
            expected = torch.from_numpy(arrays[f"scripts/B/{name}"])
            assert (b - expected).norm() <= 1e-5 * expected.norm()


def test_golden_spot_values_of_the_first_step(golden, golden_inputs, golden_folder):
    recorded = golden["official_code"]["synthetic_init"]["scripts(scale_by_lr,rs,dynamic)"]
    with np.load(golden_folder / "golden_arrays.npz") as arrays:
        for name, values in recorded.items():
            g = golden_inputs[name][1]
            a = torch.from_numpy(arrays[f"scripts/A/{name}"])
            step = values["scaling"] * gora.initial_b(g, a, alpha=16, gamma=0.05) @ a
            assert float(step.norm() / g.norm()) == pytest.approx(values["deltaW_fro_over_grad_fro"], rel=1e-5)
            cosine = float((step * -g).sum() / (step.norm() * g.norm()))
            assert cosine == pytest.approx(values["cos_deltaW_minus_grad"], rel=1e-5)


# --- allocation properties --------------------------------------------------------------------------------------------

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


# --- initialisation ---------------------------------------------------------------------------------------------------


@given(rank=st.integers(1, 12), seed=st.integers(0, 2**31), gamma=st.floats(0.001, 1.0))
@settings(max_examples=40, deadline=None)
def test_first_step_is_the_projected_negative_gradient(rank, seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(20, 16, generator=generator)
    a = gora.initial_a((20, 16), rank, generator)
    step = 16 / math.sqrt(rank) * gora.initial_b(g, a, alpha=16, gamma=gamma).double() @ a.double()
    _, _, rows = torch.linalg.svd(a.double(), full_matrices=False)
    expected = -gamma * math.sqrt(16 / rank) * g.double() @ rows.T @ rows
    assert torch.allclose(step, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (step * g).sum() < 0
    assert step.norm() <= gamma * math.sqrt(16 / rank) * g.norm() * (1 + 1e-5)


def test_first_step_is_linear_in_the_gradient_and_free_of_alpha():
    generator = torch.Generator().manual_seed(3)
    g, a = torch.randn(9, 8, generator=generator), gora.initial_a((9, 8), 4, generator)
    b = gora.initial_b(g, a, alpha=16, gamma=0.05)
    tenfold, other_alpha = gora.initial_b(10 * g, a, alpha=16, gamma=0.05), gora.initial_b(g, a, alpha=32, gamma=0.05)
    assert (tenfold - 10 * b).norm() <= 1e-5 * tenfold.norm()
    assert (32 * other_alpha - 16 * b).norm() <= 1e-5 * (16 * b).norm()
    assert not gora.initial_b(g, a, alpha=16, gamma=0.0).any()


def test_a_depends_on_seed_and_name_only():
    one = gora.initial_a((8, 64), 4, gora.module_generator(0, "layers.0.q"))
    assert torch.equal(one, gora.initial_a((8, 64), 4, gora.module_generator(0, "layers.0.q")))
    assert not torch.equal(one, gora.initial_a((8, 64), 4, gora.module_generator(1, "layers.0.q")))
    assert not torch.equal(one, gora.initial_a((8, 64), 4, gora.module_generator(0, "layers.1.q")))
    assert torch.equal(one, gora.initial_a((8, 64), 9, gora.module_generator(0, "layers.0.q"))[:4])
    assert one.abs().max() <= 1 / 8


# --- a model ----------------------------------------------------------------------------------------------------------


def tiny_qwen2(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def some_batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 48, (count, 4, 16), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def mean_loss(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([gora.model_loss(model, batch).double() for batch in batches]).mean())


def plain_gradients(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Oracle: backward on a copy with every weight trainable, gradients averaged afterwards."""
    model = copy.deepcopy(model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for batch in batches:
        gora.model_loss(model, batch).backward()
    return {name: model.get_parameter(f"{name}.weight").grad / len(batches) for name in linear_shapes(model)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("route", list(gora.ROUTES))
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_the_mean_over_all_batches_also_for_the_layer_reached_last(route, count):
    model, batches = tiny_qwen2(), some_batches(count)
    made = gora.plan(model, batches, gora.method("gora"), route=route)
    expected = plain_gradients(model, batches)
    assert list(made.gradients) == list(expected)
    assert "model.layers.0.self_attn.q_proj" in expected
    assert made.batch_count == count
    for name, gradient in made.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def test_planning_leaves_the_model_exactly_as_it_was():
    model = tiny_qwen2().eval()
    model.lm_head.train()  # a mixture, to see each module's own flag restored
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    kept = torch.ones_like(model.model.layers[1].mlp.up_proj.weight)
    model.model.layers[1].mlp.up_proj.weight.grad = kept
    before = state_of(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    training = [name for name, m in model.named_modules() if m.training]
    torch.manual_seed(5)
    expected_random = torch.rand(3)

    torch.manual_seed(5)
    made = gora.plan(model, some_batches(2), gora.method("gora"))

    assert torch.equal(torch.rand(3), expected_random)
    # A gradient left over from before is not counted in.
    expected = plain_gradients(tiny_qwen2(), some_batches(2))["model.layers.1.mlp.up_proj"]
    assert torch.allclose(made.gradients["model.layers.1.mlp.up_proj"], expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert [name for name, m in model.named_modules() if m.training] == training
    assert model.model.layers[1].mlp.up_proj.weight.grad is kept
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("1.mlp.up_proj.weight"))
    assert not any(m._forward_hooks for m in model.modules())


def test_estimation_runs_in_training_mode():
    seen = []

    def loss(model, batch):
        seen.append(all(module.training for module in model.modules()))
        return gora.model_loss(model, batch)

    gora.plan(tiny_qwen2().eval(), some_batches(2), gora.method("gora"), loss_function=loss)
    assert seen == [True, True]


def test_the_model_is_restored_after_a_failing_loss():
    model = tiny_qwen2().eval().requires_grad_(False)

    def failing(model, batch):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        gora.plan(model, some_batches(1), gora.method("gora"), loss_function=failing)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training or m._forward_hooks for m in model.modules())


def test_at_most_one_gradient_lives_at_a_time(monkeypatch):
    model = tiny_qwen2()
    alive = []
    original = gora._take_weight_gradient

    def watched(name, add):
        inner = original(name, add)

        def hook(weight):
            alive.append(sum(p.grad is not None for p in model.parameters()))
            inner(weight)

        return hook

    monkeypatch.setattr(gora, "_take_weight_gradient", watched)
    gora.plan(model, some_batches(2), gora.method("gora"))
    assert alive == [1] * (2 * 14)


@pytest.mark.parametrize("name", ["gora", "gora_official_scripts", "gora_exact_budget", "gora_init_only"])
def test_gora_initial_step_descends(name):
    """Catches the lost minus sign: the loss must fall by the first-order amount."""
    model, batches = tiny_qwen2(), some_batches(3)
    base = mean_loss(model, batches)
    changes = {}
    for gamma in (1e-3, 5e-2):
        made = gora.plan(model, batches, gora.method(name, gamma=gamma, min_rank=2, reference_rank=4, max_rank=16))
        adapted = gora.attach(copy.deepcopy(model), made, task_type="CAUSAL_LM")
        layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        slope = sum(
            float((made.gradients[n] * layer.get_delta_weight("default").detach()).sum()) for n, layer in layers.items()
        )
        changes[gamma] = (mean_loss(adapted, batches) - base, slope)
    small, large = changes[1e-3], changes[5e-2]
    assert small[1] < 0
    assert small[0] == pytest.approx(small[1], rel=0.02)
    assert large[0] < 0
    assert large[0] == pytest.approx(large[1], rel=0.2)


def test_gamma_zero_starts_at_the_base_loss():
    model, batches = tiny_qwen2(), some_batches(2)
    made = gora.plan(model, batches, gora.method("gora", gamma=0.0))
    adapted = gora.attach(copy.deepcopy(model), made)
    assert mean_loss(adapted, batches) == mean_loss(model, batches)


def test_ranks_ignore_batch_order_and_loss_scale_while_b_follows_the_scale():
    model, batches = tiny_qwen2(), some_batches(4)
    made = gora.plan(model, batches, gora.method("gora"))
    turned = gora.plan(model, batches[::-1], gora.method("gora"))
    scaled = gora.plan(model, batches, gora.method("gora"), loss_function=lambda m, b: 1e3 * gora.model_loss(m, b))
    assert made.ranks == turned.ranks == scaled.ranks
    assert len(set(made.ranks.values())) > 1
    for name, gradient in made.gradients.items():
        assert torch.allclose(scaled.gradients[name], 1e3 * gradient, rtol=1e-4, atol=1e-4)


def test_same_seed_same_bits_and_no_random_number_drawn_from_the_caller():
    adapters, draws = [], []
    for name in ("gora", "gora", "lora"):
        model = tiny_qwen2()
        torch.manual_seed(7)
        made = gora.plan(model, some_batches(2), gora.method(name))
        adapted = gora.attach(model, made)
        draws.append(torch.rand(4))
        adapters.append({n: p for n, p in adapted.named_parameters() if "lora_" in n})
    assert all(torch.equal(adapters[0][n], p) for n, p in adapters[1].items())
    # The LoRA run sees the same random stream afterwards, and its A starts with the same rows.
    assert torch.equal(draws[0], draws[2])
    for name, p in adapters[2].items():
        if "lora_A" in name:
            rows = min(len(p), len(adapters[0][name]))
            assert torch.equal(p[:rows], adapters[0][name][:rows])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", list(gora.ROUTES))
def test_gradient_checkpointing_changes_nothing(reentrant, route):
    batches = some_batches(2)
    expected = gora.plan(tiny_qwen2(), batches, gora.method("gora"), route=route)
    model = tiny_qwen2()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: recomputed.append(1))
    made = gora.plan(model, batches, gora.method("gora"), route=route)
    assert len(recomputed) == 4
    assert made.ranks == expected.ranks
    for name, gradient in made.gradients.items():
        assert torch.equal(gradient, expected.gradients[name])


def test_bfloat16_base_keeps_fp32_sums_and_adapters():
    batches = some_batches(8)
    expected = gora.plan(tiny_qwen2(), batches, gora.method("gora"))
    model = tiny_qwen2(torch.bfloat16)
    made = gora.plan(model, batches, gora.method("gora"))
    differences = [abs(made.ranks[name] - expected.ranks[name]) for name in made.ranks]
    assert max(differences) <= 1
    assert sum(d > 0 for d in differences) <= 1
    for name, gradient in made.gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.gradients[name].flatten(), dim=0)
        assert cosine >= 0.999
    adapted = gora.attach(model, made)
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" not in n} == {torch.bfloat16}


# --- processes --------------------------------------------------------------------------------------------------------


def _plan_in_a_group(process: int, world_size: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=process, world_size=world_size)
    batches = some_batches(6)[process::world_size]
    made = gora.plan(tiny_qwen2(), batches, gora.method("gora"))
    adapted = gora.attach(tiny_qwen2(), made)
    adapters = {n: p.detach() for n, p in adapted.named_parameters() if "lora_" in n}
    saved = (made.ranks, made.importances, made.gradients, made.batch_count, adapters)
    torch.save(saved, os.path.join(folder, f"{process}.pt"))
    dist.destroy_process_group()


def test_two_processes_agree_and_equal_one_process_on_the_union(tmp_path):
    mp.start_processes(  # forked: a spawned process could not import this file by name
        _plan_in_a_group, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork"
    )
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    alone = gora.plan(tiny_qwen2(), some_batches(6), gora.method("gora"))
    assert first[0] == second[0] == alone.ranks
    assert first[1] == second[1]
    assert first[3] == second[3] == alone.batch_count == 6
    assert all(torch.equal(first[4][name], second[4][name]) for name in first[4])
    for name, gradient in alone.gradients.items():
        assert torch.allclose(first[2][name], gradient, rtol=1e-5, atol=1e-7)
    half = gora.plan(tiny_qwen2(), some_batches(6)[::2], gora.method("gora"))
    assert half.importances != alone.importances


# --- 4-bit ------------------------------------------------------------------------------------------------------------


def quantised(model: nn.Module, dequantised: bool = False) -> nn.Module:
    """A copy with nf4 linear layers, or with ordinary layers that hold the same rounded weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(model)
    for name in linear_shapes(model):
        linear = model.get_submodule(name)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4"
        )
        packed.load_state_dict(linear.state_dict())
        packed.support_avx512bf16_for_cpu = False  # its in-place repacking for inference loses gradients
        packed.to("cpu")
        packed.weight.requires_grad_(False)
        if dequantised:
            rounded = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            linear.weight.data = rounded.to(linear.weight.dtype)
        else:
            model.set_submodule(name, packed)
    return model


def test_four_bit_weights_refuse_the_unquantised_route_and_name_both():
    with pytest.raises(UserError, match=r"holds quantised weights.*route unquantised.*route dequantised"):
        gora.plan(quantised(tiny_qwen2()), some_batches(1), gora.method("gora"))


def test_dequantised_route_equals_the_gradient_of_the_dequantised_model():
    model, batches = tiny_qwen2(), some_batches(3)
    packed = quantised(model)
    before = {n: p.detach().clone() for n, p in packed.named_parameters()}
    made = gora.plan(packed, batches, gora.method("gora"), route="dequantised")
    expected = gora.plan(quantised(model, dequantised=True), batches, gora.method("gora"))
    assert made.shapes == expected.shapes
    assert made.ranks == expected.ranks
    for name, gradient in made.gradients.items():
        assert torch.allclose(gradient, expected.gradients[name], rtol=1e-3, atol=1e-5), name
        assert made.importances[name] == pytest.approx(expected.importances[name], rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in packed.named_parameters())
    full = gora.plan(model, batches, gora.method("gora"))
    assert max(abs(made.ranks[n] - full.ranks[n]) for n in full.ranks) <= 2
    assert made.importances != full.importances


@pytest.mark.parametrize("route", list(gora.ROUTES))
def test_both_four_bit_routes_start_below_the_four_bit_base_loss(route):
    model, batches = tiny_qwen2(), some_batches(3)
    packed = quantised(model)
    base = mean_loss(packed, batches)
    made = gora.plan(model if route == "unquantised" else packed, batches, gora.method("gora"), route=route)
    adapted = gora.attach(packed, made, task_type="CAUSAL_LM")
    assert count_parameters(adapted).trainable == made.trainable
    assert mean_loss(adapted, batches) < base
    gora.model_loss(adapted.train(), batches[0]).backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(gradients) == 14
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_weight_svd_over_four_bit_weights_is_refused():
    model = tiny_qwen2()
    made = gora.plan(model, some_batches(1), gora.method("gora_hpml", reference_rank=4))
    with pytest.raises(UserError, match=r"weight_svd changes the base weights.*is quantised"):
        gora.attach(quantised(model), made)


# --- adapters as plain LoRA -------------------------------------------------------------------------------------------

LADDER = list(gora.METHODS)


@pytest.mark.parametrize("name", LADDER)
def test_adapter_saves_loads_and_merges_as_plain_lora(name, tmp_path):
    model, batches = tiny_qwen2(), some_batches(2)
    before = state_of(model)
    small = {"reference_rank": 4, "min_rank": 1, "max_rank": 16}
    made = gora.plan(model, batches, gora.method(name, **small))
    adapted = gora.attach(copy.deepcopy(model), made, task_type="CAUSAL_LM")
    with torch.no_grad():  # as after some training
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    adapted.eval()
    expected = adapted(**batches[0]).logits
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert torch.allclose(loaded(**batches[0]).logits, expected, atol=1e-5)
    merged = loaded.merge_and_unload()
    assert torch.allclose(merged(**batches[0]).logits, expected, atol=1e-4)
    base = adapted.get_base_model().state_dict()
    kept = {n: base.get(n.replace("_proj.", "_proj.base_layer."), base.get(n)) for n in before}
    assert all(torch.equal(kept[n], before[n]) for n in before) == (name != "gora_hpml")


@pytest.mark.parametrize("name", LADDER)
def test_every_method_of_the_ladder_has_the_same_layer_class_and_only_adapters_trainable(name):
    model = tiny_qwen2()
    made = gora.plan(model, some_batches(2), gora.method(name, reference_rank=4, min_rank=1, max_rank=16))
    adapted = gora.attach(model, made)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert {type(layer).__module__ for layer in layers.values()} == {"peft.tuners.lora.layer"}
    assert {n: layer.r["default"] for n, layer in layers.items()} == made.ranks
    alpha = made.settings.alpha
    for n, layer in layers.items():
        expected = alpha / math.sqrt(made.ranks[n]) if made.settings.rank_stabilised else alpha / 4
        assert layer.scaling["default"] == pytest.approx(expected)
    assert all("lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)
    counts = count_parameters(adapted)
    assert counts.trainable == counts.adapter == made.trainable


def test_controls_separate_the_ingredients():
    batches = some_batches(2)
    plans = {name: gora.plan(tiny_qwen2(), batches, gora.method(name)) for name in LADDER if name != "gora_hpml"}
    models = {name: gora.attach(tiny_qwen2(), made) for name, made in plans.items()}
    has_step = {
        name: any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
        for name, model in models.items()
    }
    varied = {name: len(set(made.ranks.values())) > 1 for name, made in plans.items()}
    whole = ["gora", "gora_official_scripts", "gora_exact_budget"]
    assert [name for name in has_step if has_step[name] and varied[name]] == whole
    assert has_step["gora_init_only"]
    assert not varied["gora_init_only"]
    assert varied["gora_ranks_only"]
    assert not has_step["gora_ranks_only"]
    assert plans["gora_ranks_only"].ranks == plans["gora"].ranks
    assert plans["gora_init_only"].budget == plans["gora_init_only"].trainable
    assert not any(has_step[name] or varied[name] for name in ("lora", "rslora", "lora+", "rslora+lora+"))
    assert [plans[n].settings.learning_rate_ratio for n in ("lora", "rslora", "lora+", "rslora+lora+")] == [
        1,
        1,
        16,
        16,
    ]
    assert plans["gora_exact_budget"].trainable == pytest.approx(plans["lora"].trainable, rel=0.01)


def test_hpml_is_pissa_with_size_biased_ranks():
    model, batches = tiny_qwen2(), some_batches(2)
    made = gora.plan(model, batches, gora.method("gora_hpml", reference_rank=4, alpha=8.0))
    assert made.gradients is None
    adapted = gora.attach(copy.deepcopy(model), made)
    assert mean_loss(adapted, batches) == pytest.approx(mean_loss(model, batches), abs=1e-5)
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weight = model.get_parameter(f"{name}.weight").detach()
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            r = made.ranks[name]
            leading = u[:, :r] @ torch.diag(s[:r]) @ v[:r]
            assert torch.allclose(layer.get_delta_weight("default"), leading, atol=1e-5)
            assert torch.allclose(layer.get_base_layer().weight, weight - leading, atol=1e-5)


def test_lora_needs_no_batches_and_costs_nothing():
    made = gora.plan(tiny_qwen2(), [], gora.method("lora"))
    assert made.estimation_s == 0
    assert made.batch_count == 0
    assert set(made.ranks.values()) == {8}
    assert made.trainable == made.budget


# --- the artefact and the messages ------------------------------------------------------------------------------------


def test_summary_is_json_and_carries_the_real_count():
    made = gora.plan(tiny_qwen2(), some_batches(2), gora.method("gora"), targets=["q_proj", "v_proj"])
    summary = json.loads(json.dumps(made.summary()))
    assert list(summary["modules"]) == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    expected = sum(m["rank"] * sum(m["shape"]) for m in summary["modules"].values())
    assert summary["trainable"] == expected
    assert summary["budget"] == 2 * 8 * (64 + 48)
    assert summary["trainable_to_budget"] == pytest.approx(expected / summary["budget"])
    assert summary["estimation_s"] > 0
    assert summary["estimation_peak_bytes"] is None  # not measured is not zero
    assert gora.GoraPlan.from_summary(summary) == made  # gradients apart, which are not compared
    assert gora.GoraPlan.from_summary(summary).gradients is None
    assert made.released().gradients is None
    assert made.released().ranks == made.ranks


def test_a_tracker_measures_the_estimation_only():
    class Tracker:
        peak_allocated_bytes = 0

        def __enter__(self):
            self.open = True

        def __exit__(self, *error):
            self.open, self.peak_allocated_bytes = False, 123

    tracker = Tracker()
    seen = []

    def loss(model, batch):
        seen.append(tracker.open)
        return gora.model_loss(model, batch)

    made = gora.plan(tiny_qwen2(), some_batches(1), gora.method("gora"), loss_function=loss, tracker=tracker)
    assert seen == [True]
    assert made.estimation_peak_bytes == 123


def test_the_live_storage_tracker_sees_the_gradient_buffers():
    memory = pytest.importorskip("tunemap.measure.memory")
    model = tiny_qwen2()
    ids = torch.tensor([[1, 2]])  # so short that activations hardly count
    batch = {"input_ids": ids, "labels": ids}
    made = gora.plan(model, [batch], gora.method("gora"), tracker=memory.LiveStorage(model))
    model_bytes = 4 * count_parameters(model).total
    buffers_bytes = 4 * sum(rows * columns for rows, columns in made.shapes.values())
    # The weights and the fp32 buffers, but never a second full set of gradients.
    assert model_bytes + buffers_bytes < made.estimation_peak_bytes < model_bytes + 1.5 * buffers_bytes


def test_estimation_samples_of_all_processes_are_those_of_one():
    whole = gora.sample_indices(100, batch_count=6, batch_size=4, seed=3)
    halves = [gora.sample_indices(100, batch_count=3, batch_size=4, seed=3, rank=r, world_size=2) for r in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    flat = [i for batch in whole for i in batch]
    assert len(set(flat)) == 24
    assert max(flat) < 100
    assert whole != gora.sample_indices(100, batch_count=6, batch_size=4, seed=4)
    with pytest.raises(UserError, match=r"wants 24 examples .* has 23"):
        gora.sample_indices(23, batch_count=6, batch_size=4, seed=3)


class _TwoHeads(nn.Module):
    """One layer that the loss uses, one that it does not."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x).square().mean()


def test_a_module_without_gradient_is_named():
    with pytest.raises(UserError, match=r"batch 1 gave unused no gradient"):
        gora.plan(_TwoHeads(), [{"x": torch.ones(2, 4)}], gora.method("gora"), loss_function=lambda m, b: m(**b))


def test_a_module_that_misses_one_batch_is_named():
    def sometimes(model, batch):
        return model(batch["x"]) + (model.unused(batch["x"]).sum() if batch["both"] else 0)

    batches = [{"x": torch.ones(2, 4), "both": both} for both in (True, False)]
    with pytest.raises(UserError, match=r"batch 2 gave unused no gradient"):
        gora.plan(_TwoHeads(), batches, gora.method("gora"), loss_function=sometimes)


def test_a_name_that_ends_another_name_keeps_its_own_rank():
    model = nn.ModuleDict({"fc": nn.Linear(16, 16), "inner": nn.ModuleDict({"fc": nn.Linear(16, 16)})})
    shapes = linear_shapes(model)
    made = gora.GoraPlan(gora.method("rslora"), "unquantised", shapes, {}, {"fc": 3, "inner.fc": 5}, 0, 0.0, None)
    adapted = gora.attach(model, made)
    ranks = {n: m.r["default"] for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert ranks == {"fc": 3, "inner.fc": 5}


def test_classification_trains_the_whole_head_beside_the_adapters():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=48, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=16, num_labels=2
    )
    model = DistilBertForSequenceClassification(config)
    model.projection = nn.Linear(3, 2)  # a head that PEFT does not know by its name
    ids = torch.randint(0, 48, (4, 8))
    batches = [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}]
    made = gora.plan(model, batches, gora.method("gora"))
    assert len(made.ranks) == 12
    counts = count_parameters(gora.attach(model, made, task_type="SEQ_CLS"))
    assert counts.adapter == made.trainable
    assert counts.head == 32 * 32 + 32 + 2 * 32 + 2 + (3 * 2 + 2)
    assert counts.trainable == counts.adapter + counts.head


def test_both_routes_ignore_passes_without_gradient():
    def against_itself(model, batch):
        with torch.no_grad():
            reference = model.used(batch["x"])
        return (model.used(batch["x"]) * reference).mean()

    torch.manual_seed(0)
    model, batches = _TwoHeads(), [{"x": torch.randn(2, 4)}]
    plans = [
        gora.plan(model, batches, gora.method("gora"), targets=["used"], loss_function=against_itself, route=route)
        for route in gora.ROUTES
    ]
    assert torch.allclose(plans[0].gradients["used"], plans[1].gradients["used"], rtol=1e-5)


@pytest.mark.parametrize("route", list(gora.ROUTES))
def test_a_model_without_embeddings_can_be_planned(route):
    made = gora.plan(
        _TwoHeads(),
        [{"x": torch.ones(2, 4)}],
        gora.method("gora"),
        targets=["used"],
        loss_function=lambda m, b: m(**b),
        route=route,
    )
    assert made.ranks == {"used": 4}


def test_tied_targets_are_named():
    model = tiny_qwen2()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one weight"):
        gora.plan(model, some_batches(1), gora.method("gora"))


def test_unsuitable_models_are_refused():
    model, batches = tiny_qwen2(), some_batches(1)
    made = gora.plan(model, batches, gora.method("lora"))
    with pytest.raises(UserError, match="already has adapters"):
        gora.plan(gora.attach(model, made), batches, gora.method("gora"), targets=["base_layer"])
    with pytest.raises(UserError, match="needs at least one batch"):
        gora.plan(tiny_qwen2(), [], gora.method("gora"))


def test_wrong_names_and_settings_have_messages():
    with pytest.raises(UserError, match=r"no method 'gorra'; the GoRA ladder has lora, rslora"):
        gora.method("gorra")
    with pytest.raises(UserError, match=r"unknown setting rank; allowed: allocation"):
        gora.method("gora", rank=3)
    with pytest.raises(UserError, match=r"allocation is 'pa'; allowed: paper, official_scripts"):
        gora.method("gora", allocation="pa")
    with pytest.raises(UserError, match=r"min_rank 9, reference_rank 8"):
        gora.method("gora", min_rank=9)
    with pytest.raises(UserError, match=r"alpha -1"):
        gora.method("gora", alpha=-1)
    with pytest.raises(UserError, match="compress assumes the scaling"):
        gora.method("gora", rank_stabilised=False)
    with pytest.raises(UserError, match=r"is called w_proj; allowed: all-linear, down_proj"):
        gora.plan(tiny_qwen2(), [], gora.method("gora"), targets=["q_proj", "w_proj"])
    with pytest.raises(UserError, match=r"route is 'magic'; allowed: unquantised, dequantised"):
        gora.plan(tiny_qwen2(), [], gora.method("gora"), route="magic")
    assert gora.method("gora-ranks-only") == gora.METHODS["gora_ranks_only"]


def test_applying_needs_the_same_ranks_and_unreleased_gradients():
    model = tiny_qwen2()
    made = gora.plan(model, some_batches(1), gora.method("gora"))
    other = gora.attach(copy.deepcopy(model), gora.plan(model, [], gora.method("lora")))
    with pytest.raises(UserError, match=r"the adapter is not the plan's: model\.layers"):
        gora.apply(other, made)
    with pytest.raises(UserError, match="gradients were released"):
        gora.attach(model, made.released())
