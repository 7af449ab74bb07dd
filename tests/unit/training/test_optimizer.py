"""Clipping within the optimizer's step, against torch's clipping before it."""

import copy
import math

import pytest
import torch
from torch import nn

from tunemap.training.optimizer import build_optimizer, clip_gradients

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
