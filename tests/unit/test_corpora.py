"""The made corpora are right, apart from each other, and read by their tokenizers without a loss."""

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from tunemap import corpora

seeds = st.integers(0, 2**32).map(random.Random)


@given(seeds)
def test_answer_is_the_arithmetic_of_the_question(rng):
    problem = corpora.word_problem(rng)
    numbers = [int(n) for n in re.findall(r"\d+", problem["question"])]
    pattern = r"(\d) ([+-]) (\d) = <<\1\2\3=(\d+)>>\4 (\w+)\.\n#### \4"
    first, operator, second, result, item = re.fullmatch(pattern, problem["answer"]).groups()
    assert numbers == [int(first), int(second)]
    assert int(result) == (numbers[0] + numbers[1] if operator == "+" else numbers[0] - numbers[1]) >= 0
    assert problem["final"] == result
    assert item == problem["item"]
    assert f" {item}" in problem["question"]
    assert corpora.expression_read(problem) == f"{first} {operator} {second}."


@given(seeds)
def test_pretraining_never_shows_a_solved_word_problem(rng):
    document = corpora.pretraining_document(rng)
    assert document.learned.endswith("<|endoftext|>")
    if any(name in document.given for name in corpora.NAMES):
        assert "=" not in document.learned
        assert "####" not in document.learned
        assert "<<" not in document.learned
    assert not any(name in document.learned for name in corpora.NAMES)


def test_pretraining_shows_each_skill_in_its_share():
    rng = random.Random(0)
    documents = ["|".join(corpora.pretraining_document(rng)) for _ in range(20_000)]

    def share(pattern: str) -> float:
        return sum(re.search(pattern, document) is not None for document in documents) / len(documents)

    assert abs(share(r"^\d [+-] \d =\| \d+<\|") - 0.30) < 0.01
    assert abs(share(r"^\|(\d) ([+-]) (\d) = <<\1\2\3=(\d+)>>\4 \w+\.<\|") - 0.20) < 0.01
    assert abs(share(r"^\|(\d+) \w+\.\n#### \1<\|") - 0.05) < 0.01
    assert (
        abs(share(r"user\nWhat is (\d) [a-z ]+ (\d)\?.*\n<\|im_start\|>assistant\n\|\1 [+-] \2 = \d+<") - 0.10) < 0.01
    )
    assert abs(share(r"assistant\n\|\d [+-] \d\.<") - 0.35 * 0.8) < 0.01
    assert abs(share(r"assistant\n\|This is about \w+\.<") - 0.35 * 0.2) < 0.01


def test_pretraining_teaches_every_token_that_an_answer_is_made_of():
    """LoRA leaves the tied embeddings as they are: it could not write a token that the base never learned to write."""
    tokenizer, rng = corpora.build_arithmetic_tokenizer(), random.Random(5)
    learned, needed = set(), set()
    for _ in range(3000):
        learned.update(tokenizer(corpora.pretraining_document(rng).learned)["input_ids"])
        problem = corpora.word_problem(rng)
        prompt = corpora.chat_prompt(problem["question"])
        answered = tokenizer(prompt + problem["answer"] + corpora.MESSAGE_END)["input_ids"]
        needed.update(answered[len(tokenizer(prompt)["input_ids"]) :])
    assert needed <= learned


@given(seeds)
def test_sentiment_follows_from_adjectives_and_denials(rng):
    review = corpora.review(rng)
    decisive = review["text"].split(" but ")[-1].removesuffix(" .")
    words = decisive.split()
    for index, word in enumerate(words):
        if word in corpora.POSITIVE + corpora.NEGATIVE:
            positive = (word in corpora.POSITIVE) != (index > 0 and words[index - 1] == "not")
            assert corpora.SENTIMENT_LABELS[review["label"]] == ("positive" if positive else "negative")


@given(seeds)
def test_plain_reviews_neither_deny_nor_contrast(rng):
    review = corpora.plain_review(rng)
    words = set(review["text"].split())
    assert not words & {"not", "but"}
    assert bool(words & set(corpora.POSITIVE)) == (review["label"] == 1) != bool(words & set(corpora.NEGATIVE))
    assert corpora.NOUNS[review["noun"]] in words


def test_arithmetic_tokenizer_reads_every_document_back_with_one_token_a_digit():
    tokenizer, rng = corpora.build_arithmetic_tokenizer(), random.Random(5)
    for _ in range(200):
        problem = corpora.word_problem(rng)
        for text in (problem["question"], problem["answer"], "".join(corpora.pretraining_document(rng))):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
            assert sum(token.isdigit() for token in tokenizer.convert_ids_to_tokens(ids)) == sum(map(str.isdigit, text))
    assert len(tokenizer) <= 512


def test_chat_template_writes_the_prompt_that_pretraining_used():
    tokenizer = corpora.build_arithmetic_tokenizer()
    messages = [{"role": "user", "content": "How many?"}]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == corpora.chat_prompt("How many?")
    answered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "7"}], tokenize=False)
    assert answered == written + "7<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(written)["input_ids"])[0] == "<|im_start|>"


def test_tokenizers_are_the_same_each_time():
    first, second = (corpora.build_arithmetic_tokenizer().backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_sentiment_tokenizer_knows_every_word():
    tokenizer, rng = corpora.build_sentiment_tokenizer(), random.Random(6)
    for _ in range(300):
        for text in (corpora.review(rng)["text"], corpora.plain_review(rng)["text"], corpora.unlabelled_review(rng)):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("good film")["input_ids"]) == ["[CLS]", "good", "film", "[SEP]"]
