"""Clipping within the optimizer's step, against torch's clipping before it."""

import copy
import math

import pytest
import torch
from torch import nn

from tunemap.training.optimizer import build_optimizer, clip_gradients, load_state

LIMITS = [None, 0.01, 1e6]


def trained(name, clip, steps=3, scaler=None, dtype=torch.float32):
    """Weights after some steps, and the norms that `clip` returned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    optimizer = build_optimizer(model, name=name, learning_rate=0.01, weight_decay=0.1)
    inputs, norms = torch.randn(5, 8).to(dtype), []
    for _ in range(steps):
        loss = 10 * model(inputs).square().sum()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        norms.append(float(clip(list(model.parameters()), optimizer)))
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict()), norms


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "gradient scaler"])
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_steps_are_those_of_clipped_gradients(name, limit, scaled):
    def of_torch(parameters, _):
        return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None

    expected, norms = trained(name, of_torch, scaler=scaler())
    found, ours = trained(name, lambda p, o: clip_gradients(p, o, limit), scaler=scaler())
    assert ours == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 1  # the small limit clips
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_weights_in_bfloat16_are_clipped_too(limit):
    def of_torch(parameters, _):
        return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    expected, _ = trained("adamw", of_torch, dtype=torch.bfloat16)
    found, _ = trained("adamw", lambda p, o: clip_gradients(p, o, limit), dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.002)


def test_no_pass_over_the_gradients_is_made_for_adamw():
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, name="adamw", learning_rate=0.01, weight_decay=0.0)
    model(torch.ones(1, 4)).sum().backward()
    before = model.weight.grad.clone()
    norm = clip_gradients(list(model.parameters()), optimizer, 0.1)
    assert torch.equal(model.weight.grad, before)
    assert float(optimizer.grad_scale) == pytest.approx(float(norm) / 0.1, rel=1e-4)


def stepped(name, weights):
    """A model of these weights and its optimizer after a step."""
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data.copy_(weights)
    optimizer = build_optimizer(layer, name=name, learning_rate=1e-2, weight_decay=0.0)
    layer(torch.ones(1, 128)).square().sum().backward()
    optimizer.step()
    return layer, optimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_restored_moments_of_a_paged_optimizer_lie_in_its_pages(name, monkeypatch, tmp_path):
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer, optimizer = stepped(name, weights)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = build_optimizer(layer, name=name, learning_rate=1e-2, weight_decay=0.0)
    pages = []

    def page(parameter, dtype=torch.float32):
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(again, "get_state_buffer", page)
    load_state(again, torch.load(tmp_path / "state.pt", weights_only=True))
    restored, saved = again.state[layer.weight], optimizer.state[layer.weight]
    assert [restored["state1"] is pages[0], restored["state2"] is pages[1], len(pages)] == [True, True, 2]
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], saved[key]) for key in saved if isinstance(saved[key], torch.Tensor))
