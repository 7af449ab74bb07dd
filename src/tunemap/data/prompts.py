"""How a question becomes the text that a model reads: by the tokenizer's chat template, a template, or bare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunemap.data.rows import normalised
from tunemap.errors import UserError

PLACEHOLDER = "{prompt}"
SHORTEST_EXAMPLE_WORDS = 5


def check_template(template: str, name: str = "prompt_template") -> None:
    """Raise `UserError` unless the template has exactly one place for the prompt."""
    count = template.count(PLACEHOLDER)
    if count != 1:
        raise UserError(f"{name}: {PLACEHOLDER} must stand in it once, where the question goes; found {count} times")


def render_prompts(
    prompts: Sequence[str], tokenizer: Any, *, prompt_template: str | None, system_prompt: str | None
) -> list[str]:
    """The texts before the answer, special tokens written out.

    A template is the whole text (only `{prompt}` is replaced, other braces stay); without one the tokenizer's chat
    template is used up to the assistant's turn, and where the tokenizer has none, the bare prompt.
    """
    if prompt_template is not None:
        check_template(prompt_template)
        if system_prompt is not None:
            raise UserError("system_prompt: it goes into the chat template; with prompt_template, write it there")
        before, after = prompt_template.split(PLACEHOLDER)
        return [before + prompt + after for prompt in prompts]
    if not tokenizer.chat_template:
        if system_prompt is not None:
            raise UserError("system_prompt: this tokenizer has no chat template to put it in; use prompt_template")
        return list(prompts)
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]


def rows_in_template(prompts: Sequence[str], prompt_template: str | None) -> int:
    """How many prompts stand in the template word for word, as worked examples; very short ones are not counted."""
    template = normalised(prompt_template or "")
    texts = [normalised(prompt) for prompt in prompts] if template else []
    return sum(text in template for text in texts if len(text.split()) >= SHORTEST_EXAMPLE_WORDS)
