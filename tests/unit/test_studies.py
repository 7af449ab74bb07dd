"""The study files of the checkout: each can be planned at each of its scales, replications only with their flaws."""

from pathlib import Path

import pytest
import yaml

from tunemap.errors import UserError
from tunemap.study_file import load_plan

FOLDER = Path(__file__).resolve().parents[2] / "config" / "studies"
PUBLISHED = [
    f"{name}{ending}"
    for name in ("qwen_gsm8k_peft", "qwen_gsm8k_distributed", "distilbert_sst2_ranks", "qwen_consumer_gpu")
    for ending in ("", "_as_published")
]
FLAWS = {
    "qwen_gsm8k_peft_as_published": ["F02", "F05", "F13", "F14"],
    "qwen_gsm8k_distributed_as_published": ["F02", "F04", "F13", "F14"],
    "distilbert_sst2_ranks_as_published": ["F32", "F39"],
    "qwen_consumer_gpu_as_published": ["F40"],
}


@pytest.mark.parametrize("scale", [None, "cpu"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_study_needs_nothing_to_be_planned(name, scale):
    plan = load_plan(FOLDER / f"{name}.yaml", scale=scale)
    assert {run.model.source for run in plan.runs.values()} == {"hub" if scale is None else "tiny"}
    assert plan.study.study == name + ("" if scale is None else "-cpu")
    assert plan.study.report.published is not None


@pytest.mark.parametrize("scale", ["real_data", "random_weights"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_study_runs_without_the_hub(name, scale, shared_data):
    plan = load_plan(FOLDER / f"{name}.yaml", scale=scale, data_root=str(shared_data))
    assert {run.model.source for run in plan.runs.values()} == {"random"}
    assert {run.dataset.source for run in plan.runs.values()} == {"local"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_replications_have_flaws(name, tmp_path):
    study = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    found = sorted({flaw.id for one in load_plan(FOLDER / f"{name}.yaml").experiments for flaw in one.flaws})
    assert found == FLAWS.get(name, [])
    study["accept_flaws"] = []
    path = tmp_path / "refused.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    if not found:
        load_plan(path)
        return
    with pytest.raises(UserError) as refusal:
        load_plan(path)
    assert f"the study runs as it is with [{', '.join(found)}]" in str(refusal.value)


def test_the_published_batches_differ_fourfold():
    plan = load_plan(FOLDER / "distilbert_sst2_ranks_as_published.yaml")
    batches = {run.method_name: run.factors.per_device_batch_size for run in plan.runs.values() if not run.is_base}
    assert batches == {"full": 8, "lora": 32, "qlora": 32}


def test_the_published_lora_and_gora_differ_in_dtype():
    plan = load_plan(FOLDER / "qwen_gsm8k_peft_as_published.yaml")
    lora, gora = (next(run for run in plan.runs.values() if run.method_name == name) for name in ("lora", "gora"))
    assert (lora.method.adapter_dtype, gora.method.adapter_dtype) == ("float32", "bfloat16")
    assert lora.factors == gora.factors
    assert lora.tokens_key == gora.tokens_key
