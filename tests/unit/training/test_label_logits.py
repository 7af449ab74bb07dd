"""The loss from the logits of label tokens alone, against the loss from all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from tunemap.cross_entropy import IGNORED
from tunemap.data.collate import Batch
from tunemap.training.failure import UnsupportedRunError
from tunemap.training.label_logits import LabelLogits, chunked_cross_entropy
from tunemap.training.loop import loss_sum

VOCABULARY = 40


def made_model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def made_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 10), generator=generator)
    labels = torch.where(torch.rand(3, 10, generator=generator) < 0.5, ids.roll(-1, 1), IGNORED)
    positions = torch.nonzero(labels.flatten() != IGNORED).flatten()
    return Batch({"input_ids": ids}, labels, positions, 30, len(positions), 30, 3)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), chunk=st.integers(1, 12), seed=st.integers(0, 5))
def test_chunks_give_the_loss_and_gradients_of_the_whole(rows, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    whole = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(whole * 0.3, (hidden, weight))
    chunked = chunked_cross_entropy(hidden, weight, targets, rows_per_chunk=chunk)
    found = torch.autograd.grad(chunked * 0.3, (hidden, weight))
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(found, expected)


def test_a_batch_without_labels_has_no_loss():
    hidden = torch.randn(0, 6, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(11, 6), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 6)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_model_learns_the_same_from_label_tokens_alone(adapted, dtype):
    model, batch = made_model(), made_batch()
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if adapted else model
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        whole = loss_sum(wrapped, batch)
        expected = gradients(wrapped, whole)
        some = LabelLogits(model).loss_sum(wrapped, batch)
    found = gradients(wrapped, some)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is None else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(some, whole, **tolerance)
    torch.testing.assert_close(found, expected, **tolerance)


def test_logits_of_prompts_and_padding_are_never_computed():
    model, batch, seen = made_model(), made_batch(), []
    loss_of = LabelLogits(model).loss_sum
    original = torch.Tensor.logsumexp

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is original:
                seen.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with Watching():
        loss_of(model, batch)
    assert seen == [(batch.label_tokens, VOCABULARY)]


def test_an_output_layer_with_an_adapter_is_refused():
    model = made_model()
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedRunError, match="use logits: all"):
        LabelLogits(model)


def test_an_output_layer_with_a_bias_is_refused():
    model = made_model()
    model.set_output_embeddings(nn.Linear(16, VOCABULARY))
    with pytest.raises(UnsupportedRunError, match="one plain matrix"):
        LabelLogits(model)
