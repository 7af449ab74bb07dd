"""GoRA's adapters: plain LoRA layers that start where the plan says."""

import copy
import math

import pytest
import torch
from four_bit import quantised
from gora_examples import LADDER, mean_loss, some_batches, state_of, tiny_qwen2
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from tunemap.errors import UserError
from tunemap.methods import gora
from tunemap.methods.parameters import count_parameters, linear_shapes
from tunemap.methods.undisturbed import model_loss


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


@pytest.mark.parametrize("route", list(gora.ROUTES))
def test_both_four_bit_routes_start_below_the_four_bit_base_loss(route):
    model, batches = tiny_qwen2(), some_batches(3)
    packed = quantised(model)
    base = mean_loss(packed, batches)
    made = gora.plan(model if route == "unquantised" else packed, batches, gora.method("gora"), route=route)
    adapted = gora.attach(packed, made, task_type="CAUSAL_LM")
    assert count_parameters(adapted).trainable == made.trainable
    assert mean_loss(adapted, batches) < base
    model_loss(adapted.train(), batches[0]).backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(gradients) == 14
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_weight_svd_over_four_bit_weights_is_refused():
    model = tiny_qwen2()
    made = gora.plan(model, some_batches(1), gora.method("gora_hpml", reference_rank=4))
    with pytest.raises(UserError, match=r"weight_svd changes the base weights.*is quantised"):
        gora.attach(quantised(model), made)


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


def test_applying_needs_the_same_ranks_and_unreleased_gradients():
    model = tiny_qwen2()
    made = gora.plan(model, some_batches(1), gora.method("gora"))
    other = gora.attach(copy.deepcopy(model), gora.plan(model, [], gora.method("lora")))
    with pytest.raises(UserError, match=r"the adapter is not the plan's: model\.layers"):
        gora.apply(other, made)
    with pytest.raises(UserError, match="gradients were released"):
        gora.attach(model, made.released())
