"""The batches that data-driven starts look at: their loss is training's, their rows do not depend on the world."""

import numpy as np
import pytest
import torch

from tunemap import corpora
from tunemap.config import DatasetConfig
from tunemap.data import sources
from tunemap.data.collate import collate
from tunemap.data.tokens import load_tokens, tokenize
from tunemap.errors import UserError
from tunemap.methods.estimation import estimation_batches, widest
from tunemap.methods.undisturbed import model_loss
from tunemap.training.loop import loss_sum


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "model")
    dataset = DatasetConfig(task="arithmetic", source="made", train_rows=40, test_rows=4)
    sources.prepare(dataset, folder / "dataset", data_root=None)
    options = {"max_length": 96, "prompt_template": None, "system_prompt": None}
    tokenize(folder / "dataset", folder / "model", folder / "tokens", **options)
    return load_tokens(folder / "tokens")


def batches_of(tokens, **changes):
    options = {"batch_count": 5, "batch_size": 4, "seed": 3, "device": torch.device("cpu")}
    return list(estimation_batches(tokens, **(options | changes)))


def rows_of(batches):
    return [batch["input_ids"].tolist() for batch in batches]


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=512, num_attention_heads=4, num_key_value_heads=2, **sizes))


def test_loss_of_an_estimation_batch_is_the_loss_that_is_trained(tokens, model):
    assert len(set(tokens.train.lengths.tolist())) > 1  # rows are padded, and padding must not count
    (everything,) = batches_of(tokens, batch_count=1, batch_size=40)
    trained_on = collate(tokens.train, [np.array([row]) for row in range(40)], pad_token_id=tokens.pad_token_id)
    expected = float(loss_sum(model, trained_on)) / trained_on.label_tokens
    assert float(model_loss(model, everything)) == pytest.approx(expected, rel=1e-6)


def test_processes_share_the_batches_of_one(tokens):
    alone = rows_of(batches_of(tokens))
    shared = [rows_of(batches_of(tokens, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(share) for share in shared] == [3, 2]
    assert alone[0::2] == shared[0]
    assert alone[1::2] == shared[1]


def test_seed_decides_the_rows(tokens):
    assert rows_of(batches_of(tokens)) == rows_of(batches_of(tokens))
    assert rows_of(batches_of(tokens)) != rows_of(batches_of(tokens, seed=4))


def test_no_row_is_drawn_twice(tokens):
    every = batches_of(tokens, batch_count=5, batch_size=8)  # as many as there are
    drawn = [
        tuple(ids[mask.bool()].tolist())
        for one in every
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True)
    ]
    rows = [tuple(tokens.train.sequence(index).tolist()) for index in range(len(tokens.train))]
    assert sorted(drawn) == sorted(rows)


def test_widest_batch_has_most_columns(tokens):
    batches = batches_of(tokens)
    assert widest(batches)["input_ids"].shape[1] == max(batch["input_ids"].shape[1] for batch in batches)


def test_too_few_rows_are_an_error_that_counts_them(tokens):
    with pytest.raises(UserError, match=r"estimation wants 80 examples .* the data set has 40"):
        batches_of(tokens, batch_size=16)


def test_process_without_a_batch_is_an_error(tokens):
    with pytest.raises(UserError, match="estimation_batches is 2: too few for 4 devices"):
        batches_of(tokens, batch_count=2, world_size=4)
