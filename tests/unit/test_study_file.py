"""Reading study files: every mistake is one clear message with file, line and remedy; never a traceback."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.studies import bases, mutate
from tunemap.errors import UserError
from tunemap.study_file import load_plan, read_yaml

STUDY = """\
study: small
models:
  tiny: {source: tiny}
datasets:
  sums: {task: arithmetic, source: made}
methods:
  full: {kind: full}
  lora: {kind: lora, rank: 4}
  qlora: {kind: qlora}
defaults: {model: tiny, dataset: sums, max_steps: 20}
experiments:
  - name: methods
    question: Which method?
    vary: {method: [full, lora]}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "s.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder: Path, text: str | bytes) -> list[str]:
    """The lines of the refusal, the file's name and the bullets taken off."""
    path = write(folder, text)
    with pytest.raises(UserError) as refusal:
        load_plan(path)
    head, *rest = str(refusal.value).split("\n")
    assert head.startswith(str(path))
    if not rest:
        return [head.removeprefix(str(path)).lstrip(":, ")]
    assert head == f"{path}: {len(rest)} problem{'s' if len(rest) > 1 else ''}"
    return [line.removeprefix("  - ") for line in rest]


def changed(old: str, new: str) -> str:
    assert STUDY.count(old) == 1
    return STUDY.replace(old, new)


def test_the_study_of_these_tests_is_right(tmp_path):
    assert list(load_plan(write(tmp_path, STUDY)).runs) == [
        "tiny.sums.full.seed-0",
        "tiny.sums.lora.seed-0",
        "tiny.sums.base",
    ]


# --- the file itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("{kind: full}", "{kind: full, factors: {seed: 7}}", "line 7, methods.full.factors"),
        ("max_steps: 20", "max_steps: 20, seed: 7", "line 10, defaults"),
        ("[full, lora]}", "[full, lora], seed: [7]}", "line 14, experiments[0].vary"),
    ],
)
def test_a_seed_outside_of_seeds_is_refused_with_where_it_belongs(tmp_path, old, new, place):
    assert problems(tmp_path, changed(old, new)) == [
        f"{place}: unknown key 'seed': seeds are given to an experiment, as seeds: [7]"
    ]


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such study file"):
        load_plan(tmp_path / "nowhere.yaml")


def test_a_folder_is_no_study_file(tmp_path):
    with pytest.raises(UserError, match="no such study file"):
        load_plan(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path):
    path = write(tmp_path, STUDY)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load_plan(path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_empty_file(tmp_path, text):
    assert problems(tmp_path, text) in (["the file is empty"], ["a study is a mapping of keys"])


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "hello\n", "~\n", "3\n"])
def test_not_a_mapping(tmp_path, text):
    assert problems(tmp_path, text) == ["a study is a mapping of keys"]


@pytest.mark.parametrize("text", [b"study: \xe9\n", STUDY.encode("utf-16")])
def test_not_utf_8(tmp_path, text):
    [problem] = problems(tmp_path, text)
    assert problem.startswith("not UTF-8 text")


@pytest.mark.parametrize("text", [b"\xef\xbb\xbf" + STUDY.encode(), STUDY.replace("\n", "\r\n").encode()])
def test_byte_order_mark_and_windows_line_ends_are_fine(tmp_path, text):
    assert len(load_plan(write(tmp_path, text)).runs) == 3


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("study: [a\nmodels: }\n", "line 2, column 7", "expected ',' or ']'"),
        ("study:\n\t- x\n", "line 2, column 1", r"cannot start any token"),
        ("study: a\n---\nstudy: b\n", "line 2, column 1", "another document"),
        ("study: *nothing\n", "line 1, column 8", "undefined alias"),
        ("a: 1\nstudy: !!python/object:os.system x\n", "line 2, column 8", "cannot be read as python/object"),
        ("a: 1\nstudy: !mine x\n", "line 2, column 8", "'x' cannot be read as !mine"),
        ("a: 1\nstudy: 2020-13-45\n", "line 2, column 8", "cannot be read as timestamp"),
        ("study: !!timestamp x\n", "line 1, column 8", "cannot be read as timestamp"),
        ("study: !!bool x\n", "line 1, column 8", "cannot be read as bool"),
        ("study: !!int ''\n", "line 1, column 8", "cannot be read as int"),
        ("study: !!map x\n", "line 1, column 8", "cannot be read as map"),
        ("study: =\n", "line 1, column 8", "cannot be read as value"),
        (f"study: 1{':59' * 300}.5\n", "line 1, column 8", "cannot be read as float"),
        (f"study: {'1' * 5000}\n", "line 1, column 8", "cannot be read as int"),
        ("study: 123456789012345678901234567890\n", "line 1, column 8", "beyond 64 bits"),
        (f"study: 0x{'f' * 5000}\n", "line 1, column 8", "beyond 64 bits"),
        ('study: "\\ud800"\n', "line 1, column 8", "half a character"),
        ('"\\ud800": 1\n', "line 1, column 1", "half a character"),
        ('study: "a\\0b"\n', "line 1, column 8", "holds a NUL"),
        ("<<: 3\n", "line 1, column 5", "only a mapping can be merged"),
        ("study: &a [*a]\n", "line 1, column 8", "nested more than 40 levels"),
        ("study: &a {b: *a}\n", "line 1, column 8", "nested more than 40 levels"),
        (f"study: {'[' * 100}{']' * 100}\n", "line 1, column 48", "nested more than 40 levels"),
    ],
)
def test_invalid_yaml_is_named_with_line_and_column(tmp_path, text, place, problem):
    [message] = problems(tmp_path, text)
    assert message.startswith(f"{place}: not valid YAML: ")
    assert problem in message
    assert len(message) < 250


def test_forbidden_characters(tmp_path):
    assert problems(tmp_path, "study: a\x00b\n")[0].startswith("not valid YAML: unacceptable character #x0000")


def test_bottomless_nesting(tmp_path):
    assert problems(tmp_path, f"study: {'[' * 2000}") == ["nested too deeply for a study"]


def test_aliases_of_aliases_are_stopped(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    [message] = problems(tmp_path, "\n".join(lines))
    assert "more than 100000 values" in message


def test_merges_of_merges_are_no_more_than_their_keys(tmp_path):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert read_yaml(write(tmp_path, "\n".join(lines))).values["a29"] == {"x": 1}


# --- anchors and merge keys -------------------------------------------------------------------------------


def test_merge_keys_and_anchors_work(tmp_path):
    text = changed(
        "  qlora: {kind: qlora}\n",
        "  base4: &small {kind: lora, rank: 2}\n"
        "  big: &big {<<: *small, rank: 64}\n"
        "  same: *big\n"
        "  rs: {<<: *big, rslora: true}\n",
    )
    methods = load_plan(write(tmp_path, text)).study.methods
    assert [methods[name].rank for name in ("base4", "big", "same", "rs")] == [2, 64, 64, 64]
    assert methods["rs"].rslora


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["a", "b c", "1e-4", "é", "", "null", "<<", "="]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c d", "e", "1", "<<"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(yaml_values)
@settings(max_examples=80, deadline=None)
def test_values_are_those_of_pyyaml(tmp_path_factory, value):
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump({"top": value, "again": value}))
    assert read_yaml(path).values == yaml.safe_load(path.read_text())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_merged_values_are_those_of_pyyaml(tmp_path_factory, data):
    keys = st.sampled_from(["a", "b", "c", "d"])
    lines = []
    for index in range(data.draw(st.integers(1, 5))):
        own = data.draw(st.dictionaries(keys, st.integers(0, 99), max_size=3))
        sources = data.draw(st.lists(st.integers(0, index - 1), max_size=3)) if index else []
        entries = [f"{key}: {value}" for key, value in own.items()]
        if sources:
            merge = "<<: [" + ", ".join(f"*m{source}" for source in sources) + "]"
            entries.insert(data.draw(st.integers(0, len(entries))), merge)
        lines.append(f"m{index}: &m{index} {{{', '.join(entries)}}}")
    path = write(tmp_path_factory.getbasetemp(), "\n".join(lines))
    assert read_yaml(path).values == yaml.safe_load(path.read_text())
    assert read_yaml(path).problems == []


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed("defaults:", "defualts:"),
            "line 10: unknown key 'defualts'; did you mean 'defaults'? Allowed: study, data_root, models, ",
        ),
        (changed("rank: 4", "rnak: 4"), "line 8, methods.lora: unknown key 'rnak'; did you mean 'rank'? Allowed: "),
        (
            changed("source: tiny", "source: tiny, id: x"),
            "line 3, models.tiny: unknown key 'id'. Allowed: source, arch",
        ),
        (
            changed("max_steps: 20", "max_step: 20"),
            "line 10, defaults: unknown key 'max_step'; did you mean 'max_steps'? Allowed: model, ",
        ),
        (
            changed("vary: {method:", "vary: {method.rnk: [1], method:"),
            "line 14, experiments[0].vary: unknown key 'method.rnk'; did you mean 'method.rank'? Allowed: ",
        ),
        (
            changed("{kind: full}", "{kind: full, factors: {batchng: packed}}"),
            "line 7, methods.full.factors: unknown key 'batchng'; did you mean 'batching'? Allowed: ",
        ),
        (
            STUDY + "report: {titel: x}\n",
            "line 15, report: unknown key 'titel'; did you mean 'title'? Allowed: title, ",
        ),
        (
            changed("max_steps: 20", "max_steps: 20, seed: 3"),
            "line 10, defaults: unknown key 'seed'",
        ),
        (
            STUDY + "    exclude: [{batchin: packed}]\n",
            "experiment methods: exclude: unknown key 'batchin'; did you mean 'batching'? Allowed: ",
        ),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, text, message):
    assert problems(tmp_path, text)[0].startswith(message)


def test_key_twice(tmp_path):
    [problem] = problems(tmp_path, changed("rank: 4", "rank: 4, rank: 8"))
    assert problem == "line 8, methods.lora: the key 'rank' occurs 2 times; the last would win silently"


def test_key_twice_at_the_top(tmp_path):
    problem = problems(tmp_path, STUDY + "study: other\n")[0]
    assert problem == "line 15: the key 'study' occurs 2 times; the last would win silently"


def test_a_method_declared_twice(tmp_path):
    [problem] = problems(tmp_path, changed("  full: {kind: full}\n", "  full: {kind: full}\n  full: {kind: full}\n"))
    assert problem == "line 8, methods: the key 'full' occurs 2 times; the last would win silently"


@pytest.mark.parametrize(
    "key", ["1", "1.5", "null", "true", "2020-01-01", ".nan", "!!binary aGVsbG8=", "[a]", "{a: b}"]
)
def test_keys_are_text(tmp_path, key):
    text = changed("models:\n", f"models:\n  ? {key}\n  : {{source: tiny}}\n")
    [problem] = problems(tmp_path, text)
    assert problem.startswith("line 3, models: a key must be text, ")


def test_missing_keys_are_explained(tmp_path):
    found = problems(tmp_path, "study: x\n")
    assert found[0] == "the key 'models' is missing (Models by name.)"
    assert len(found) == 4


def test_missing_key_inside(tmp_path):
    [problem] = problems(tmp_path, changed("    question: Which method?\n", ""))
    assert problem.startswith("line 12, experiments[0]: the key 'question' is missing (The question that")


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed("rank: 4", "rank: four"),
            "line 8, methods.lora.rank: 'four' is not allowed: it should be a valid integer",
        ),
        (
            changed("rank: 4", "rank: 4.0"),
            "line 8, methods.lora.rank: 4.0 is not allowed: it should be a valid integer",
        ),
        (changed("rank: 4", "rank: 0"), "line 8, methods.lora.rank: 0 is not allowed: it should be greater than 0"),
        (
            changed("rank: 4", "rank: true"),
            "line 8, methods.lora.rank: true is not allowed: it should be a valid integer",
        ),
        (changed("rank: 4", "rank:"), "line 8, methods.lora.rank: the value is empty: it should be a valid integer"),
        (
            changed("rank: 4", "rank: 2020-01-01"),
            "line 8, methods.lora.rank: 2020-01-01 is not allowed: it should be a valid integer",
        ),
        (
            changed("rank: 4", "alpha: 1e-4"),
            "line 8, methods.lora.alpha: '1e-4' is text to YAML 1.1, not a number; write 1.0e-4",
        ),
        (
            changed("max_steps: 20", "learning_rate: 5e3"),
            "line 10, defaults.learning_rate: '5e3' is text to YAML 1.1, not a number; write 5.0e+3",
        ),
        (
            changed("max_steps: 20", "learning_rate: .5e3"),
            "line 10, defaults.learning_rate: '.5e3' is text to YAML 1.1, not a number; write .5e+3",
        ),
        (
            changed("max_steps: 20", 'learning_rate: "0.1"'),
            "line 10, defaults.learning_rate: '0.1' is text to YAML 1.1, not a number; write 0.1",
        ),
        (
            changed("max_steps: 20", 'max_steps: "20"'),
            "line 10, defaults.max_steps: '20' is text to YAML 1.1, not a number; write 20",
        ),
        (
            changed("max_steps: 20", "learning_rate: inf"),
            "line 10, defaults.learning_rate: 'inf' is text to YAML 1.1, not a number; write a finite number",
        ),
        (
            changed("[full, lora]}", "[full, lora], learning_rate: [0.1, 1e-4]}"),
            "line 14, experiments[0].vary.learning_rate[1]: '1e-4' is text to YAML 1.1, not a number; write 1.0e-4",
        ),
        (
            changed("max_steps: 20", "weight_decay: .inf"),
            "line 10, defaults.weight_decay: inf is not allowed: it should be a finite number",
        ),
        (
            changed("max_steps: 20", "learning_rate: .nan"),
            "line 10, defaults.learning_rate: nan is not allowed: it should be a finite number",
        ),
        (
            changed("max_steps: 20", "precision: fp23"),
            "line 10, defaults.precision: 'fp23' is not allowed; did you mean fp32? "
            "Allowed: fp32, bf16, fp16 or pure_bf16",
        ),
        (
            changed("max_steps: 20", "precision: 32"),
            "line 10, defaults.precision: 32 is not allowed; did you mean fp32? Allowed: fp32, bf16, fp16 or pure_bf16",
        ),
        (
            changed("{kind: full}", "{kind: ful}"),
            "line 7, methods.full: 'kind' must be one of full, lora, qlora, ",
        ),
        (changed("{kind: full}", "{rank: 3}"), "line 7, methods.full: 'kind' must be one of full, lora, qlora"),
        (
            changed("{source: tiny}", "{source: [tiny]}"),
            "line 3, models.tiny: 'source' must be one of hub, local, random, tiny, not ['tiny']",
        ),
        (
            changed("{kind: full}", "full"),
            "line 7, methods.full: 'full' is not allowed: it should be a mapping of keys",
        ),
        (
            changed("question: Which method?", "question: [a]"),
            "line 13, experiments[0].question: ['a'] is not allowed: it should be a valid string",
        ),
        (
            changed("vary: {method: [full, lora]}", "vary: {method: full}"),
            "line 14, experiments[0].vary.method: 'full' is not allowed: it should be a valid list",
        ),
        (
            changed("name: methods", "name: my methods"),
            "line 12, experiments[0].name: 'my methods' is not allowed: a name is made of letters, digits, '_', ",
        ),
        (
            changed("  tiny: {s", "  a/b: {s"),
            "line 3, models.a/b: 'a/b' is not allowed: a name is made of letters",
        ),
        (changed("rank: 4", "target_modules: []"), "line 8, methods.lora.target_modules: [] is not allowed: "),
        (changed("rank: 4", "target_modules: [3]"), "line 8, methods.lora.target_modules[0]: 3 is not allowed: "),
        (
            changed("    vary: {method: [full, lora]}", "    vary: {method: [full, lora]}\n    seeds: []"),
            "line 15, experiments[0].seeds: [] is not allowed: ",
        ),
    ],
)
def test_wrong_value_is_named_with_line_and_what_is_allowed(tmp_path, text, message):
    found = [problem for problem in problems(tmp_path, text) if not problem.startswith("defaults: unknown model")]
    assert len(found) == 1
    assert found[0].startswith(message)


def test_a_long_wrong_value_is_cut(tmp_path):
    [problem] = problems(tmp_path, changed("question: Which method?", f"question: [{'x' * 5000}]"))
    assert len(problem) < 250


def test_number_written_as_text_in_overrides(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "t").mkdir()
    model = "{source: random, config: c.json, tokenizer: t, overrides: {rms_norm_eps: 1e-6, hidden_act: silu}}"
    text = changed("{source: tiny}", model) + f"data_root: {tmp_path}\n"
    [problem] = problems(tmp_path, text)
    assert problem == (
        "models.tiny.overrides.rms_norm_eps: '1e-6' is text to YAML 1.1, not a number; write 1.0e-6"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (changed("{kind: qlora}", "{kind: peft, type: LORA, parameters: {r: 4, a: [x, {b: 1e-5}]}}"),
         "methods.qlora.parameters.a[1].b"),
        (STUDY + "    exclude: [{learning_rate: 1e-5}]\n", "experiment methods: exclude[0].learning_rate"),
        (STUDY + "    only: [{method: full, weight_decay: [1e-5]}]\n", "experiment methods: only[0].weight_decay[0]"),
    ],
)  # fmt: skip
def test_number_written_as_text_where_any_type_goes(tmp_path, text, place):
    assert f"{place}: '1e-5' is text to YAML 1.1, not a number; write 1.0e-5" in problems(tmp_path, text)


@pytest.mark.parametrize("word", ["silu", "e", "one", '"0"', "infinite"])
def test_words_in_values_of_any_type_are_left_alone(tmp_path, word):
    text = changed("{kind: qlora}", f"{{kind: peft, type: LORA, parameters: {{a: {word}}}}}")
    assert load_plan(write(tmp_path, text)).runs


@pytest.mark.parametrize(("value", "place"), [(".nan", "a"), ("[x, .inf]", "a[1]"), ("{b: {c: .nan}}", "a.b.c")])
def test_no_number_in_values_of_any_type(tmp_path, value, place):
    [problem] = problems(tmp_path, changed("{kind: qlora}", f"{{kind: peft, type: LORA, parameters: {{a: {value}}}}}"))
    assert problem.startswith(f"line 9, methods.qlora.parameters.{place}: ")
    assert problem.endswith(" is not allowed: it should be a finite number")


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = (
        STUDY.replace("rank: 4", "rnak: 4").replace("max_steps: 20", "max_steps: 1e3").replace("- name: m", "- nam: m")
    )
    text += "report: {title: 3}\nhardware: {device: gpu}\nmethods: {}\n"
    found = problems(tmp_path, text)
    assert any("the key 'methods' occurs 2 times" in problem for problem in found)
    text = text.removesuffix("methods: {}\n")
    assert sorted(problem.partition(":")[0] for problem in problems(tmp_path, text)) == [
        "line 10, defaults.max_steps",
        "line 12, experiments[0]",
        "line 12, experiments[0]",
        "line 15, report.title",
        "line 16, hardware.device",
        "line 8, methods.lora",
    ]


def test_a_wrong_value_does_not_hide_an_impossible_combination(tmp_path):
    text = changed("[full, lora]}", "[full, lora]}\n    fixed: {gpus: 2}") + "report: {title: 3}\n"
    found = problems(tmp_path, text)
    assert found[0].startswith("line 16, report.title: 3 is not allowed")
    assert found[1].startswith("experiment methods: method=full: strategy single uses one device, gpus is 2")


def test_a_wrong_model_is_not_reported_as_missing_too(tmp_path):
    [problem] = problems(tmp_path, changed("{source: tiny}", "{source: tinny}"))
    assert problem.startswith("line 3, models.tiny: 'source' must be one of")


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed("[full, lora]", "[full, dora]"),
            "experiment methods: vary: unknown method 'dora'; declared: full, lora, qlora",
        ),
        (changed("model: tiny", "model: big"), "defaults: unknown model 'big'; declared: tiny"),
        (changed("model: tiny, ", ""), "experiment methods: no model given; set it in defaults, fixed or vary"),
        (
            changed("source: made}", "source: made, prompt_template: few}"),
            "datasets.sums: unknown prompt_template 'few'; declared: none",
        ),
        (
            STUDY + "prompt_templates: {a: no place}\n",
            "prompt_templates.a: {prompt} must stand in it once, where the question goes; found 0 times",
        ),
        (
            STUDY + "report: {baseline_method: x}\n",
            "report.baseline_method: unknown method 'x'; declared: full, lora, q",
        ),
        (
            changed("  full: {kind: full}\n", "  full: {kind: full}\n  base: {kind: full}\n"),
            "methods.base: the name is reserved for the row without fine-tuning; choose another",
        ),
        (changed("study: small", "study: shared"), "study: the name 'shared' is reserved for what studies share"),
        (
            STUDY + "  - {name: methods, question: Again, fixed: {method: qlora}}\n",
            "experiments: the name 'methods' is used 2 times; names are unique",
        ),
        (
            changed("source: made", "source: hub"),
            "datasets.sums: task arithmetic with source hub needs the key 'id'",
        ),
        (
            changed("task: arithmetic, source: made", "task: gsm8k, source: made"),
            "datasets.sums: source made knows the tasks arithmetic, sst2, not gsm8k; use hub, local or file",
        ),
        (
            changed("source: made}", "source: made, prompt_template: few, system_prompt: x}")
            + "prompt_templates: {few: '{prompt}'}\n",
            "datasets.sums: prompt_template is the whole prompt; write system_prompt into it",
        ),
        (
            changed("  sums: {", "  s2: {task: sst2, source: made, system_prompt: x}\n  sums: {"),
            "datasets.s2: a text to classify is taken as it is; leave prompt_template and system_prompt out",
        ),
    ],
)
def test_wrong_names(tmp_path, text, message):
    [problem] = problems(tmp_path, text)
    assert problem.startswith(message)


def test_keys_that_a_dataset_of_ones_own_needs(tmp_path):
    found = problems(tmp_path, changed("task: arithmetic, source: made", "task: generation, source: file"))
    needed = [problem.split("needs the key ")[1] for problem in found if "needs the key" in problem]
    assert needed == ["'train_file'", "'test_file'", "'prompt_field'", "'answer_field'"]


# --- impossible combinations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "reason"),
    [
        ("gpus: 2", "strategy single uses one device, gpus is 2; use ddp, fsdp or hybrid"),
        ("strategy: hybrid, gpus: 2", "strategy hybrid needs an even number of at least 4 devices, gpus is 2"),
        ("strategy: hybrid, gpus: 5", "strategy hybrid needs an even number of at least 4 devices, gpus is 5"),
        (
            "strategy: ddp, reshard_after_forward: false",
            "reshard_after_forward false keeps gathered weights, and strategy ddp gathers none; "
            "use fsdp or hybrid, or leave it true",
        ),
        ("max_steps: null, epochs: null", "max_steps and epochs are both null; one of them must end the training"),
        ("warmup_steps: 20", "warmup_steps 20 leaves nothing of max_steps 20"),
        ("measurement_warmup_steps: 20", "measurement_warmup_steps 20 leaves no step of max_steps 20 to measure"),
        (
            "attention: flash_attention_2",
            "flash_attention_2 has no fp32 kernels; use precision bf16, fp16 or pure_bf16",
        ),
        ("precision: fp16, method.adapter_dtype: float16", "the gradient scaler of fp16 needs adapter_dtype float32"),
        ("method.adapter_dtype: bfloat16", "precision fp32 with adapter_dtype bfloat16 is not fp32"),
        ("dataset: reviews", "the tiny qwen2 is made for generation, sst2 is not"),
        ("model: bert", "the tiny distilbert is made for classification, arithmetic is not"),
        (
            "model: bert, dataset: reviews, batching: packed",
            "packed rows hold several examples, a classifier gives one answer per row",
        ),
        (
            "model: bert, dataset: reviews, logits: label_tokens",
            "a classifier has logits of its classes alone; use logits all",
        ),
    ],
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_impossible_combination_names_experiment_and_reason(tmp_path, fixed, reason, method):
    text = STUDY.replace("  tiny: {", "  bert: {source: tiny, architecture: distilbert}\n  tiny: {").replace(
        "  sums: {", "  reviews: {task: sst2, source: made}\n  sums: {"
    )
    text = text.replace("vary: {method: [full, lora]}", f"fixed: {{method: {method}, {fixed}}}")
    assert problems(tmp_path, text) == [f"experiment methods: method={method}: {reason}"]


def test_an_impossible_point_of_a_grid_is_named_by_what_varies(tmp_path):
    text = changed("[full, lora]}", "[full, lora], gpus: [1, 2]}\n    seeds: [0, 1]")
    found = problems(tmp_path, text)
    reason = "strategy single uses one device, gpus is 2; use ddp, fsdp or hybrid"
    assert found == [f"experiment methods: method={method}, gpus=2: {reason}" for method in ("full", "lora")]


# --- local files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{source: local, path: m}", "models.tiny.path: m is no folder"),
        ("{source: local, path: ~nobody-here/m}", "models.tiny: Could not determine home directory."),
        (f"{{source: local, path: {'a' * 300}}}", "models.tiny: 'aaa"),
        ("{source: random, config: c, tokenizer: t}", "models.tiny.config: c: no such file"),
    ],
)
def test_missing_model(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    [problem] = problems(tmp_path, changed("{source: tiny}", model))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{task: gsm8k, source: local, path: d}", "datasets.sums.path: d is no folder"),
        (
            "{task: gsm8k, source: file, train_file: a.jsonl, test_file: b.csv}",
            "datasets.sums.train_file: a.jsonl: no s",
        ),
        (
            "{task: gsm8k, source: file, train_file: a.txt, test_file: b.csv}",
            "datasets.sums.train_file: a.txt is no .js",
        ),
        (
            "{task: gsm8k, source: local, path: ~nobody-here/d}",
            "datasets.sums: Could not determine home directory.",
        ),
    ],
)
def test_missing_dataset(tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    [problem] = problems(tmp_path, changed("{task: arithmetic, source: made}", dataset))
    assert problem.startswith(message)


def test_data_root_with_an_unset_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    text = STUDY + "data_root: $NOWHERE/data\n"
    assert problems(tmp_path, text) == [
        "data_root: $NOWHERE/data: the variable is not set; export it, or write the path itself"
    ]
    monkeypatch.setenv("NOWHERE", str(tmp_path))
    assert load_plan(write(tmp_path, text)).study.data_root == "$NOWHERE/data"


def test_a_data_root_given_by_hand_is_stronger_than_the_files(tmp_path):
    (tmp_path / "there" / "m").mkdir(parents=True)
    text = changed("{source: tiny}", "{source: local, path: m}") + "data_root: nowhere\n"
    assert load_plan(write(tmp_path, text), data_root=str(tmp_path / "there")).study.data_root.endswith("there")
    assert problems(tmp_path, text) == ["models.tiny.path: nowhere/m is no folder"]


# --- anything at all --------------------------------------------------------------------------------------


def plan_or_refusal(path: Path) -> bool:
    """Whether a study file is accepted; a refusal must name the file, in words that fit on a screen."""
    try:
        plan = load_plan(path)
    except UserError as error:
        refusal = str(error)
    else:
        json.dumps(plan.to_dict(), allow_nan=False)
        return True
    assert refusal.startswith(str(path))
    assert len(refusal) < 20_000
    return False


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def full_study(repository, workplace) -> dict[Any, Any]:
    """The default study with every section and every source in it; do not change it."""
    return bases(repository, workplace)[0]


@given(seed=st.integers(0, 2**32), changes=st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_study_is_a_plan_or_a_clear_refusal(full_study, workplace, seed, changes):
    rng, study = random.Random(seed), copy.deepcopy(full_study)
    for _ in range(changes):
        mutate(study, rng)
    path = workplace / "s.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    plan_or_refusal(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_edit_of_the_text_is_a_plan_or_a_clear_refusal(repository, workplace, data):
    text = (repository / "config/config.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = (
            text[:start]
            + data.draw(st.text(max_size=6) | st.sampled_from(list("{}[]:,&*!|>'\"%@`-?#~\n\t ")))
            + text[end:]
        )
    path = workplace / "s.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    plan_or_refusal(path)


def test_the_default_study_with_every_section_is_accepted(full_study, workplace):
    path = workplace / "s.yaml"
    path.write_text(yaml.safe_dump(full_study, sort_keys=False))
    assert plan_or_refusal(path)


def test_unknown_hardware_description(tmp_path):
    (problem,) = problems(tmp_path, STUDY + "hardware: {description: h10}\n")
    assert problem.startswith("hardware.description: hardware 'h10' is not described")
    assert "h100" in problem
