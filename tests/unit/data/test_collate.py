"""Tensors of a micro-batch: labels where they belong, and packed documents that do not see each other."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tunemap.cross_entropy import IGNORED
from tunemap.data.batches import batch_schedule
from tunemap.data.collate import Batch, collate, collate_packed
from tunemap.data.tokens import Examples

PAD = 0


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_examples(prompts: list[list[int]], answers: list[list[int]], labels: list[int] | None = None) -> Examples:
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return Examples(
        input_ids=np.concatenate([np.array(s, np.int32) for s in sequences]),
        offsets=np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64),
        prompt_tokens=np.array([len(p) for p in prompts]),
        answer_tokens=np.array([len(a) for a in answers]),
        class_labels=np.array(labels or [-1] * len(prompts)),
    )


def random_examples(count: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(3, 60, rng.integers(1, 9)).tolist()  # noqa: E731
    return make_examples([draw() for _ in range(count)], [draw() for _ in range(count)])


def rows(*groups: list[int]) -> list[Any]:
    return [np.array(group) for group in groups]


def tiny_qwen2(attention: str = "sdpa") -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation=attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().train()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double().train()


def loss_of(model: Any, batch: Batch, use_cache: bool = False) -> torch.Tensor:
    logits = model(**batch.inputs, use_cache=use_cache).logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / batch.label_tokens


def test_labels_are_the_next_token_of_the_answer() -> None:
    examples = make_examples([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]])
    batch = collate(examples, rows([0], [1]), pad_token_id=PAD)
    assert batch.inputs.keys() == {"input_ids"}
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 9, 10], [8, 11, 12, 13, PAD]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 9, 10, IGNORED], [11, 12, 13, IGNORED, IGNORED]]
    assert (batch.real_tokens, batch.label_tokens, batch.padded_tokens, batch.samples) == (9, 5, 10, 2)


def test_packed_labels_end_with_each_document() -> None:
    examples = make_examples([[5, 6], [8]], [[9], [11, 12]])
    batch = collate_packed(examples, rows([0, 1]), pad_token_id=PAD)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 9, 8, 11, 12]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.labels.tolist() == [[IGNORED, 9, IGNORED, 11, 12, IGNORED]]
    assert "attention_mask" not in batch.inputs


def test_padding_of_a_packed_row_is_a_document_of_its_own() -> None:
    examples = make_examples([[5, 6], [8], [3]], [[9], [11, 12], [4]])
    batch = collate_packed(examples, rows([0, 1], [2]), pad_token_id=PAD)
    assert batch.inputs["position_ids"].tolist()[1] == [0, 1, 0, 1, 2, 3]
    assert batch.labels.tolist()[1] == [4] + [IGNORED] * 5
    assert (batch.real_tokens, batch.padded_tokens, batch.samples) == (8, 12, 3)


def test_a_mask_on_request_where_something_is_padded() -> None:
    examples = make_examples([[5, 6, 7], [8], [8, 3]], [[9, 10], [11, 12, 13], [11]])
    padded = collate(examples, rows([0], [1]), pad_token_id=PAD, mask_padding=True)
    assert padded.inputs["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    full = collate(examples, rows([0]), pad_token_id=PAD, mask_padding=True)
    assert "attention_mask" not in full.inputs


CAUSAL = {
    "qwen2": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "gemma2": {"num_key_value_heads": 1, "sliding_window": 4, "head_dim": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {},
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_learns_from_padded_rows_what_it_learns_from_each_alone(kind: str) -> None:
    """Without a mask. With one, rows that end more than a sliding window before the longest have no finite loss."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **shape, num_attention_heads=2, pad_token_id=PAD, **CAUSAL[kind])
    network, examples = AutoModelForCausalLM.from_config(config).double().train(), random_examples(5)
    padded = collate(examples, rows(*([i] for i in range(5))), pad_token_id=PAD)
    assert padded.padded_tokens > padded.real_tokens
    found = []
    for batches in ([padded], [collate(examples, rows([i]), pad_token_id=PAD) for i in range(5)]):
        network.zero_grad()
        losses = [loss_of(network, batch) * batch.label_tokens for batch in batches]
        torch.stack(losses).sum().backward()
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        found.append([torch.stack(losses).sum().detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # some compute norms in float32


def test_fixed_width_is_filled_up() -> None:
    batch = collate(random_examples(3), rows([0], [1], [2]), pad_token_id=PAD, width=40)
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (3, 40)
    assert batch.padded_tokens == 120
    assert batch.real_tokens == random_examples(3).lengths.sum()


@pytest.mark.parametrize("model", [tiny_qwen2, tiny_llama])
@pytest.mark.parametrize("one_row", [False, True])
def test_packed_loss_and_gradients_equal_the_padded_ones(model: Any, one_row: bool) -> None:
    examples, network = random_examples(7), model()
    padded = collate(examples, rows(*([i] for i in range(7))), pad_token_id=PAD)
    packed = collate_packed(examples, rows([0, 1, 2], [3, 4], [5, 6]), pad_token_id=PAD, one_row=one_row)
    assert padded.label_tokens == packed.label_tokens == examples.label_tokens.sum()
    assert padded.real_tokens == packed.real_tokens
    if one_row:
        assert packed.padded_tokens == packed.real_tokens
    gradients = []
    for batch in (padded, packed):
        network.zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        gradients.append([loss.detach()] + [parameter.grad.clone() for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_does_not_see_its_neighbour(attention: str) -> None:
    network = tiny_qwen2(attention)
    first, changed = [5, 6, 7], [40, 41, 42]
    logits = []
    for neighbour in (first, changed):
        examples = make_examples([neighbour, [8, 9]], [[10], [11, 12]])
        batch = collate_packed(examples, rows([0, 1]), pad_token_id=PAD)
        logits.append(network(**batch.inputs, use_cache=False).logits[0, 4:])
    assert torch.equal(*logits)


def test_a_cache_would_contaminate_packed_documents() -> None:
    """Why the loop must pass use_cache=False; if this fails, transformers has mended it and the rule can go."""
    examples, network = random_examples(4), tiny_qwen2()
    batch = collate_packed(examples, rows([0, 1, 2, 3]), pad_token_id=PAD)
    assert not torch.isclose(loss_of(network, batch), loss_of(network, batch, use_cache=True), rtol=1e-9)


@pytest.mark.parametrize("batching", ["longest", "length_grouped", "fixed_length", "packed"])
def test_a_schedule_knows_the_counts_of_its_batches(batching: Any) -> None:
    examples = random_examples(60)
    schedule = batch_schedule(
        examples.lengths, per_device_batch_size=2, gradient_accumulation=2, world_size=2, batching=batching,
        max_length=20, seed=0, epochs=1, max_steps=None,
    )  # fmt: skip
    for step in range(schedule.steps):
        batches = []
        for micro_batch, rank in np.ndindex(2, 2):
            chosen = schedule.micro_batch(step, micro_batch, rank)
            if batching == "packed":
                batches.append(collate_packed(examples, chosen, pad_token_id=PAD))
            else:
                width = 20 if batching == "fixed_length" else None
                batches.append(collate(examples, chosen, pad_token_id=PAD, width=width))
            assert batches[-1].inputs["input_ids"].shape[1] == schedule.widths[step, micro_batch, rank]
        assert sum(batch.real_tokens for batch in batches) == schedule.real_tokens[step]
        assert sum(batch.padded_tokens for batch in batches) == schedule.padded_tokens[step]
        assert sum(batch.samples for batch in batches) == schedule.samples[step]
        assert sum(batch.label_tokens for batch in batches) == schedule.per_step(examples.label_tokens)[step]


def test_cut_examples_without_a_label_have_none() -> None:
    whole = make_examples([[5, 6, 7, 8]], [[9, 10]])
    for length, expected in ((4, 0), (3, 0), (5, 1), (6, 2)):
        cut = Examples(
            whole.input_ids[:length],
            np.array([0, length]),
            whole.prompt_tokens,
            whole.answer_tokens,
            whole.class_labels,
        )
        batch = collate(cut, rows([0]), pad_token_id=PAD)
        assert batch.label_tokens == cut.label_tokens[0] == expected


def test_an_empty_prompt_costs_one_label() -> None:
    examples = make_examples([[]], [[9, 10, 11]])
    batch = collate(examples, rows([0]), pad_token_id=PAD)
    assert batch.labels.tolist() == [[10, 11, IGNORED]]
    assert batch.label_tokens == examples.label_tokens[0] == 2


def test_classification_has_one_label_a_row() -> None:
    examples = make_examples([[5, 6, 7], [8]], [[], []], labels=[1, 0])
    batch = collate(examples, rows([0], [1]), pad_token_id=PAD)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [1, 0]
    assert (batch.label_tokens, batch.real_tokens, batch.padded_tokens) == (2, 4, 6)
    with pytest.raises(ValueError, match="cannot be packed"):
        collate_packed(examples, rows([0, 1]), pad_token_id=PAD)


def test_packed_rows_are_refused_where_rows_are_single() -> None:
    with pytest.raises(ValueError, match="collate_packed"):
        collate(random_examples(2), rows([0, 1]), pad_token_id=PAD)


def test_moving_a_batch_keeps_its_counts() -> None:
    batch = collate(random_examples(2), rows([0], [1]), pad_token_id=PAD)
    moved = batch.to("meta")
    assert moved.labels.device.type == moved.inputs["input_ids"].device.type == "meta"
    assert moved.label_tokens == batch.label_tokens
