"""From a study's method to the model that is trained: settings, names, messages, LoRA+ groups, AdaLoRA's memory."""

import copy
from typing import get_args

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from tunemap.config import Factors, GoraMethod, PeftMethod
from tunemap.errors import UserError
from tunemap.gates.model import trainable_parameters_gate
from tunemap.methods import gora, peft_types
from tunemap.methods.apply import Start, adapt, gora_settings
from tunemap.methods.parameters import count_parameters
from tunemap.methods.undisturbed import model_loss
from tunemap.study_file import load_plan
from tunemap.training.optimizer import LEARNING_RATE_RATIO, build_optimizer

BATCH = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}


@pytest.fixture(scope="module")
def bare():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes))


def start(**changes):
    options = {"batches": lambda shared: [BATCH], "loss_function": model_loss, "load_original": None}
    return Start(**(options | {"total_steps": 10} | changes))


def adapted(bare, method, seed=0, **changes):
    options = {"task_kind": "generation", "trained_dtype": torch.float32, "adapter_dtype": torch.float32}
    return adapt(copy.deepcopy(bare), method, seed=seed, start=start(**changes), **options)


def allowed(method, field):
    annotation = method.model_fields[field].annotation
    values = get_args(annotation)
    return [v for v in (get_args(values[0]) if type(None) in values else values) if v is not None]


# --- names ------------------------------------------------------------------------------------------------


def test_study_may_name_exactly_what_the_library_has():
    assert allowed(PeftMethod, "type") == list(peft_types.SUPPORTED)
    assert allowed(GoraMethod, "variant") == list(gora.METHODS)
    assert allowed(GoraMethod, "allocation") == list(gora.ALLOCATIONS)
    assert allowed(GoraMethod, "initialisation") == list(gora.INITIALISATIONS)
    assert allowed(GoraMethod, "importance") == list(gora.IMPORTANCES)
    assert allowed(GoraMethod, "route") == list(gora.ROUTES)


def problems(tmp_path, method, **defaults):
    study = {
        "study": "s",
        "models": {"m": {"source": "tiny"}},
        "datasets": {"d": {"task": "arithmetic", "source": "made"}},
        "methods": {"one": method},
        "defaults": {"model": "m", "dataset": "d", **defaults},
        "experiments": [{"name": "e", "question": "?", "fixed": {"method": "one"}}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(UserError) as caught:
        load_plan(tmp_path / "study.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "peft", "type": "VERRA"}, "'VERRA' is not allowed; did you mean VERA?"),
        ({"kind": "gora", "variant": "gora_rank_only"}, "did you mean gora_ranks_only?"),
        ({"kind": "gora", "rout": "dequantised"}, "unknown key 'rout'; did you mean 'route'?"),
        ({"kind": "gora", "estimation_batches": 0}, "methods.one.estimation_batches"),
        ({"kind": "peft", "parameters": {"r": 4}}, "the key 'type' is missing"),
    ],
)
def test_wrong_method_is_found_when_the_study_is_read(tmp_path, method, message):
    assert message in problems(tmp_path, method)


@pytest.mark.parametrize(
    ("method", "factors", "message"),
    [
        ({"kind": "gora"}, {"precision": "fp16"}, "which fp16 is too narrow for; use bf16 or fp32"),
        ({"kind": "gora", "estimation_batches": 1}, {"strategy": "ddp", "gpus": 2}, "one of 2 devices without a batch"),
        ({"kind": "peft", "type": "VERA"}, {"strategy": "fsdp", "gpus": 2}, "VERA cannot be sharded by fsdp"),
        ({"kind": "peft", "type": "PREFIX_TUNING"}, {"batching": "packed"}, "PREFIX_TUNING puts virtual tokens"),
        ({"kind": "peft", "type": "LN_TUNING"}, {"precision": "pure_bf16"}, "without autocast; use adapter_dtype bfl"),
        (
            {"kind": "peft", "type": "LOHA", "adapter_dtype": "bfloat16"},
            {"precision": "fp16"},
            "LOHA cannot compute with bfloat16 beside float16; use adapter_dtype float32",
        ),
        ({"kind": "full"}, {"optimizer": "adafactor", "strategy": "fsdp", "gpus": 2}, "adafactor looks at whole rows"),
        ({"kind": "full"}, {"optimizer": "galore_adamw", "strategy": "fsdp", "gpus": 2}, "galore_adamw looks at whole"),
        ({"kind": "lora"}, {"optimizer": "galore_adamw"}, "kind lora trains few; use it with kind full"),
        ({"kind": "full"}, {"optimizer": "lomo"}, "before the norm of all gradients is known; use max_grad_norm null"),
        (
            {"kind": "full"},
            {"optimizer": "lomo", "max_grad_norm": None, "gradient_accumulation": 2},
            "lomo changes each weight during the backward pass, so that there is nothing to accumulate",
        ),
        (
            {"kind": "full"},
            {"optimizer": "adalomo", "max_grad_norm": None, "strategy": "ddp", "gpus": 2},
            "before other devices' gradients are there; use strategy single",
        ),
        (
            {"kind": "full"},
            {"optimizer": "adalomo", "max_grad_norm": None, "precision": "fp16"},
            "before fp16's gradient scaler has looked at it; use bf16, pure_bf16 or fp32",
        ),
    ],
)
def test_impossible_combination_is_refused_with_its_reason(tmp_path, method, factors, message):
    assert message in problems(tmp_path, method, **factors)


# --- GoRA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", gora.METHODS)
def test_variant_without_changes_is_the_library_s_own(variant):
    assert gora_settings(GoraMethod(kind="gora", variant=variant), seed=0) == gora.method(variant)


def test_bounds_and_alpha_follow_the_reference_rank():
    settings = gora_settings(GoraMethod(kind="gora", reference_rank=2), seed=7)
    assert (settings.alpha, settings.min_rank, settings.max_rank, settings.seed) == (4.0, 1, 8, 7)
    hpml = gora_settings(GoraMethod(kind="gora", variant="gora_hpml", reference_rank=8), seed=0)
    assert (hpml.alpha, hpml.min_rank, hpml.max_rank) == (16.0, 1, None)


def test_given_parameters_are_stronger_than_the_variant_s():
    method = GoraMethod(kind="gora", gamma=0.0, max_rank=9, allocation="exact_budget", learning_rate_ratio=1.0)
    settings = gora_settings(method, seed=0)
    assert (settings.gamma, settings.max_rank, settings.allocation) == (0.0, 9, "exact_budget")
    assert settings.learning_rate_ratio == 1.0


@pytest.mark.parametrize("variant", gora.METHODS)
def test_every_variant_trains_the_parameters_of_its_closed_form(bare, variant):
    made = adapted(bare, GoraMethod(kind="gora", variant=variant, reference_rank=4))
    counted = count_parameters(made.model).trainable
    assert trainable_parameters_gate(counted, made.trainable).passed
    layers = {type(module) for module in made.model.modules() if hasattr(module, "lora_A")}
    assert [kind.__module__ for kind in layers] == ["peft.tuners.lora.layer"]  # one class for the whole ladder
    plan = made.facts["gora"]
    assert plan["trainable"] == counted
    assert plan["settings"]["reference_rank"] == 4


def test_exact_budget_trains_as_many_parameters_as_lora_within_a_percent(bare):
    counts = [
        adapted(bare, GoraMethod(kind="gora", variant=variant, reference_rank=8)).trainable
        for variant in ("lora", "gora_exact_budget")
    ]
    assert 0.99 < counts[1] / counts[0] <= 1


def test_estimation_is_timed_and_its_memory_measured(bare):
    opened = []

    class Part:
        def __enter__(self):
            opened.append("estimation")

        def __exit__(self, *error):
            opened.append("end")

    made = adapted(bare, GoraMethod(kind="gora", reference_rank=4), estimating=Part)
    assert opened == ["estimation", "end"]
    weights = sum(p.numel() for name, p in bare.named_parameters() if "_proj.weight" in name) * 4
    # At least the model and one fp32 gradient buffer per target; less than three of each.
    assert 2 * weights < made.estimation_peak_bytes < 6 * weights
    plain = adapted(bare, GoraMethod(kind="gora", variant="lora", reference_rank=4), estimating=Part)
    assert opened == ["estimation", "end"]
    assert plain.estimation_peak_bytes is None


def test_resumed_run_takes_its_plan_and_looks_at_no_data(bare):
    method = GoraMethod(kind="gora", reference_rank=4)
    first = adapted(bare, method)

    def no_batches(shared):
        raise AssertionError("estimated again")

    again = adapted(bare, method, planned=first.facts["gora"], batches=no_batches)
    assert again.facts == first.facts
    shapes = [{name: p.shape for name, p in made.model.named_parameters()} for made in (first, again)]
    assert shapes[0] == shapes[1]


def test_gora_refuses_weights_that_lie_transposed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    with pytest.raises(UserError, match=r"gora: this model's layers keep their weights transposed \(Conv1D"):
        adapted(model, GoraMethod(kind="gora", reference_rank=4))


def test_plan_of_other_settings_is_refused(bare):
    planned = adapted(bare, GoraMethod(kind="gora", reference_rank=4)).facts["gora"]
    with pytest.raises(UserError, match="the plan of the interrupted run has other settings"):
        adapted(bare, GoraMethod(kind="gora", reference_rank=2), planned=planned)


def test_recomputation_during_the_estimation_changes_nothing(bare):
    method = GoraMethod(kind="gora", reference_rank=4)
    plain, recomputed = adapted(bare, method), adapted(bare, method, checkpointing=True)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(parameter, recomputed.model.get_parameter(name), rtol=1e-5, atol=1e-8)
    assert not recomputed.model.get_base_model().is_gradient_checkpointing


def test_original_weights_are_asked_for_by_the_route_that_needs_them_only(bare):
    asked = []

    def load_original():
        asked.append("original")
        return copy.deepcopy(bare)

    method = {"kind": "gora", "quantization_type": "nf4", "reference_rank": 4}
    adapted(bare, GoraMethod(**method, route="unquantised"), load_original=load_original)
    assert asked == ["original"]
    adapted(bare, GoraMethod(**method, route="dequantised"), load_original=load_original)
    assert asked == ["original"]


# --- LoRA+ and Adafactor ----------------------------------------------------------------------------------


def test_b_learns_as_many_times_as_fast_as_the_ratio_says(bare):
    made = adapted(bare, GoraMethod(kind="gora", variant="lora+", reference_rank=4))
    ratio = made.learning_rate_ratio
    optimizer = build_optimizer(
        made.model, name="adamw", learning_rate=0.01, weight_decay=0.1, learning_rate_ratio=ratio
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert {rates[id(p)] for name, p in trained.items() if "lora_A" in name} == {0.01}
    assert {rates[id(p)] for name, p in trained.items() if "lora_B" in name} == {0.01 * 16}
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.1}
    assert {group[LEARNING_RATE_RATIO] for group in optimizer.param_groups if group["params"]} == {1.0, 16.0}


def test_schedule_keeps_the_ratio(bare):
    from tunemap.training.loop import Loop
    from tunemap.training.precision import PRECISIONS

    made = adapted(bare, GoraMethod(kind="gora", variant="lora+", reference_rank=4))
    optimizer = build_optimizer(made.model, name="adamw", learning_rate=0.01, weight_decay=0.0, learning_rate_ratio=16)

    class Ten:
        steps = 10

    factors = Factors(learning_rate=0.01, schedule="linear")
    loop = Loop(factors, PRECISIONS["fp32"], Ten(), None, [], lambda records: None, lambda state, loss: None)
    assert loop._set_learning_rate(optimizer, 5) == pytest.approx(0.005)
    rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
    assert sorted(rates) == pytest.approx([0.005, 0.08])


def test_adafactor_keeps_less_than_a_moment_per_weight(bare):
    model = copy.deepcopy(bare)
    optimizer = build_optimizer(model, name="adafactor", learning_rate=0.01, weight_decay=0.0)
    before = float(model_loss(model, BATCH).detach())
    for _ in range(5):
        model_loss(model, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model_loss(model, BATCH).detach()) < before
    kept = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    assert kept < 0.2 * sum(p.numel() for p in model.parameters())


# --- peft -------------------------------------------------------------------------------------------------


def adalora(bare, steps=12):
    method = PeftMethod(kind="peft", type="ADALORA", parameters={"init_r": 4, "target_r": 2})
    return adapted(bare, method, total_steps=steps).model


def test_penalty_is_what_peft_adds_to_the_loss_of_adalora(bare):
    model = adalora(bare)
    with torch.no_grad():
        added = float(model(**BATCH).loss - model.base_model.model(**BATCH).loss)
        assert float(peft_types.penalty(model)) == pytest.approx(added, rel=1e-4)
    assert added > 0


def test_adalora_trains_the_same_over_a_base_of_any_dtype(bare):
    in_float32, in_bfloat16 = (
        {name for name, parameter in adalora(base).named_parameters() if parameter.requires_grad}
        for base in (bare, copy.deepcopy(bare).bfloat16())
    )
    assert in_bfloat16 == in_float32


def test_other_models_have_no_penalty_and_no_state(bare):
    lora = adapted(bare, GoraMethod(kind="gora", variant="lora", reference_rank=2)).model
    for model in (bare, lora):
        assert peft_types.penalty(model) == 0.0
        assert peft_types.method_state(model) == {}
        peft_types.load_method_state(model, {})


def advance(model, optimizer, steps):
    for step in steps:
        model_loss(model, BATCH).backward()
        optimizer.step()
        peft_types.after_optimizer_step(model, step)
        optimizer.zero_grad()


@pytest.mark.parametrize(("stopped_at", "remembered"), [(4, "ipt"), (8, "rank_pattern")])  # before and after step 6
def test_adalora_goes_on_from_its_state_as_if_nothing_had_happened(bare, stopped_at, remembered):
    whole = adalora(bare)
    advance(whole, torch.optim.SGD(whole.parameters(), lr=0.1), range(10))
    first = adalora(bare)
    advance(first, torch.optim.SGD(first.parameters(), lr=0.1), range(stopped_at))
    state = copy.deepcopy(peft_types.method_state(first))
    assert state[remembered]
    second = adalora(bare)
    second.load_state_dict(first.state_dict())
    peft_types.load_method_state(second, state)
    assert peft_types.method_state(second).keys() == state.keys()
    advance(second, torch.optim.SGD(second.parameters(), lr=0.1), range(stopped_at, 10))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert whole.peft_config["default"].rank_pattern == second.peft_config["default"].rank_pattern


def test_peft_checks_the_parameters_when_the_run_starts(bare):
    with pytest.raises(UserError, match="method VERA: no parameter 'rank'"):
        adapted(bare, PeftMethod(kind="peft", type="VERA", parameters={"rank": 4}))


def test_start_that_moves_weights_sees_all_batches_on_every_process(bare):
    asked = []

    def batches(shared):
        asked.append(shared)
        return [BATCH]

    adapted(bare, PeftMethod(kind="peft", type="LORA_GA", parameters={"r": 2}), batches=batches)
    adapted(bare, GoraMethod(kind="gora", reference_rank=2), batches=batches)
    assert asked == [True, False]  # each process has its share of GoRA's, whose gradients are summed


# --- classifiers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
    return DistilBertForSequenceClassification(DistilBertConfig(num_labels=2, **sizes))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peft_type", ["LORA", "LN_TUNING", "P_TUNING"])
def test_adapters_have_the_dtype_asked_for_and_heads_that_of_what_is_trained(
    classifier, peft_type, base_dtype, adapter_dtype
):
    method = PeftMethod(kind="peft", type=peft_type, adapter_dtype=str(adapter_dtype).removeprefix("torch."))
    options = {"task_kind": "classification", "trained_dtype": torch.float32, "adapter_dtype": adapter_dtype}
    made = adapt(copy.deepcopy(classifier).to(base_dtype), method, seed=0, start=start(), **options).model
    trained = {name: parameter for name, parameter in made.named_parameters() if parameter.requires_grad}
    heads = {name: parameter for name, parameter in trained.items() if "modules_to_save" in name}
    assert {parameter.dtype for parameter in heads.values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in trained.items() if name not in heads} == {adapter_dtype}


@pytest.mark.parametrize("variant", ["lora", "gora", "gora_hpml"])
def test_head_of_a_classifier_is_trained_whole_and_counted_once(classifier, variant):
    method = GoraMethod(kind="gora", variant=variant, reference_rank=4)
    batch = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.tensor([0, 1])}
    options = {"task_kind": "classification", "trained_dtype": torch.float32, "adapter_dtype": torch.float32}
    made = adapt(copy.deepcopy(classifier), method, seed=0, start=start(batches=lambda shared: [batch]), **options)
    counted = count_parameters(made.model)
    assert trainable_parameters_gate(counted.trainable, made.trainable).passed
    assert counted.head == 32 * 32 + 32 + 2 * 32 + 2
    assert set(made.facts["gora"]["modules"]) == {
        n for n, m in classifier.named_modules() if n.endswith(("_lin", "lin1", "lin2"))
    }
