"""Extract answers from generated text and score them.

For word problems the two rules of lm-evaluation-harness, task gsm8k version 3 (https://github.com/EleutherAI/
lm-evaluation-harness/blob/main/lm_eval/tasks/gsm8k/gsm8k.yaml): `strict-match` takes the first number after "#### ",
`flexible-extract` the last number anywhere. lm-eval then compares text without commas, dollar signs and a final full
stop. Three differences, each of which can only turn wrong into right, and only for equal numbers: a dollar sign may
follow "#### ", numbers are compared as decimals (72.0 is 72), and punctuation such as "..." is no last number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

STRICT = re.compile(r"#### (-?\$?-?[0-9.,]+)")  # lm-eval: #### (\-?[0-9\.\,]+)
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
HPML_MARKERS = ("final answer:", "answer:", "the answer is", "therefore")
HPML_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
NUMBER_TASKS = ("gsm8k", "arithmetic")


@dataclass(frozen=True)
class Score:
    """What was read from an output, and whether it is right by either rule; `malformed`: the strict rule found none."""

    extracted_strict: str | None
    extracted_flexible: str | None
    correct: bool
    correct_flexible: bool
    malformed: bool


def score(task: str, output: str, reference: str, *, extraction: str = "lm_eval") -> Score:
    """Score one output against its reference answer: numbers for gsm8k and arithmetic, else exact match.

    Exact match compares stripped text; its flexible form ignores case, spaces and a final full stop. With `extraction`
    "hpml", `correct` and `extracted_strict` follow the rule of a published study (`extract_hpml`).
    """
    if task not in NUMBER_TASKS:
        text, expected = output.strip(), reference.strip()
        return Score(text, _loose(text), text == expected, _loose(text) == _loose(expected), not text)
    expected = extract_strict(reference) or extract_flexible(reference) or ""
    strict, flexible = extract_strict(output), extract_flexible(output)
    if extraction == "hpml":
        read, due = extract_hpml(output), extract_hpml(reference)
        return Score(read, flexible, read == due, equal(flexible, expected), "####" not in output)
    return Score(strict, flexible, equal(strict, expected), equal(flexible, expected), strict is None)


def extract_strict(text: str) -> str | None:
    """The first number after `####`, without commas, dollar sign and final full stop; None if there is none."""
    match = STRICT.search(text)
    return None if match is None else clean(match.group(1))


def extract_flexible(text: str) -> str | None:
    """The last number of the text, cleaned in the same way; None if there is none."""
    for match in reversed(list(FLEXIBLE.finditer(text))):
        if (number := clean(match.group(0))) is not None:
            return number
    return None


def extract_hpml(text: str) -> str:
    """The rule of the study "HPML" (https://github.com/brian-xue/HPML-proj, src/evaluator.py), which compares text.

    After the last `####`; else after the last of the first marker that occurs; else the last number; else everything.
    "#### 72 clips", "#### $72" and "#### 72.0" are wrong by it where 72 is due.
    """
    lower = text.lower()
    marker = next((one for one in HPML_MARKERS if one in lower), None)
    if "####" in text:
        read = text.rsplit("####", 1)[1]
    elif marker is not None:
        read = text[lower.rfind(marker) + len(marker) :]
    else:
        read = ([match.group(0) for match in HPML_NUMBER.finditer(text)] or [text])[-1]
    return " ".join(read.lower().replace(",", "").split())


def clean(number: str) -> str | None:
    """`$1,234.` -> `1234`; None for what is no number after that."""
    text = number.replace(",", "").replace("$", "").rstrip(".")
    return text if _decimal(text) is not None else None


def equal(extracted: str | None, expected: str) -> bool:
    """Whether two cleaned numbers have the same value."""
    value = None if extracted is None else _decimal(extracted)
    return value is not None and value == _decimal(expected)


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _loose(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")
