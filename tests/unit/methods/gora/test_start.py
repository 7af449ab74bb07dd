"""GoRA's A and B against golden values of the released code and against the equation of the first step."""

import math

import numpy as np
import pytest
import torch
from gora_examples import SCRIPTS
from hypothesis import given, settings
from hypothesis import strategies as st

from tunemap.methods import gora


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
