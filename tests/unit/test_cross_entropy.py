"""The loss that keeps one tensor of the logits' size, against torch's."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tunemap.cross_entropy import IGNORED, cross_entropy_sum
from tunemap.measure.memory import track_live_storage


def both(logits, labels, factor=1.0):
    """Loss and gradient of the logits, ours and torch's."""
    found = []
    for loss_of in (
        lambda given: cross_entropy_sum(given, labels, IGNORED),
        lambda given: cross_entropy(given.float(), labels, ignore_index=IGNORED, reduction="sum"),
    ):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf)
        (loss * factor).backward()
        found.append((loss.detach(), leaf.grad))
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    rows_per_chunk=st.integers(1, 10),
    classes=st.integers(1, 11),
    spread=st.sampled_from([0.0, 1.0, 300.0]),  # of the logits; the largest makes losses that no probability can hold
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_loss_and_gradient_are_those_of_torch(rows, rows_per_chunk, classes, spread, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    with mock.patch("tunemap.cross_entropy.CHUNK_BYTES", 4 * classes * rows_per_chunk):
        (loss, gradient), (expected, expected_gradient) = both(logits, labels, factor=0.25)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_what_no_label_asks_for_has_no_gradient():
    labels = torch.tensor([IGNORED, 1])
    (_, gradient), _ = both(torch.randn(2, 3), labels)
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[1, 1] < 0


def peak_bytes_per_logit(loss_of, dtype, rows=64, classes=1000):
    """Of all tensors, from the logits to their gradient."""
    hidden, weight = torch.randn(rows, 8).to(dtype), torch.randn(classes, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, classes, (rows,))
    with track_live_storage(torch.nn.Linear(1, 1), torch.optim.SGD([weight])) as tracker, tracker.phase("forward"):
        loss_of(hidden @ weight.T, labels).backward()
    return tracker.peak_allocated_bytes // (rows * classes)


@pytest.mark.parametrize(("dtype", "ours", "torchs"), [(torch.float32, 8, 12), (torch.bfloat16, 6, 12)], ids=str)
def test_logits_and_one_tensor_of_their_size_are_enough(monkeypatch, dtype, ours, torchs):
    monkeypatch.setattr("tunemap.cross_entropy.CHUNK_BYTES", 16_000)  # 4 rows
    assert peak_bytes_per_logit(lambda logits, labels: cross_entropy_sum(logits, labels, IGNORED), dtype) == ours
    plain = peak_bytes_per_logit(lambda logits, labels: cross_entropy(logits.float(), labels, reduction="sum"), dtype)
    assert plain == torchs


def test_a_second_backward_pass_is_refused():
    loss = cross_entropy_sum(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
