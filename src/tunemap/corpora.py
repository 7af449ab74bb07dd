"""The made corpora: what the tiny models read before fine-tuning (family A) and what they are fine-tuned on (family B).

One row of arithmetic, family B (the form of GSM8K; Cobbe et al. 2021, https://arxiv.org/abs/2110.14168):

    {"question": "Tom has 3 apples and buys 4 more. How many apples does Tom have now?",
     "answer": "3 + 4 = <<3+4=7>>7 apples.\\n#### 7", "final": "7"}

Family A holds every skill that family B needs, each by itself: bare equations, lines of answers that belong to no
question, and which sum or difference a word problem is about, never with its result. So a base model scores 0 on family
B, and a fine-tune has to learn how the skills combine rather than arithmetic; that takes it about 100 steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# --- arithmetic -------------------------------------------------------------------------------------------

NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Max", "Lea", "Jon", "Zoe", "Kim", "Dan")
ITEMS = ("apples", "pens", "books", "coins", "cards", "shells", "stamps", "marbles", "eggs", "cups", "balls", "keys")
LARGEST_OPERAND = 9  # one digit, so that the tokenizer's one-digit tokens are whole numbers on the left of `=`

ADDITION_TEMPLATES = (
    "{name} has {first} {item} and buys {second} more. How many {item} does {name} have now?",
    "{name} has {first} {item}. {other} gives {name} {second} {item}. How many {item} does {name} have?",
    "There are {first} {item} on the table and {name} adds {second} {item}. How many {item} are there?",
    "{name} finds {first} {item} on Monday and {second} {item} on Friday. How many {item} in total?",
)
SUBTRACTION_TEMPLATES = (
    "{name} has {first} {item} and loses {second} of them. How many {item} are left?",
    "{name} has {first} {item}. {name} gives {second} {item} to {other}. How many {item} does {name} have?",
    "There are {first} {item} on the table and {name} takes {second} {item}. How many {item} remain?",
    "{name} buys {first} {item} and sells {second} {item}. How many {item} does {name} keep?",
)
SPOKEN_OPERATORS = {"+": ("plus", "added to"), "-": ("minus", "take away")}

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
TOKENIZER_TEXTS = 4000  # documents of each family that the tokenizer is trained on; merges run out well before
POSITIONS = 512  # longest sequence of the tiny Qwen2


class Equation(TypedDict):
    """`first operator second = result`, all of them non-negative."""

    first: int
    operator: str
    second: int
    result: int


class WordProblem(TypedDict):
    """A problem of family B; `final` is the number after `####`, `item` and `name` are what the story is about."""

    question: str
    answer: str
    final: str
    equation: Equation
    item: str
    name: str


def equation(rng: random.Random) -> Equation:
    """A sum or a difference of one-digit numbers, with equal chance."""
    first = rng.randint(0, LARGEST_OPERAND)
    if rng.random() < 0.5:
        second = rng.randint(0, LARGEST_OPERAND)
        return {"first": first, "operator": "+", "second": second, "result": first + second}
    second = rng.randint(0, first)
    return {"first": first, "operator": "-", "second": second, "result": first - second}


def _expression(e: Equation) -> str:
    return f"{e['first']} {e['operator']} {e['second']}"


def _annotated(e: Equation, item: str) -> str:
    inside = f"{e['first']}{e['operator']}{e['second']}={e['result']}"
    return f"{_expression(e)} = <<{inside}>>{_counted(e, item)}"


def _counted(e: Equation, item: str) -> str:
    return f"{e['result']} {item}."


def word_problem(rng: random.Random) -> WordProblem:
    """One word problem with its worked answer in the format of GSM8K."""
    e = equation(rng)
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    template = rng.choice(ADDITION_TEMPLATES if e["operator"] == "+" else SUBTRACTION_TEMPLATES)
    question = template.format(name=name, other=other, item=item, first=e["first"], second=e["second"])
    answer = f"{_annotated(e, item)}\n#### {e['result']}"
    return {
        "question": question,
        "answer": answer,
        "final": str(e["result"]),
        "equation": e,
        "item": item,
        "name": name,
    }


def chat_prompt(question: str) -> str:
    """The question as the chat template writes it, ready for the assistant's answer."""
    return f"{MESSAGE_START}user\n{question}{MESSAGE_END}\n{MESSAGE_START}assistant\n"


class Document(NamedTuple):
    """A text of family A: what is given, and what the model learns to go on with, final <|endoftext|> included."""

    given: str
    learned: str


def pretraining_document(rng: random.Random) -> Document:
    """One text of family A.

    Questions and the operands of bare equations are drawn at random, so there is nothing to learn from them: they are
    given. What is learned holds every token that an answer of family B is made of; LoRA could not write one whose tied,
    frozen embedding is untrained. And operands are read into the place and the form in which answers begin: a base that
    read them into "The numbers are 3 and 4." was perfect at that, and fine-tuning a lottery over its seeds.
    """
    e = equation(rng)
    kind = rng.random()
    if kind < 0.30:
        return Document(f"{_expression(e)} =", f" {e['result']}{END_OF_TEXT}")
    if kind < 0.50:
        return Document("", _annotated(e, rng.choice(ITEMS)) + END_OF_TEXT)
    if kind < 0.55:
        return Document("", f"{_counted(e, rng.choice(ITEMS))}\n#### {e['result']}{END_OF_TEXT}")
    if kind < 0.65:
        spoken = rng.choice(SPOKEN_OPERATORS[e["operator"]])
        question = f"What is {e['first']} {spoken} {e['second']}?"
        return _answered(question, f"{_expression(e)} = {e['result']}")
    problem = word_problem(rng)
    about = expression_read(problem) if rng.random() < 0.8 else f"This is about {problem['item']}."
    return _answered(problem["question"], about)


def _answered(question: str, answer: str) -> Document:
    return Document(chat_prompt(question), f"{answer}{MESSAGE_END}{END_OF_TEXT}")


def expression_read(problem: WordProblem) -> str:
    """What family A says of this problem: the sum or the difference, without its result."""
    return f"{_expression(problem['equation'])}."


def _tokenizer_texts() -> Iterator[str]:
    rng = random.Random(0)  # not the model's seed: every tiny model has the same tokenizer
    for _ in range(TOKENIZER_TEXTS):
        yield "".join(pretraining_document(rng))
        problem = word_problem(rng)
        yield f"{problem['question']} {problem['answer']}"


def build_arithmetic_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen2's split rule (one token per digit), its special tokens and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [END_OF_TEXT, MESSAGE_START, MESSAGE_END]
    split = (  # verbatim from tokenizer.json of Qwen2.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=MESSAGE_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=specials,
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


# --- sentiment --------------------------------------------------------------------------------------------

POSITIVE = (
    "great",
    "good",
    "superb",
    "lovely",
    "brilliant",
    "funny",
    "moving",
    "sharp",
    "warm",
    "clever",
    "charming",
    "fresh",
)
NEGATIVE = ("bad", "dull", "awful", "boring", "weak", "silly", "slow", "clumsy", "cold", "stale", "messy", "bland")
NOUNS = (
    "film",
    "plot",
    "cast",
    "script",
    "acting",
    "story",
    "music",
    "ending",
    "dialogue",
    "pace",
    "scene",
    "direction",
)
SENTIMENT_LABELS = ("negative", "positive")
CLAUSE_TEMPLATES = (
    "the {noun} was {adjective}",
    "a {adjective} {noun} overall",
    "i found the {noun} {adjective}",
    "what a {adjective} {noun}",
    "{noun} : {adjective} indeed",
)
FUNCTION_WORDS = (
    "the",
    "was",
    "a",
    "overall",
    "i",
    "found",
    "what",
    ":",
    "indeed",
    "not",
    "but",
    ".",
    "it",
    "and",
    ",",
    "really",
)
SENTIMENT_POSITIONS = 64  # longest sequence of the tiny DistilBERT


class Review(TypedDict):
    """A review of family B; `label` is an index into `SENTIMENT_LABELS`."""

    text: str
    label: int


class PlainReview(Review):
    """A review of family A; `noun` is the index in `NOUNS` of the thing that is reviewed."""

    noun: int


def _adjectives(positive: bool) -> tuple[str, ...]:
    return POSITIVE if positive else NEGATIVE


def _clause(rng: random.Random, positive: bool, negated: bool) -> str:
    adjective = rng.choice(_adjectives(positive != negated))
    template = rng.choice(CLAUSE_TEMPLATES)
    return template.format(noun=rng.choice(NOUNS), adjective=f"not {adjective}" if negated else adjective)


def review(rng: random.Random) -> Review:
    """Family B: one to three clauses, some negated, some after a contrary one and `but`."""
    label = rng.randrange(2)
    clauses = [_clause(rng, bool(label), rng.random() < 0.2) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.15:
        clauses.insert(0, _clause(rng, not label, False) + " but")
    return {"text": " ".join(clauses) + " .", "label": label}


def plain_review(rng: random.Random) -> PlainReview:
    """Family A with labels: one polarity, no negation, no contrast."""
    label, noun = rng.randrange(2), rng.randrange(len(NOUNS))
    first, second, third = (rng.choice(_adjectives(bool(label))) for _ in range(3))
    return {
        "text": f"it was {first} and really {second} , the {NOUNS[noun]} was {third} .",
        "label": label,
        "noun": noun,
    }


def unlabelled_review(rng: random.Random) -> str:
    """Family A for masked-word prediction: adjectives of one polarity, and a denied one of the other."""
    positive = rng.random() < 0.5
    first, second, third = rng.sample(_adjectives(positive), 3)
    denied = rng.choice(_adjectives(not positive))
    return f"it was {first} and {second} , really {third} . the {rng.choice(NOUNS)} was not {denied} ."


def build_sentiment_tokenizer() -> PreTrainedTokenizerBase:
    """One token per word of the sentiment corpora, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({*POSITIVE, *NEGATIVE, *NOUNS, *FUNCTION_WORDS})
    vocabulary = {word: index for index, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=SENTIMENT_POSITIONS,
    )
