"""GoRA, a control of it and methods of peft on the whole path: training, outcome, saved adapter, evaluation."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunemap.evaluate import evaluate_share, load_trained

pytestmark = pytest.mark.usefixtures("forked_workers")
SMALL = {"estimation_batches": 2, "estimation_batch_size": 8}
GORA = {"kind": "gora", "reference_rank": 4, **SMALL}
METHODS = {
    "gora_ranks_only": GORA | {"variant": "gora_ranks_only"},
    "qgora": GORA | {"quantization_type": "nf4", "route": "dequantised"},
    "vera": {"kind": "peft", "type": "VERA", "parameters": {"r": 8}},
    "prompt_tuning": {"kind": "peft", "type": "PROMPT_TUNING", "parameters": {"num_virtual_tokens": 3}},
    "lora_ga": {"kind": "peft", "type": "LORA_GA", "parameters": {"r": 2}, **SMALL},
}


def tripped(ended):
    """Gates that tripped, but for those that speak of the machine's other users."""
    shared = ("cpu_share", "training_time", "wall")
    return [gate["message"] for gate in ended.outcome["gates"] if not gate["passed"] and gate["gate"] not in shared]


def base_model(ended):
    return AutoModelForCausalLM.from_pretrained(ended.paths.model)


@pytest.fixture(scope="module")
def gora(train_once):
    return train_once(GORA, max_steps=4)


def assert_learned_weights_evaluate(ended, run):
    """Evaluation loads what was saved, and what was saved makes a difference."""
    paths = ended.paths
    share = evaluate_share(run, paths.model, paths.weights, paths.tokens, device="cpu")
    assert len(share.predictions) == 8
    reloaded = load_trained(run, paths.model, paths.weights, num_labels=None, device="cpu").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        adapted = reloaded(input_ids=tokens).logits[:, -20:]
        with reloaded.disable_adapter():
            plain = reloaded(input_ids=tokens).logits
    assert (adapted - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_method_trains_saves_and_evaluates(train, make_run, gora, name):
    ended = train(METHODS[name], max_steps=4, gradient_checkpointing=name == "gora_ranks_only")
    assert ended.outcome["outcome"] == "ok", ended.outcome["traceback"]
    assert tripped(ended) == []
    assert "adapter_dtype is float32" in ended.gate("adapters")["message"]
    assert ended.measurements["data_order_hash"] == gora.measurements["data_order_hash"]
    assert_learned_weights_evaluate(ended, make_run(METHODS[name], max_steps=4))


def test_gora_trains_saves_and_evaluates(gora, make_run):
    assert tripped(gora) == []
    assert_learned_weights_evaluate(gora, make_run(GORA, max_steps=4))


def test_plan_is_in_the_outcome_with_its_cost_apart_from_training(gora):
    plan, values = gora.outcome["facts"]["gora"], gora.measurements
    assert plan["trainable"] == values["trainable_parameters"] == values["adapter_parameters"]
    assert len(plan["modules"]) == 14
    assert all(module["importance"] > 0 for module in plan["modules"].values())
    assert values["estimation_time_s"] >= plan["estimation_s"] > 0
    assert values["estimation_peak_bytes"] == plan["estimation_peak_bytes"] > 0
    assert "the method's closed form gives" in gora.gate("trainable_parameters")["message"]


def test_gora_adapter_is_plain_lora_to_peft(gora):
    config = json.loads((gora.paths.weights / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"], config["use_rslora"]) == ("LORA", True, True)
    model = PeftModel.from_pretrained(base_model(gora), gora.paths.weights)
    ranks = {
        name.split("base_model.model.")[1]: m.r["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")
    }
    assert ranks == {name: module["rank"] for name, module in gora.outcome["facts"]["gora"]["modules"].items()}
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        adapted = model.eval()(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


def test_wrong_parameter_of_a_peft_method_is_an_outcome_that_says_so(train):
    ended = train({"kind": "peft", "type": "VERA", "parameters": {"rank": 4}})
    assert ended.outcome["outcome"] == "error"
    assert "method VERA: no parameter 'rank'" in ended.outcome["reason"]
