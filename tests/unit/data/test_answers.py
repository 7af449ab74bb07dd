"""Answer extraction: lm-eval's strict and flexible rules, and the strings that a published study counted wrong."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunemap.data.answers import extract_flexible, extract_strict, score

REFERENCE = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"

# output, right by the strict rule, right by the flexible rule
OUTPUTS = [
    ("so\n#### 72", True, True),
    ("#### 72.", True, True),
    ("#### $72", True, True),
    ("#### 72 clips", True, True),
    ("#### 72.0", True, True),
    ("#### 72%", True, True),
    ("The answer is 72.", False, True),
    ("Answer: 72 apples", False, True),
    ("therefore 24 + 48 = 72", False, True),
    ("#### 72\n\nQuestion: next\n#### 99", True, False),
    ("I think so therefore the total is $72.", False, True),
    ("#### 72 ...", True, True),
    ("#### 73", False, False),
    ("#### -72", False, False),
    ("####72", False, True),
    ("no number", False, False),
    ("", False, False),
    ("#### .", False, False),
]


@pytest.mark.parametrize(("output", "strict", "flexible"), OUTPUTS)
def test_known_outputs(output: str, strict: bool, flexible: bool) -> None:
    found = score("gsm8k", output, REFERENCE)
    assert (found.correct, found.correct_flexible) == (strict, flexible)


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [("#### 1,234", "1234", "1234"), ("#### $1,234.50", "1234.50", "1234.50"), ("-5 or -6", None, "-6")],
)
def test_extracted_text(output: str, strict: str | None, flexible: str | None) -> None:
    assert (extract_strict(output), extract_flexible(output)) == (strict, flexible)


def test_output_without_the_mark_is_malformed() -> None:
    assert score("gsm8k", "72", REFERENCE).malformed
    assert not score("gsm8k", "#### 71", REFERENCE).malformed


def lm_eval(output: str, reference: str, pattern: str, group: int) -> bool:
    """lm-evaluation-harness 0.4: regex filter, take_first, exact_match with its regexes_to_ignore and ignore_case."""
    found = re.findall(pattern, output)
    extracted = found[group] if found else "[invalid]"
    if isinstance(extracted, tuple):
        extracted = next(part for part in extracted if part)
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        extracted, reference = re.sub(ignored, "", extracted.strip()), re.sub(ignored, "", reference)
    return extracted.lower() == reference.lower()


@given(st.text(alphabet="#### 72.,$-a\n%", max_size=30), st.sampled_from(["72", "7", "-2", "7.2", "2,727"]))
def test_whatever_lm_eval_accepts_is_accepted(output: str, number: str) -> None:
    reference = f"because\n#### {number}"
    found = score("gsm8k", output, reference)
    if lm_eval(output, reference, r"#### (\-?[0-9\.\,]+)", 0):
        assert found.correct
    if lm_eval(output, reference, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1):
        assert found.correct_flexible


@given(st.integers(-10_000, 10_000))
def test_plain_answers_are_scored_as_lm_eval_does(number: int) -> None:
    for output in (f"x\n#### {number}", f"#### {number:,}", f"it is {number}", f"#### {number + 1}"):
        found = score("arithmetic", output, f"#### {number}")
        assert found.correct == lm_eval(output, f"#### {number}", r"#### (\-?[0-9\.\,]+)", 0)
        assert found.correct_flexible == lm_eval(output, f"#### {number}", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)


def test_references_of_gsm8k_are_correct_answers_to_themselves(gsm8k_rows: list[dict[str, str]]) -> None:
    scores = [score("gsm8k", row["answer"], row["answer"]) for row in gsm8k_rows]
    assert all(found.correct and found.correct_flexible and not found.malformed for found in scores)


@pytest.mark.parametrize(
    ("output", "exact", "flexible"),
    [(" Paris\n", True, True), ("paris.", False, True), ("Paris, France", False, False), ("", False, False)],
)
def test_other_tasks_need_the_exact_text(output: str, exact: bool, flexible: bool) -> None:
    found = score("generation", output, "Paris")
    assert (found.correct, found.correct_flexible, found.malformed) == (exact, flexible, not output)


@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### 72 clips", "72 clips"),
        ("#### $72", "$72"),
        ("#### 72.0", "72.0"),
        ("#### 7\n#### 72", "72"),
        ("Final answer: 72", "72"),
        ("The answer is 72.", "72."),
        ("Therefore she has 24 left, 72 in all", "she has 24 left 72 in all"),
        ("First 24, then 72 clips", "72"),
        ("no number", "no number"),
    ],
)
def test_the_rule_of_a_published_study(output, read):
    scored = score("gsm8k", output, "so\n#### 72", extraction="hpml")
    assert scored.extracted_strict == read
    assert scored.correct == (read == "72")
