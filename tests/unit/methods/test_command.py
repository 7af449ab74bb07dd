"""The table of methods names each one that a study may ask for, and the reason where it may not."""

from typing import get_args

from tunemap.cli import main
from tunemap.config import GoraMethod, PeftMethod
from tunemap.methods.peft_types import UNSUPPORTED
from tunemap.methods.sharding import UNSHARDABLE


def test_every_method_has_a_line_with_its_limits(capsys):
    assert main(["methods"]) == 0
    lines = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name in get_args(PeftMethod.model_fields["type"].annotation):
        assert f"kind: peft, type: {name}" in lines
        assert UNSHARDABLE.get(name, "") in lines[f"kind: peft, type: {name}"]
    for name in get_args(GoraMethod.model_fields["variant"].annotation):
        assert f"kind: gora, variant: {name}" in lines
    for name, reason in UNSUPPORTED.items():
        assert reason in lines[f"peft type {name}"]
    assert "classifies with encoders only" in lines["kind: peft, type: P_TUNING"]
    assert "models: llama, mistral, gpt2" in lines["kind: peft, type: ADAPTION_PROMPT"]
