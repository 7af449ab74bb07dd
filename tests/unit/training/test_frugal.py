"""GaLore, LOMO and AdaLomo: the arithmetic of known optimizers, less memory, and states that survive a checkpoint."""

import io

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Adafactor

from tunemap.config import Factors
from tunemap.measure.memory import track_live_storage
from tunemap.methods.parameters import linear_shapes
from tunemap.models.loading import load_model
from tunemap.training import effects
from tunemap.training.frugal import BackwardOptimizer
from tunemap.training.optimizer import optimizer_of

torch.set_num_threads(1)
IDS = torch.arange(2 * 12).reshape(2, 12)
RATES = {"adamw": 0.01, "galore_adamw": 0.02, "lomo": 0.3, "adalomo": 0.1}


@pytest.fixture
def start(prepared):
    """The tiny model and an optimizer over it."""

    def start(name, **factors):
        model = load_model(
            prepared.model, task_kind="generation", num_labels=None, dtype=torch.float32, quantization=None,
            attention="sdpa", seed=0, device="cpu",
        ).train()  # fmt: skip
        chosen = {"optimizer": name, "learning_rate": RATES[name], "galore_rank": 4, "galore_update_steps": 3}
        return model, optimizer_of(model, Factors(**(chosen | factors)))

    return start


def loss_of(model):
    return cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())


def step(model, optimizer):
    loss = loss_of(model)
    if isinstance(optimizer, BackwardOptimizer):
        optimizer.backward(loss)
    else:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def assert_same_weights(one, other):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name])


@pytest.mark.parametrize("name", RATES)
def test_loss_falls_and_the_gate_finds_the_states_that_the_name_promises(start, name):
    model, optimizer = start(name)
    losses = [step(model, optimizer) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    assert effects.optimizer_gate(optimizer, name).passed


def test_a_projection_of_another_rank_trips_the_gate(start):
    model, optimizer = start("galore_adamw")
    step(model, optimizer)
    assert "float32 of rank 4" in effects.optimizer_gate(optimizer, "galore_adamw").message
    optimizer.param_groups[1]["rank"] = 8
    assert not effects.optimizer_gate(optimizer, "galore_adamw").passed


def test_full_moments_under_a_frugal_name_trip_the_gate(start):
    model, optimizer = start("adamw")
    step(model, optimizer)
    for name in ("lomo", "adalomo", "adafactor"):
        assert not effects.optimizer_gate(optimizer, name).passed


def test_lomo_is_gradient_descent(start):
    model, lomo = start("lomo", weight_decay=0.01)
    plain, _ = start("adamw")
    descent = torch.optim.SGD(plain.parameters(), lr=RATES["lomo"], weight_decay=0.01)
    for _ in range(3):
        loss_of(plain).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
        descent.step()
        descent.zero_grad()
        step(model, lomo)
        torch.testing.assert_close(lomo.gradient_norm(), norm)
    assert_same_weights(model, plain)


def test_adalomo_is_adafactor_with_weights_changed_at_once(start):
    model, adalomo = start("adalomo")
    plain, _ = start("adamw")
    options = {"scale_parameter": True, "relative_step": False, "warmup_init": False}
    factored = Adafactor(plain.parameters(), lr=RATES["adalomo"], **options)
    for _ in range(3):
        loss_of(plain).backward()
        factored.step()
        factored.zero_grad()
        step(model, adalomo)
    assert_same_weights(model, plain)


def test_galore_steps_projected_weights_by_matrices_of_its_rank_and_the_others_as_adamw(start):
    model, galore = start("galore_adamw")
    plain, adamw = start("adamw", learning_rate=RATES["galore_adamw"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for one, optimizer in ((model, galore), (plain, adamw)):
        (1e6 * loss_of(one)).backward()  # far from epsilon, which the two add at different places
        optimizer.step()
    projected = {f"{name}.weight" for name in linear_shapes(model)}
    for name, parameter in model.named_parameters():
        if name in projected:
            assert torch.linalg.matrix_rank(parameter - before[name], rtol=1e-3) <= 4
        else:
            torch.testing.assert_close(parameter, plain.get_parameter(name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["galore_adamw", "lomo", "adalomo"])
def test_state_goes_through_a_checkpoint_bit_for_bit(start, name):
    model, optimizer = start(name)
    for _ in range(4):  # between two projections of GaLore
        step(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other, resumed = start(name)
    other.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(4):
        assert step(other, resumed) == step(model, optimizer)


def test_memory_is_lower_than_adamws_where_each_of_them_saves(start):
    kept, peaks = {}, {}
    for name in RATES:
        model, optimizer = start(name)
        step(model, optimizer)
        with track_live_storage(model, optimizer) as tracker:
            with tracker.phase("forward"):
                loss = loss_of(model)
            with tracker.phase("backward"):
                optimizer.backward(loss) if isinstance(optimizer, BackwardOptimizer) else loss.backward()
            with tracker.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
        weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
        peaks[name], kept[name] = tracker.peak_allocated_bytes, tracker.end_allocated_bytes - weights_bytes
    # What stays between steps, a few buffers included: the embedding, half of the weights, GaLore leaves to AdamW.
    assert kept["adamw"] > 2 * weights_bytes > kept["galore_adamw"] + 0.5 * weights_bytes
    assert 0.1 * weights_bytes > kept["adalomo"] > kept["lomo"]
    assert peaks["lomo"] <= peaks["adalomo"] < peaks["adamw"] - 2 * weights_bytes
