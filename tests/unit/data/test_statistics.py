"""Statistics of tokenised GSM8K against figures that were computed apart from this code, and of small cases by hand.

`four_shot.txt` has the structure of a published study's training prompt (system message, four worked problems, the
last of them about a restaurant) in our own words, with as many tokens as theirs: 397 more than the question.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunemap.data.batches import batch_schedule
from tunemap.data.rows import read_rows
from tunemap.data.statistics import dataset_statistics, label_statistics, length_summary, padding_statistics
from tunemap.data.tokens import Examples, encode_answers, encode_prompts

ZERO_SHOT = (
    "<|im_start|>system\nYou are a helpful math reasoning assistant. Solve the problem carefully and end with a final "
    "answer.<|im_end|>\n<|im_start|>user\nSolve the following math word problem. Show your reasoning before giving the "
    "final answer.\n\nQuestion: {prompt}<|im_end|>\n<|im_start|>assistant\n"
)
UNCUT = 4096


def cut(examples: Examples, max_length: int) -> Examples:
    """What `encode_answers` gives for a smaller maximum, without tokenising again."""
    sequences = [examples.sequence(i)[:max_length] for i in range(len(examples))]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64)
    return replace(examples, input_ids=np.concatenate(sequences), offsets=offsets)


def subset(examples: Examples, indices: list[int]) -> Examples:
    sequences = [examples.sequence(i) for i in indices]
    return Examples(
        np.concatenate(sequences),
        np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])]).astype(np.int64),
        examples.prompt_tokens[indices],
        examples.answer_tokens[indices],
        examples.class_labels[indices],
    )


@pytest.fixture(scope="module")
def chat(qwen_tokenizer: Any, gsm8k_rows: list[dict[str, Any]]) -> Examples:
    return encode_answers(gsm8k_rows, qwen_tokenizer, UNCUT)


@pytest.fixture(scope="module")
def zero_shot(qwen_tokenizer: Any, gsm8k_rows: list[dict[str, Any]]) -> Examples:
    return encode_answers(gsm8k_rows, qwen_tokenizer, UNCUT, prompt_template=ZERO_SHOT)


@pytest.fixture(scope="module")
def four_shot(qwen_tokenizer: Any, gsm8k_rows: list[dict[str, Any]]) -> Examples:
    template = (Path(__file__).parent / "four_shot.txt").read_text()
    return encode_answers(gsm8k_rows, qwen_tokenizer, UNCUT, prompt_template=template)


@pytest.fixture(scope="module")
def published_split() -> list[int]:
    """The 7,099 rows that the study trained on: 5 % held out by the datasets library with seed 42."""
    import datasets

    rows = datasets.Dataset.from_dict({"index": list(range(7473))})
    return list(rows.train_test_split(test_size=0.05, seed=42, shuffle=True)["train"]["index"])


def summary(lengths: Any) -> list[float]:
    found = length_summary(np.asarray(lengths))
    assert found is not None
    return [round(found[name], 1) for name in ("min", "p25", "median", "mean", "p75", "p95", "p99", "max")]


def test_lengths_of_gsm8k(chat: Examples, zero_shot: Examples, four_shot: Examples) -> None:
    assert summary(chat.answer_tokens - 1) == [29, 83, 111, 121.8, 150, 229, 287.3, 453]
    # The table of reference counts the line break behind the answer's <|im_end|>, which nothing has to learn.
    assert summary(chat.lengths + 1) == [95, 162, 199, 212.4, 250, 343, 421, 567]
    assert summary(zero_shot.lengths) == [116, 183, 220, 233.2, 270, 364, 441.3, 587]
    assert summary(four_shot.prompt_tokens) == [409, 441, 452, 456.4, 467, 497, 525, 608]
    assert summary(four_shot.lengths) == [462, 529, 566, 579.2, 616, 710, 787.3, 933]


def test_lengths_of_bare_questions(chat: Examples) -> None:
    around = 29  # tokens of the system message and of the turns' marks
    assert summary(chat.prompt_tokens - around) == [12, 44, 56, 59.6, 70, 101, 128, 212]


def test_lengths_of_the_test_split(shared_data: Path, qwen_tokenizer: Any) -> None:
    records = read_rows(shared_data / "gsm8k" / "test.jsonl")
    rows = [{"prompt": record["question"], "answer": record["answer"]} for record in records]
    test = encode_prompts(rows, qwen_tokenizer, prompt_template="{prompt}")
    assert summary(test.lengths) == [23, 44, 57, 61.3, 73, 105, 127.6, 188]
    assert summary(test.answer_tokens - 1) == [27, 84, 115, 124.2, 153, 221, 281.6, 413]
    assert dataset_statistics(test, test, max_length=1024)["longest_reference_tokens"] == 414


def test_the_published_four_shot_runs_lost_their_labels(four_shot: Examples, published_split: list[int]) -> None:
    trained = subset(four_shot, published_split)
    assert len(trained) == 7099
    at_256, at_512 = (label_statistics(cut(trained, length), length) for length in (256, 512))
    assert at_256["examples_without_label_tokens"] == 7099
    assert at_256["truncated_prompt_share"] == at_256["truncated_answer_share"] == 1
    assert at_256["label_tokens_kept_share"] == 0
    assert at_512["examples_without_label_tokens"] == 153
    assert round(100 * at_512["examples_without_label_tokens_share"], 1) == 2.2
    assert round(100 * at_512["truncated_answer_share"], 1) == 85.1
    assert round(100 * at_512["truncated_prompt_share"], 1) == 2.0
    assert round(100 * (1 - at_512["label_tokens_kept_share"]), 1) == 56.3


@pytest.mark.parametrize(("max_length", "truncated", "lost"), [(640, 16.8, 7.5), (768, 1.4, 0.5), (1024, 0, 0)])
def test_four_shot_needs_longer_sequences(four_shot: Examples, max_length: int, truncated: float, lost: float) -> None:
    found = label_statistics(cut(four_shot, max_length), max_length)
    assert round(100 * found["truncated_answer_share"], 1) == truncated
    assert round(100 * (1 - found["label_tokens_kept_share"]), 1) == lost
    assert found["truncated_prompt_share"] == 0


def test_share_of_tokens_that_carry_a_label(zero_shot: Examples, four_shot: Examples) -> None:
    shares = [label_statistics(e, UNCUT)["label_tokens_of_real_tokens_share"] for e in (zero_shot, four_shot)]
    assert [round(100 * share, 1) for share in shares] == [52.7, 21.2]


def test_the_published_zero_shot_runs_lost_some_labels(zero_shot: Examples, published_split: list[int]) -> None:
    trained = subset(zero_shot, published_split)
    at_256, at_512 = (label_statistics(cut(trained, length), length) for length in (256, 512))
    assert at_256["examples_without_label_tokens"] == 1
    assert round(100 * at_256["truncated_answer_share"], 1) == 31.3
    assert round(100 * (1 - at_256["label_tokens_kept_share"]), 1) == 14.9
    assert round(100 * at_512["truncated_answer_share"], 2) == 0.14
    assert at_512["examples_without_label_tokens"] == 0


@pytest.mark.parametrize(
    ("batch", "batching", "waste"),
    [(8, "longest", 34.2), (4, "longest", 25.9), (8, "length_grouped", 1.8)],
)
def test_padding_waste_of_chat_examples(chat: Examples, batch: int, batching: str, waste: float) -> None:
    wastes = [
        batch_schedule(
            chat.lengths, per_device_batch_size=batch, gradient_accumulation=1, world_size=1, batching=batching,
            max_length=1024, seed=seed, epochs=1, max_steps=None,
        ).padding_waste_share
        for seed in range(5)
    ]  # fmt: skip
    assert 100 * np.mean(wastes) == pytest.approx(waste, abs=0.15)


def test_padding_waste_of_cut_examples(zero_shot: Examples, four_shot: Examples) -> None:
    found = dataset_statistics(cut(zero_shot, 256), max_length=256)
    assert 100 * found["padding_waste_share"] == pytest.approx(15.8, abs=0.2)
    assert 100 * found["padding_waste_share_by_batching"]["fixed_length"] == pytest.approx(16.0, abs=0.05)
    published = padding_statistics(cut(four_shot, 512), 512, "longest", 8)
    assert 100 * published["padding_waste_share"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(("max_length", "waste", "rows"), [(512, 3.5, 3206), (1024, 2.3, 1587), (2048, 1.1, 784)])
def test_packing_of_chat_examples(chat: Examples, max_length: int, waste: float, rows: int) -> None:
    with_line_break = Examples(  # the figures of reference count one token more an example
        np.zeros(int((chat.lengths + 1).clip(max=max_length).sum()), np.int32),
        np.concatenate([[0], np.cumsum((chat.lengths + 1).clip(max=max_length))]),
        chat.prompt_tokens,
        chat.answer_tokens + 1,
        chat.class_labels,
    )
    found = padding_statistics(with_line_break, max_length, "packed", 1)
    assert found["packed_rows"] == pytest.approx(rows, abs=6)
    assert 100 * (1 - found["packing_efficiency"]) == pytest.approx(waste, abs=0.2)


def test_a_small_case_by_hand() -> None:
    lengths = [4, 6, 6]  # after the cut at 6
    examples = Examples(
        input_ids=np.zeros(16, np.int32),
        offsets=np.array([0, 4, 10, 16]),
        prompt_tokens=np.array([2, 5, 7]),
        answer_tokens=np.array([2, 5, 1]),
        class_labels=np.array([-1, -1, -1]),
    )
    found = dataset_statistics(examples, max_length=6, per_device_batch_size=3)
    assert examples.lengths.tolist() == lengths
    assert examples.label_tokens.tolist() == [2, 1, 0]
    assert found["rows"] == 3
    assert found["truncated_prompt_share"] == pytest.approx(1 / 3)
    assert found["truncated_answer_share"] == pytest.approx(2 / 3)
    assert found["examples_without_label_tokens"] == 1
    assert found["label_tokens_kept_share"] == pytest.approx(3 / 8)
    assert found["padding_waste_share"] == pytest.approx(2 / 18)
    assert found["packed_rows"] == 3
    assert found["packing_efficiency"] == pytest.approx(16 / 18)
    assert found["answer_tokens"]["max"] == 4


def test_no_rows_have_no_statistics() -> None:
    nothing = np.array([], np.int64)
    found = dataset_statistics(Examples(nothing, np.array([0]), nothing, nothing, nothing), max_length=8)
    assert found["rows"] == 0
    assert found["prompt_tokens"] is found["padding_waste_share"] is found["packing_efficiency"] is None
