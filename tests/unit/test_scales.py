"""Scales: the same study at another size, by name; what they replace, and what they refuse."""

from pathlib import Path

import pytest

from tunemap.errors import UserError
from tunemap.study_file import load_plan

STUDY = """\
study: sized
models:
  big: {source: hub, id: owner/big}
datasets:
  sums: {task: arithmetic, source: made}
methods:
  full: {kind: full}
  lora: {kind: lora, rank: 16}
defaults: {model: big, dataset: sums, max_steps: 500, max_length: 1024}
experiments:
  - name: methods
    question: Which method?
    vary: {method: [full, lora], per_device_batch_size: [8, 32]}
    seeds: [0, 1, 2]
  - name: rank
    question: Which rank?
    fixed: {method: lora}
    vary: {method.rank: [4, 8]}
scales:
  cpu:
    models:
      big: {source: tiny}
    methods:
      lora: {kind: lora, rank: 2}
    defaults: {max_steps: 20}
    experiments:
      methods: {vary: {per_device_batch_size: [2]}, fixed: {max_length: 128}, seeds: [0]}
    hardware: {device: cpu}
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "sized.yaml"
    path.write_text(text)
    return path


def test_without_a_scale_the_study_is_what_it_says(tmp_path):
    plan = load_plan(write(tmp_path))
    assert plan.study.study == "sized"
    assert {run.model.source for run in plan.runs.values()} == {"hub"}
    assert len(plan.experiments[0].runs) == 12


def test_a_scale_replaces_what_it_names_and_nothing_else(tmp_path):
    plan = load_plan(write(tmp_path), scale="cpu")
    assert plan.study.study == "sized-cpu"
    assert plan.study.hardware.device == "cpu"
    runs = [plan.runs[name] for name in plan.experiments[0].runs]
    assert [(run.method_name, run.factors.per_device_batch_size, run.factors.seed) for run in runs] == [
        ("full", 2, 0), ("lora", 2, 0)
    ]  # fmt: skip
    assert {(run.model.source, run.factors.max_steps, run.factors.max_length) for run in runs} == {("tiny", 20, 128)}
    assert runs[1].method.rank == 2
    others = [plan.runs[name] for name in plan.experiments[1].runs]
    assert {(run.factors.max_steps, run.factors.max_length) for run in others} == {(20, 1024)}
    assert sorted(run.method.rank for run in others) == [4, 8]


def test_digests_of_scales_differ(tmp_path):
    path = write(tmp_path)
    full, small = (
        {run.training_digest for run in load_plan(path, scale=scale).runs.values()} for scale in (None, "cpu")
    )
    assert not full & small


def test_an_unknown_scale_names_the_allowed_ones(tmp_path):
    with pytest.raises(UserError, match=r"sized\.yaml: scale gpu: unknown; allowed: cpu$"):
        load_plan(write(tmp_path), scale="gpu")


def test_a_study_without_scales_says_so(tmp_path):
    path = write(tmp_path, STUDY[: STUDY.index("scales:")])
    with pytest.raises(UserError, match="scale cpu: unknown; allowed: none, the study has no scales"):
        load_plan(path, scale="cpu")


def test_a_scale_of_an_experiment_that_is_not_there(tmp_path):
    path = write(tmp_path, STUDY.replace("      methods: {vary", "      method: {vary"))
    with pytest.raises(UserError, match=r"scales\.cpu\.experiments: unknown experiment 'method'; declared: methods, r"):
        load_plan(path, scale="cpu")


def test_a_wrong_key_in_a_scale_is_named_with_its_line(tmp_path):
    path = write(tmp_path, STUDY.replace("defaults: {max_steps: 20}", "defaults: {max_step: 20}"))
    with pytest.raises(UserError, match=r"line 25, scales\.cpu\.defaults: .*max_step.*max_steps"):
        load_plan(path)


def test_the_command_lists_the_runs_of_a_scale(tmp_path, capsys):
    from tunemap.cli import main

    assert main(["plan", str(write(tmp_path)), "--scale", "cpu", "--list"]) == 0
    assert "4 runs to train" in capsys.readouterr().out
    assert main(["plan", str(write(tmp_path)), "--scale", "gpu"]) == 1
    assert "allowed: cpu" in capsys.readouterr().err
