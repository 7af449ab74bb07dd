"""What the gates are told is read off live models: a setting without an effect is seen, and so is an effect unasked."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, OPTConfig, OPTForCausalLM

from tunemap.distributed.strategies import transformer_blocks
from tunemap.gates.training import frozen_weights_gate, trained_weights_gate
from tunemap.measure.witness import Witness
from tunemap.methods.apply import apply_method
from tunemap.methods.parameters import count_parameters
from tunemap.models.loading import Quantization, load_model
from tunemap.training import effects
from tunemap.training.checksums import changed, digest_of, replica_groups, weight_checksums
from tunemap.training.optimizer import build_optimizer
from tunemap.training.packed_attention import attend_by_document

torch.set_num_threads(1)
IDS = torch.arange(2 * 12).reshape(2, 12)


@pytest.fixture
def build(prepared, make_run):
    """The model of a run as training gets it, and the closed form of what it trains."""

    def build(method, dtype=torch.float32, **factors):
        run = make_run(method, **factors)
        model = load_model(
            prepared.model, task_kind="generation", num_labels=None, dtype=dtype, quantization=None,
            attention=run.factors.attention, seed=0, device="cpu",
        )  # fmt: skip
        expected = effects.expected_trainable(model, run)
        adapter_dtype = torch.float32 if method["kind"] == "lora" else None
        model = apply_method(
            model, run.method, task_kind="generation", trained_dtype=dtype, adapter_dtype=adapter_dtype, seed=0
        )
        return run, model.train(), expected

    return build


def step(model, optimizer=None):
    model(input_ids=IDS, labels=IDS).loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()


def gates_of_a_step(run, model):
    witness = Witness(transformer_blocks(model))
    with witness.watch():
        step(model)
    return {gate.gate: gate for gate in effects.step_gates(run, witness.seen, 2)}


def test_checkpointing_that_is_set_and_does_nothing_trips(build):
    run, model, _ = build({"kind": "full"}, gradient_checkpointing=True)
    gate = gates_of_a_step(run, model)["recomputation"]  # nobody enabled it in the model
    assert (gate.passed, gate.fatal) == (False, True)
    assert "computed 2 times in 1 micro-batches, 4 were expected" in gate.message


def test_checkpointing_that_nobody_asked_for_trips(build):
    run, model, _ = build({"kind": "full"})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not gates_of_a_step(run, model)["recomputation"].passed


def test_a_witnessed_step_gives_the_same_gradients_and_leaves_no_hook(build):
    _, model, _ = build({"kind": "full"})
    step(model)
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with Witness(transformer_blocks(model)).watch():
        step(model)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_sees_what_it_shall_predict_trips(build):
    decoder = build({"kind": "full"})[1]
    encoder = BertLMHeadModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    seen = [effects.causal_gate(model) for model in (decoder, encoder)]
    assert [(gate.passed, gate.fatal) for gate in seen] == [(True, True), (False, True)]
    assert decoder.training
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert not decoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_frozen_and_packed_weights_hide_nothing_from_the_gate_on_causality(prepared, attention):
    model = load_model(
        prepared.model, task_kind="generation", num_labels=None, dtype=torch.bfloat16,
        quantization=Quantization("nf4", True, torch.bfloat16), attention=attention, seed=0, device="cpu",
    )  # fmt: skip
    assert effects.causal_gate(model.requires_grad_(False)).passed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_looks_into_the_document_before_trips(build, attention):
    config = OPTConfig(
        vocab_size=64, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    blind_to_positions = OPTForCausalLM._from_config(config, attn_implementation=attention)
    seen = [effects.packed_gate(model) for model in (build({"kind": "full"})[1], blind_to_positions)]
    assert [(gate.passed, gate.fatal) for gate in seen] == [(True, True), (False, True)]
    attend_by_document(blind_to_positions)
    assert effects.packed_gate(blind_to_positions).passed is (attention == "sdpa")


def test_precision_that_does_not_reach_the_products_trips(build):
    run, model, _ = build({"kind": "full"}, precision="bf16")
    assert not gates_of_a_step(run, model)["autocast"].passed  # no autocast around the step
    with torch.autocast("cpu", torch.bfloat16):
        assert gates_of_a_step(run, model)["autocast"].passed


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*\.down_proj"])
def test_closed_form_of_lora_equals_the_live_model(build, targets):
    run, model, expected = build({"kind": "lora", "rank": 3, "target_modules": targets})
    trainable = count_parameters(model).trainable
    assert expected == trainable
    results = effects.model_gates(model, run, expected=expected, trainable=trainable)
    assert [gate.gate for gate in results if not gate.passed] == []


def test_adapters_on_other_modules_than_stated_trip(build):
    _, model, _ = build({"kind": "lora", "rank": 3, "target_modules": ("q_proj", "v_proj")})
    stated, _, expected = build({"kind": "lora", "rank": 3})
    trainable = count_parameters(model).trainable
    results = effects.model_gates(model, stated, expected=expected, trainable=trainable)
    assert [gate.gate for gate in results if not gate.passed] == ["trainable_parameters"]


def test_adapters_of_another_dtype_trip(build):
    run, model, expected = build({"kind": "lora", "rank": 3})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    trainable = count_parameters(model).trainable
    results = effects.model_gates(model, run, expected=expected, trainable=trainable)
    assert [gate.gate for gate in results if not gate.passed] == ["adapters"]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw"])
def test_states_of_another_dtype_trip(build, name):
    _, model, _ = build({"kind": "full"})
    optimizer = build_optimizer(model, name=name, learning_rate=1e-3, weight_decay=0.0)
    step(model, optimizer)
    assert effects.optimizer_gate(optimizer, name).passed
    other = "adamw" if name == "adamw_8bit" else "adamw_8bit"
    assert not effects.optimizer_gate(optimizer, other).passed


def test_a_frozen_weight_that_changes_by_one_bit_is_named(build):
    _, model, _ = build({"kind": "lora", "rank": 2})
    before = weight_checksums(model)
    frozen = dict(model.named_parameters())["base_model.model.model.norm.weight"]
    with torch.no_grad():
        frozen[0] = torch.nextafter(frozen[0], torch.tensor(2.0))
    assert changed(before, weight_checksums(model)) == ["base_model.model.model.norm.weight"]
    gate = frozen_weights_gate(changed(before, weight_checksums(model)), 1)
    assert not gate.passed


def test_updates_lost_to_rounding_are_named(build):
    _, model, _ = build({"kind": "full"}, dtype=torch.bfloat16)
    optimizer = build_optimizer(model, name="adamw", learning_rate=2e-5, weight_decay=0.0)
    before = weight_checksums(model)
    step(model, optimizer)
    after = weight_checksums(model)
    unchanged = [name for name in before if name not in changed(before, after)]
    assert "model.norm.weight" in unchanged  # ones: the next bfloat16 below 1 is 0.004 away
    gate = trained_weights_gate(unchanged, len(before))
    assert (gate.passed, gate.fatal) == (False, False)


def test_4_bit_weights_have_checksums_of_their_packed_bytes():
    from bitsandbytes.nn import Params4bit

    model = torch.nn.Module()
    model.weight = Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    before = weight_checksums(model)
    assert changed(before, weight_checksums(model)) == []
    model.weight.data[0] += 1
    assert changed(before, weight_checksums(model)) == ["weight"]


def test_replicas_are_compared_where_ranks_hold_the_same():
    assert replica_groups("ddp", ["a", "b"]) == [["a", "b"]]
    assert replica_groups("hybrid", ["a", "b", "c", "d"]) == [["a", "c"], ["b", "d"]]
    assert replica_groups("fsdp", ["a", "b"]) == replica_groups("single", ["a"]) == []
    assert digest_of({"a": 1, "b": 2}, ["b", "a"]) == digest_of({"b": 2, "a": 1}, ["a", "b"])
