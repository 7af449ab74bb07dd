"""Prompts by chat template, by a template of the study, and bare."""

from pathlib import Path

import pytest

from tunemap.data.prompts import render_prompts, rows_in_template
from tunemap.data.tokenizers import load_tokenizer
from tunemap.errors import UserError


class BareTokenizer:
    """A tokenizer without a chat template."""

    chat_template = None


def render(prompt: str, tokenizer: object, template: str | None = None, system: str | None = None) -> str:
    return render_prompts([prompt], tokenizer, prompt_template=template, system_prompt=system)[0]


def test_the_chat_template_ends_at_the_assistants_turn(arithmetic_folder: Path) -> None:
    tokenizer = load_tokenizer(arithmetic_folder)
    user = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert render("How many?", tokenizer) == user
    assert render("How many?", tokenizer, system="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{user}"


def test_a_template_is_the_whole_text(arithmetic_folder: Path) -> None:
    template = "Use {braces} and \\boxed{}.\nQ: {prompt}\nA:"
    expected = "Use {braces} and \\boxed{}.\nQ: {prompt} {0}?\nA:".replace("{prompt} {0}", "Why {x}")
    assert render("Why {x}?", load_tokenizer(arithmetic_folder), template) == expected
    assert render("Why {x}?", BareTokenizer(), template) == expected


def test_without_any_template_the_prompt_is_bare() -> None:
    assert render("Once upon", BareTokenizer()) == "Once upon"


@pytest.mark.parametrize(("template", "count"), [("no place", 0), ("{prompt} {prompt}", 2)])
def test_a_template_needs_one_place_for_the_prompt(template: str, count: int) -> None:
    with pytest.raises(UserError, match=rf"\{{prompt\}} must stand in it once.*found {count} times"):
        render("Why?", BareTokenizer(), template)


def test_a_system_prompt_needs_a_chat_template() -> None:
    with pytest.raises(UserError, match="no chat template to put it in"):
        render("Why?", BareTokenizer(), system="Be brief.")
    with pytest.raises(UserError, match="with prompt_template, write it there"):
        render("Why?", BareTokenizer(), "{prompt}", "Be brief.")


def test_worked_examples_in_a_template_are_found() -> None:
    template = "Question: How many  clips did she SELL?\nAnswer: 72\n\nQuestion: {prompt}"
    prompts = ["how many clips did she sell?", "How many did he sell in May?", "Question"]
    assert rows_in_template(prompts, template) == 1
    assert rows_in_template(prompts, None) == 0
