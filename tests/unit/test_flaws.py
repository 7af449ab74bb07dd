"""Known flaws: each is found in the plan that repeats it, refused by name, and let through where it is accepted."""

from pathlib import Path

import pytest

from tunemap.errors import UserError
from tunemap.flaws import let_through
from tunemap.gates.result import GateResult
from tunemap.study_file import load_plan

STUDY = """\
study: flawed
models:
  tiny: {{source: tiny}}
datasets:
  sums: {{task: arithmetic, source: made{dataset}}}
prompt_templates:
  shots: "An example. {{prompt}}"
methods:
  full: {{kind: full{full}}}
  lora: {{kind: lora{lora}}}
defaults: {{model: tiny, dataset: sums, max_steps: 20{defaults}}}
{accept}
experiments:
  - name: methods
    question: Which method?
    vary: {{method: [full, lora]}}
    {more}
"""
PARTS = ("dataset", "full", "lora", "defaults", "accept", "more")


def write(folder: Path, **parts: str) -> Path:
    path = folder / "flawed.yaml"
    path.write_text(STUDY.format(**dict.fromkeys(PARTS, "") | parts))
    return path


FLAWED = {
    "F02": {"dataset": ", prompt_template: shots, accept_truncation: true"},
    "F04": {"defaults": ", strategy: fsdp, gpus: 2, fsdp_unit: model"},
    "F13": {"dataset": ", held_out_share: 0.05"},
    "F14": {"defaults": ", extraction: hpml"},
    "F32": {"lora": ", factors: {per_device_batch_size: 32}"},
    "F39": {"lora": ", factors: {gradient_checkpointing: true}"},
}
WORDS = {
    "F02": "dataset sums trains on answers that its prompt template leaves no room for",
    "F04": "fsdp_unit model gathers the whole model at once",
    "F13": "dataset sums is evaluated on 5% of its training rows",
    "F14": "extraction hpml counts right answers as wrong",
    "F32": r"methods are compared at different batch sizes \(full 8, lora 32\)",
    "F39": r"gradient checkpointing is on for some methods only \(lora\)",
}


@pytest.mark.parametrize("flaw", FLAWED)
def test_a_flaw_is_refused_by_name_with_the_list_that_is_needed(tmp_path, flaw):
    with pytest.raises(
        UserError, match=rf"methods: {WORDS[flaw]} \({flaw}\); .*, or write accept_flaws: \[{flaw}\]"
    ) as no:
        load_plan(write(tmp_path, **FLAWED[flaw]))
    assert f"accept_flaws: the study runs as it is with [{flaw}]" in str(no.value)


@pytest.mark.parametrize("flaw", FLAWED)
def test_an_accepted_flaw_is_kept_in_the_plan(tmp_path, flaw):
    plan = load_plan(write(tmp_path, **FLAWED[flaw], accept=f"accept_flaws: [{flaw}]"))
    assert [found["flaw"] for found in plan.to_dict()["experiments"][0]["flaws"]] == [flaw]
    accepted = {run.accept_flaws for run in plan.runs.values() if not run.is_base}
    assert accepted == {(flaw,) if flaw in ("F02", "F04") else ()}
    assert all(run.accept_flaws == () for run in plan.runs.values() if run.is_base)


def test_the_list_joins_what_is_accepted_and_what_is_missing(tmp_path):
    parts = {
        "dataset": ", held_out_share: 0.05",
        "defaults": ", extraction: hpml",
        "accept": "accept_flaws: [F13, F15]",
    }
    with pytest.raises(UserError, match=r"the study runs as it is with \[F13, F14, F15\]"):
        load_plan(write(tmp_path, **parts))


def test_a_sound_study_has_no_flaws(tmp_path):
    assert load_plan(write(tmp_path)).experiments[0].flaws == ()


@pytest.mark.parametrize("name", ["F45", "F99", "F00", "F1", "flaw"])
def test_an_unknown_flaw_is_refused_with_those_that_are_known(tmp_path, name):
    said = rf"accept_flaws\[0\]: '{name}' is not allowed: known flaws are F01 to F44, as docs/validity\.md numbers them"
    with pytest.raises(UserError, match=said):
        load_plan(write(tmp_path, accept=f"accept_flaws: [{name}]"))


GORA = """\
study: dtypes
models: {tiny: {source: tiny}}
datasets: {sums: {task: arithmetic, source: made}}
methods:
  lora: {kind: lora}
  gora: {kind: gora, variant: gora_hpml, adapter_dtype: bfloat16}
defaults: {model: tiny, dataset: sums, max_steps: 20, precision: bf16}
experiments:
  - {name: methods, question: Which method, vary: {method: [lora, gora]VARY}}
"""


def test_adapters_of_two_dtypes_are_f05_unless_the_dtype_is_varied(tmp_path):
    path = tmp_path / "dtypes.yaml"
    path.write_text(GORA.replace("VARY", ""))
    with pytest.raises(UserError, match=r"different dtypes \(lora float32, gora bfloat16\) \(F05\)"):
        load_plan(path)
    path.write_text(GORA.replace("VARY", ", method.adapter_dtype: [float32, bfloat16]"))
    assert load_plan(path).experiments[0].flaws == ()


TIED = "vary: {optimizer: [adamw, paged_adamw], precision: [fp16, bf16], max_length: [128, 64]}"
ONLY = """only:
      - {optimizer: adamw, precision: fp16, max_length: 128}
      - {optimizer: paged_adamw, precision: bf16, max_length: 64}"""


def test_factors_that_change_together_are_f40(tmp_path):
    path = write(tmp_path)
    text = path.read_text().replace("vary: {method: [full, lora]}", f"fixed: {{method: lora}}\n    {TIED}")
    path.write_text(f"{text.rstrip()}\n    {ONLY}\n")
    with pytest.raises(UserError, match=r"max_length, precision, optimizer change together \(F40\)"):
        load_plan(path)
    path.write_text(text)  # all combinations: each factor can be told apart
    assert load_plan(path).experiments[0].flaws == ()


def test_a_gate_of_an_accepted_flaw_warns_and_names_it():
    stopped = GateResult("truncation", False, True, "83 % of answers are cut")
    others = [GateResult("finite_loss", False, True, "loss nan"), GateResult("truncation", True, True, "fine")]
    [let, *same] = let_through([stopped, *others], ("F02",))
    assert (let.fatal, let.passed, let.message) == (False, False, "83 % of answers are cut (accepted: F02)")
    assert same == others  # a run without any label ends by its loss: nothing lets that through
    assert let_through([stopped], ()) == [stopped]
