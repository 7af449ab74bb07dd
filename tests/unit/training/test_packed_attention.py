"""Attention by document against attention under a mask, in the architectures of transformers: the same, for less."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunemap.config import Factors
from tunemap.training.failure import UnsupportedRunError
from tunemap.training.packed_attention import _attend, attend_by_document, by_document, document_lengths

LENGTHS = [[5, 9, 2], [7, 9]]
POSITIONS = torch.tensor([[at for length in row for at in range(length)] for row in LENGTHS])
IDS = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OTHERS = {
    "gpt2": {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "biogpt": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0},
    "mistral": {"sliding_window": 6},  # narrower than some documents
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"bos_token_id": 1, "eos_token_id": 2},
}
ARCHITECTURES = (
    "qwen2", "llama", "qwen3", "gemma3_text", "olmo2", "granite", "gpt_neox", "phi3", "mistral", "mixtral", "gpt2",
    "opt", "biogpt", "starcoder2",
)  # fmt: skip
HEEDLESS = {"opt", "biogpt"}  # their masks do not heed positions: under one, documents look at those before them


def made_model(architecture: str, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | OTHERS.get(architecture, {}) | settings)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def step(model):
    logits = model(input_ids=IDS, position_ids=POSITIONS).logits
    logits.square().mean().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def alone(model):
    """The logits of each document in a row of its own."""
    ids = IDS.flatten().split([length for row in LENGTHS for length in row])
    return torch.cat([model(input_ids=document[None]).logits[0] for document in ids]).view(*IDS.shape, -1)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Shapes of the queries that torch's kernel is called with, one document each."""
    from tunemap.training import packed_attention

    shapes, original = [], packed_attention.scaled_dot_product_attention

    def noting(query, *arguments, **settings):
        shapes.append(tuple(query.shape))
        return original(query, *arguments, **settings)

    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", noting)
    return shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_each_document_alone(architecture, kernel_calls):
    model = made_model(architecture)
    expected = alone(model)
    attend_by_document(model)
    torch.testing.assert_close(step(model)[0], expected, rtol=1e-4, atol=1e-5)
    assert kernel_calls


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - HEEDLESS))
def test_gradients_are_those_under_a_mask(architecture):
    masked = made_model(architecture)
    other = copy.deepcopy(masked)
    attend_by_document(other)
    torch.testing.assert_close(step(masked)[1], step(other)[1], rtol=1e-3, atol=1e-6)


def test_each_document_is_one_call_of_the_kernel(kernel_calls):
    model = made_model("qwen2")
    attend_by_document(model)
    step(model)
    assert kernel_calls == [(1, 4, length, 8) for row in LENGTHS for length in row] * 2


def test_a_model_of_chunks_keeps_its_mask():
    model = made_model("llama4_text", attention_chunk_size=4)
    attend_by_document(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"softcap": 30.0}, "softcap"), ({"position_ids": None}, "no positions"), ({"is_causal": False}, "not causal")],
)
def test_a_layer_that_asks_for_more_is_refused(settings, why):
    heads = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedRunError, match=f"Identity cannot attend by document .{why}.*use attention: eager"):
        _attend(torch.nn.Identity(), heads, heads, heads, None, **{"position_ids": torch.arange(4)[None]} | settings)


@pytest.mark.parametrize(
    ("factors", "device_type", "expected"),
    [
        ({"batching": "packed"}, "cpu", True),
        ({"batching": "packed"}, "cuda", False),
        ({"batching": "packed", "attention": "flash_attention_2", "precision": "bf16"}, "cuda", True),
        ({"batching": "packed", "attention": "eager"}, "cpu", False),
        ({"batching": "longest"}, "cpu", False),
    ],
)
def test_which_runs_attend_by_document(factors, device_type, expected):
    assert by_document(Factors(**factors), device_type) is expected


def test_lengths_are_counted_over_all_rows():
    assert document_lengths(POSITIONS) == [5, 9, 2, 7, 9]
    assert document_lengths(torch.arange(4)[None]) == [4]


def test_a_compiled_block_compiles_once_for_all_documents():
    model = made_model("qwen2")
    attend_by_document(model)
    expected = step(model)[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(step(model)[0], expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs
    others = torch.tensor([[*range(10), *range(6)], [*range(3), *range(13)]])
    model(input_ids=IDS, position_ids=others)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
