"""GoRA's plan: the mean gradient of every target layer, measured without a trace, and the ranks that follow."""

import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from four_bit import quantised
from gora_examples import plain_gradients, some_batches, state_of, tiny_qwen2
from torch import nn

from tunemap.errors import UserError
from tunemap.methods import gora
from tunemap.methods.gora import gradients
from tunemap.methods.parameters import count_parameters
from tunemap.methods.undisturbed import model_loss


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
        return model_loss(model, batch)

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
    original = gradients._take_weight_gradient

    def watched(name, add):
        inner = original(name, add)

        def hook(weight):
            alive.append(sum(p.grad is not None for p in model.parameters()))
            inner(weight)

        return hook

    monkeypatch.setattr(gradients, "_take_weight_gradient", watched)
    gora.plan(model, some_batches(2), gora.method("gora"))
    assert alive == [1] * (2 * 14)


def test_ranks_ignore_batch_order_and_loss_scale_while_b_follows_the_scale():
    model, batches = tiny_qwen2(), some_batches(4)
    made = gora.plan(model, batches, gora.method("gora"))
    turned = gora.plan(model, batches[::-1], gora.method("gora"))
    scaled = gora.plan(model, batches, gora.method("gora"), loss_function=lambda m, b: 1e3 * model_loss(m, b))
    assert made.ranks == turned.ranks == scaled.ranks
    assert len(set(made.ranks.values())) > 1
    for name, gradient in made.gradients.items():
        assert torch.allclose(scaled.gradients[name], 1e3 * gradient, rtol=1e-4, atol=1e-4)


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
        return model_loss(model, batch)

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
