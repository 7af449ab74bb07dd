"""Every type of the pinned PEFT trains here or is listed with its reason; parameters are checked with messages."""

import copy

import pytest
import torch
from four_bit import quantised
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from tunemap.errors import UserError
from tunemap.methods import eva, peft_types
from tunemap.methods.parameters import count_parameters, linear_shapes, lora_closed_form
from tunemap.methods.peft_types import SUPPORTED, UNSUPPORTED, apply_peft, build_config

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "use_cache": False,
    "initializer_range": 0.1,
}


def tiny_model(name: str, task_type: str) -> nn.Module:
    torch.manual_seed(1)
    if task_type == "SEQ_CLS":
        config = DistilBertConfig(
            vocab_size=48,
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            num_labels=2,
            initializer_range=0.1,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
        return DistilBertForSequenceClassification(config)
    if "llama" in SUPPORTED[name].model_types:
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4))
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))


def batch_for(task_type: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 48, (4, 16), generator=torch.Generator().manual_seed(0))
    labels = ids if task_type == "CAUSAL_LM" else torch.tensor([0, 1, 1, 0])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


REQUIRED = {"TRAINABLE_TOKENS": {"token_indices": list(range(24))}}
# Types whose few parameters move the loss slowly at the common rate, or whose start it overshoots.
LEARNING_RATE = {
    ("UNILORA", "CAUSAL_LM"): 0.05,
    ("PVERA", "CAUSAL_LM"): 0.05,
    ("ADAPTION_PROMPT", "CAUSAL_LM"): 0.2,
    ("WAVEFT", "SEQ_CLS"): 0.002,
    ("PROMPT_TUNING", "SEQ_CLS"): 0.002,
    ("P_TUNING", "SEQ_CLS"): 0.002,
}
STEPS = 8
CASES = [(name, task) for name, method in SUPPORTED.items() for task in method.tasks]


def train(peft_model: nn.Module, batch: dict[str, torch.Tensor], lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(STEPS):
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
        peft_types.after_optimizer_step(peft_model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wrapped(name: str, task_type: str, model: nn.Module, parameters: dict | None = None) -> nn.Module:
    original = copy.deepcopy(model)
    if name == "LOFTQ":
        model = quantised(model)
    config = build_config(
        name, REQUIRED.get(name, {}) | (parameters or {}), model=model, task_type=task_type, total_steps=STEPS
    )
    return apply_peft(
        model,
        config,
        batches=[batch_for(task_type)] * 2,
        original_weight=lambda module: original.get_parameter(f"{module}.weight").detach(),
    )


# --- the registry -----------------------------------------------------------------------------------------------------


def test_every_type_of_peft_is_supported_or_has_a_reason():
    registered = {peft_type.value for peft_type in PeftType}
    assert registered == {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    reached = {method.peft_type for method in SUPPORTED.values()}
    assert registered - reached == set(UNSUPPORTED)
    assert not set(SUPPORTED) & set(UNSUPPORTED)
    assert all(len(reason) > 20 for reason in UNSUPPORTED.values())
    variants = {"DORA", "RSLORA", "PISSA", "OLORA", "EVA", "LORA_GA", "CORDA", "LOFTQ"}
    assert set(SUPPORTED) - registered == variants


@pytest.mark.parametrize(("name", "task_type"), CASES)
def test_supported_type_trains_and_its_saved_adapter_is_the_trained_model(name, task_type, tmp_path):
    model, batch = tiny_model(name, task_type), batch_for(task_type)
    base = copy.deepcopy(model)
    peft_model = wrapped(name, task_type, model).train()
    frozen = {n: p.detach().clone() for n, p in peft_model.named_parameters() if not p.requires_grad}

    losses = train(peft_model, batch, LEARNING_RATE.get((name, task_type), 0.01))

    assert losses[-1] < losses[0] - 0.004, losses
    assert all(torch.equal(frozen[n], p) for n, p in peft_model.named_parameters() if n in frozen)
    counts = count_parameters(peft_model)
    assert counts.adapter > 0
    assert counts.head == (0 if task_type == "CAUSAL_LM" else 32 * 32 + 32 + 2 * 32 + 2)
    assert counts.trainable == counts.adapter + counts.head

    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        expected = peft_model.eval()(**inputs).logits
        before = base.eval()(**inputs).logits
        assert not torch.allclose(before, expected[:, -before.shape[1] :], atol=1e-3)  # after any virtual tokens
        peft_types.save_adapter(peft_model, tmp_path)
        torch.manual_seed(99)
        loaded = PeftModel.from_pretrained(quantised(base) if name == "LOFTQ" else base, str(tmp_path)).eval()
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_type_still_does_not_train(name):
    """When a new PEFT makes one of these work, this says so."""
    model = tiny_model("LORA", "CAUSAL_LM")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
    targets = {} if hasattr(config_class, "num_virtual_tokens") or name == "XLORA" else {"target_modules": ["q_proj"]}
    virtual = {"num_virtual_tokens": 2} if hasattr(config_class, "num_virtual_tokens") else {}
    tokens = {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]} if name == "CPT" else {}
    batch = batch_for("CAUSAL_LM")
    with pytest.raises(Exception, match=r".") as failure:  # noqa: PT012
        peft_model = get_peft_model(model, config_class(task_type="CAUSAL_LM", **targets, **virtual, **tokens))
        loss = peft_model(**batch).loss
        loss.backward()
        assert torch.isfinite(loss), "the loss is not a number"
    assert not isinstance(failure.value, KeyError)
    with pytest.raises(UserError, match=f"method {name}: not supported: "):
        build_config(name.lower(), {}, model=model, task_type="CAUSAL_LM")


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_default_targets_are_the_linear_layers_of_the_backbone():
    model = tiny_model("LORA", "SEQ_CLS")
    config = build_config("LORA", {}, model=model, task_type="SEQ_CLS")
    assert config.target_modules == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    counts = count_parameters(apply_peft(model, config))
    assert counts.adapter == lora_closed_form(linear_shapes(tiny_model("LORA", "SEQ_CLS")), 16)


def test_all_linear_means_the_backbone_too():
    model = tiny_model("LORA", "SEQ_CLS")
    config = build_config("LORA", {"target_modules": "all-linear"}, model=model, task_type="SEQ_CLS")
    assert "pre_classifier" not in config.target_modules
    assert len(config.target_modules) == 6


def test_ambiguous_endings_become_full_names():
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(Qwen2Config(**SIZES, num_key_value_heads=2, num_labels=2, pad_token_id=0))
    model.q_proj = nn.Linear(2, 2)
    config = build_config("LORA", {}, model=model, task_type="SEQ_CLS")
    assert len(config.target_modules) == 14
    assert "q_proj" not in config.target_modules


def test_given_parameters_win_and_defaults_follow_them():
    model = tiny_model("LORA", "CAUSAL_LM")
    config = build_config("pissa", {"r": 4}, model=model, task_type="CAUSAL_LM")
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (4, 4, "pissa")
    config = build_config("pissa", {"r": 4, "lora_alpha": 9}, model=model, task_type="CAUSAL_LM")
    assert config.lora_alpha == 9
    config = build_config("ADALORA", {"target_r": 3, "tinit": 5}, model=model, task_type="CAUSAL_LM", total_steps=200)
    assert (config.total_step, config.tinit, config.tfinal, config.target_r) == (200, 5, 100, 3)


def test_defaults_fit_the_adapted_weights_only():
    model = tiny_model("LORA", "CAUSAL_LM")  # keys and values are 16 x 32
    assert build_config("MISS", {}, model=model, task_type="CAUSAL_LM").r == 32
    assert build_config("PSOFT", {}, model=model, task_type="CAUSAL_LM").r == 16
    assert build_config("PSOFT", {"target_modules": ["q_proj"]}, model=model, task_type="CAUSAL_LM").r == 32
    assert build_config("C3A", {}, model=model, task_type="CAUSAL_LM").block_size == 16
    assert build_config("C3A", {"target_modules": r".*\.up_proj"}, model=model, task_type="CAUSAL_LM").block_size == 32


def test_large_models_keep_peft_defaults(shared_data):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shared_data / "qwen2.5-configs" / "Qwen2.5-1.5B-Instruct")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    same = {
        "C3A": "block_size",
        "FOURIERFT": "n_frequency",
        "WAVEFT": "n_frequency",
        "MISS": "r",
        "SHIRA": "r",
        "PSOFT": "r",
        "GRALORA": "r",
        "OFT": "oft_block_size",
        "BOFT": "boft_block_size",
        "VBLORA": "vector_length",
        "ROAD": "group_size",
    }
    for name, key in same.items():
        built = build_config(name, {}, model=model, task_type="CAUSAL_LM")
        assert getattr(built, key) == getattr(type(built)(), key), name


def test_nested_configs_may_be_mappings():
    model = tiny_model("LORA", "CAUSAL_LM")
    config = build_config("EVA", {"eva_config": {"rho": 1.0}}, model=model, task_type="CAUSAL_LM")
    assert config.eva_config.rho == 1.0
    config = build_config("LORA_GA", {"lora_ga_config": {"direction": "ArBr"}}, model=model, task_type="CAUSAL_LM")
    assert config.lora_ga_config.direction == "ArBr"


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PISSA", "OLORA", "CORDA", "EVA", "DORA", "LORA_GA"])
def test_start_leaves_the_function_of_the_model_as_it_was(name):
    model, batch = tiny_model(name, "CAUSAL_LM"), batch_for("CAUSAL_LM")
    base = copy.deepcopy(model)
    peft_model = wrapped(name, "CAUSAL_LM", model).eval()
    with torch.no_grad():
        assert torch.allclose(peft_model(**batch).logits, base.eval()(**batch).logits, atol=1e-4)
    moved = not torch.equal(
        peft_model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight,
        base.model.layers[0].mlp.up_proj.weight,
    )
    assert moved == (name in ("PISSA", "OLORA", "CORDA", "LORA_GA"))


def test_loftq_starts_nearer_to_the_original_than_rounding_alone():
    model = tiny_model("LOFTQ", "CAUSAL_LM")
    original = copy.deepcopy(model)
    peft_model = wrapped("LOFTQ", "CAUSAL_LM", model, {"r": 4, "lora_alpha": 8})
    layers = {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = original.get_parameter(f"{name}.weight").detach()
        lost = weight - dequantize_module_weight(layer.get_base_layer())
        step = 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        # Eckart and Young: what remains are the singular values beyond the rank.
        beyond = torch.linalg.svdvals(lost)[4:].square().sum().sqrt()
        assert float((lost - step).norm()) == pytest.approx(float(beyond), rel=1e-3)
    assert peft_model.peft_config["default"].init_lora_weights is True


def test_data_driven_starts_ask_for_data_and_leave_no_trace():
    model = tiny_model("LORA", "CAUSAL_LM").eval()
    for name in ("EVA", "LORA_GA", "CORDA"):
        config = build_config(name, {}, model=model, task_type="CAUSAL_LM")
        with pytest.raises(UserError, match="the start is computed from data; give it batches"):
            apply_peft(copy.deepcopy(model), config)
    config = build_config("LORA_GA", {}, model=model, task_type="CAUSAL_LM")
    peft_model = apply_peft(model, config, batches=[batch_for("CAUSAL_LM")])
    assert all(p.grad is None for p in peft_model.parameters())
    assert all("lora_" in n for n, p in peft_model.named_parameters() if p.requires_grad)
    assert not peft_model.get_base_model().model.layers[0].training
    # CorDA runs the model in evaluation mode; training must not go on in it unnoticed.
    model = tiny_model("CORDA", "CAUSAL_LM").train()
    config = build_config("CORDA", {}, model=model, task_type="CAUSAL_LM")
    peft_model = apply_peft(model, config, batches=[batch_for("CAUSAL_LM")])
    assert peft_model.get_base_model().model.layers[0].training


def test_eva_without_enough_tokens_to_look_at_is_refused():
    """PEFT would go through such batches forever."""
    batch = batch_for("CAUSAL_LM")
    few = batch | {"labels": batch["labels"].masked_fill(torch.arange(16) >= 3, -100)}  # 12 of 64 tokens are learned
    model = tiny_model("EVA", "CAUSAL_LM")
    config = build_config("EVA", {"r": 8}, model=model, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="r times rho is 16, and no estimation batch has more than 12 tokens"):
        apply_peft(model, config, batches=[few] * 2)


def test_eva_that_never_settles_is_refused(monkeypatch):
    monkeypatch.setattr(eva._SomePasses, "PASSES", 1)
    model = tiny_model("EVA", "CAUSAL_LM")
    config = build_config("EVA", {}, model=model, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="its vectors have not settled in 1 passes"):
        apply_peft(model, config, batches=[batch_for("CAUSAL_LM")])  # a second look would show that they stand still


def test_applying_draws_nothing_from_the_callers_random_stream():
    draws = []
    for name in ("LORA", "VERA", "CORDA"):
        model = tiny_model(name, "CAUSAL_LM")
        torch.manual_seed(3)
        wrapped(name, "CAUSAL_LM", model)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_the_seed_makes_the_adapter():
    def adapter(seed: int) -> torch.Tensor:
        model = tiny_model("LORA", "CAUSAL_LM")
        config = build_config("LORA", {}, model=model, task_type="CAUSAL_LM")
        peft_model = apply_peft(model, config, seed=seed)
        return peft_model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.detach()

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))


def test_adalora_prunes_ranks_after_its_steps():
    model, batch = tiny_model("ADALORA", "CAUSAL_LM"), batch_for("CAUSAL_LM")
    peft_model = wrapped("ADALORA", "CAUSAL_LM", model, {"init_r": 6, "target_r": 2})
    train(peft_model, batch, 0.01)
    pattern = peft_model.peft_config["default"].rank_pattern
    kept = sum(sum(flags) for flags in pattern.values())
    assert kept == 14 * 2


# --- LoRA+ ------------------------------------------------------------------------------------------------------------


def test_loraplus_gives_b_the_ratio_and_keeps_the_weight_decay():
    model = get_peft_model(tiny_model("LORA", "CAUSAL_LM"), LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = peft_types.loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, ratio=16, weight_decay=0.1)
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(settings) == len(trainable) == 4
    for name, parameter in trainable.items():
        expected = 16e-3 if "lora_B" in name else 1e-3
        assert settings[id(parameter)] == (pytest.approx(expected), 0.1)


def test_loraplus_leaves_the_head_of_a_classifier_at_the_rate_of_all_else():
    config = LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["pre_classifier"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_model("LORA", "SEQ_CLS"), config)
    optimizer = peft_types.loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, ratio=16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fast = {names[id(p)] for group in optimizer.param_groups if group["lr"] > 1e-3 for p in group["params"]}
    assert fast == {name for name in names.values() if "lora_B" in name}


def test_loraplus_needs_a_lora():
    with pytest.raises(UserError, match="no trainable lora_B"):
        peft_types.loraplus_optimizer(tiny_model("LORA", "CAUSAL_LM"), torch.optim.AdamW, lr=1e-3, ratio=16)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("LORRA", {}, r"no PEFT method 'LORRA', did you mean LORA\?; allowed: LORA, RSLORA, DORA"),
        ("VERA", {"rr": 4}, r"method VERA: no parameter 'rr'.*; allowed: bias, d_initial"),
        ("LORA", {"lora_alfa": 4}, r"no parameter 'lora_alfa', did you mean lora_alpha\?"),
        ("LORA", {"task_type": "SEQ_CLS"}, r"no parameter 'task_type'"),
        ("LORA", {"r": "eight"}, r"method LORA: r is 'eight': Input should be a valid integer"),
        ("LORA", {"bias": "some"}, r"method LORA: bias is 'some': Input should be 'none', 'all' or 'lora_only'"),
        ("C3A", {"block_size": 5}, r"method C3A: PEFT refuses this model or these parameters: .*block size"),
        ("LORA", {"target_modules": ["w_proj"]}, r"method LORA: PEFT refuses .*w_proj"),
        ("LORA", {"r": 0}, r"method LORA: PEFT refuses .*positive integer"),
        ("TRAINABLE_TOKENS", {}, r"token_indices is needed"),
        ("ADAPTION_PROMPT", {}, r"PEFT implements it for llama, mistral, gpt2; this model is qwen2"),
        ("ADALORA", {}, r"needs total_step"),
        ("ADALORA", {"total_step": 10, "tfinal": 10}, r"method ADALORA: The supplied schedule values"),
    ],
)
def test_what_is_wrong_is_named(name, parameters, message):
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    with pytest.raises(UserError, match=message):
        apply_peft(model, build_config(name, parameters, model=model, task_type="CAUSAL_LM"))


def test_a_task_that_a_method_cannot_learn_is_named():
    model = tiny_model("LORA", "SEQ_CLS")
    with pytest.raises(UserError, match=r"PREFIX_TUNING: does not train on SEQ_CLS; allowed: CAUSAL_LM"):
        build_config("PREFIX_TUNING", {}, model=model, task_type="SEQ_CLS")


@pytest.mark.parametrize("name", ["PISSA", "OLORA", "LORA_GA", "CORDA"])
def test_starts_that_move_weights_refuse_quantised_ones(name):
    model = quantised(tiny_model(name, "CAUSAL_LM"))
    config = build_config(name, {}, model=model, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="moves a part of the base weights, which are quantised"):
        apply_peft(model, config, batches=[batch_for("CAUSAL_LM")])


def test_loftq_needs_a_quantised_model_and_the_original():
    model = tiny_model("LOFTQ", "CAUSAL_LM")
    config = build_config("LOFTQ", {}, model=model, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="needs a 4-bit model and the original weights"):
        apply_peft(model, config, original_weight=lambda name: torch.zeros(1))
    with pytest.raises(UserError, match="needs a 4-bit model and the original weights"):
        apply_peft(quantised(model), config)


@pytest.mark.parametrize("name", [name for name, method in SUPPORTED.items() if method.hides_padding])
def test_virtual_tokens_classify_with_encoders_alone(name):
    """A decoder finds its last token among token numbers, and gets none."""
    sizes = SIZES | {"num_key_value_heads": 2, "num_labels": 2, "pad_token_id": 0}
    with pytest.raises(UserError, match=rf"method {name}: hides where a text ends from a decoder \(qwen2\)"):
        build_config(name, {}, model=Qwen2ForSequenceClassification(Qwen2Config(**sizes)), task_type="SEQ_CLS")
    build_config(name, {}, model=tiny_model(name, "SEQ_CLS"), task_type="SEQ_CLS")
