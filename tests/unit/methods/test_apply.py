"""What a method makes of a model: which parameters learn, in which dtype, and that chance plays no part."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tunemap import corpora
from tunemap.config import BaseMethod, FullMethod, LoraMethod, QloraMethod, RandomModel
from tunemap.errors import UserError
from tunemap.methods.apply import apply_method, head_modules
from tunemap.methods.parameters import count_parameters, linear_shapes, lora_closed_form
from tunemap.models import prepare
from tunemap.models.loading import Quantization, assert_quantised, load_model

QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 64, "dim": 32,
    "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
NF4 = Quantization("nf4", True, torch.float32)
GENERATORS, CLASSIFIERS = ("qwen2",), ("distilbert", "qwen2")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Prepared random models of 2 layers by name."""
    root = tmp_path_factory.mktemp("models")
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    corpora.build_sentiment_tokenizer().save_pretrained(root / "sentiment")
    made = {}
    for name, config, tokenizer in (("qwen2", QWEN2, "arithmetic"), ("distilbert", DISTILBERT, "sentiment")):
        (root / f"{name}.json").write_text(json.dumps(config))
        made[name] = root / name
        prepare(RandomModel(source="random", config=f"{name}.json", tokenizer=tokenizer), made[name], data_root=root)
    return made


@pytest.fixture
def load(folders):
    def load(name="qwen2", task_kind="generation", quantization=None, dtype=torch.float32, seed=0) -> nn.Module:
        return load_model(
            folders[name],
            task_kind=task_kind,
            num_labels=2 if task_kind == "classification" else None,
            dtype=dtype,
            quantization=quantization,
            attention="sdpa",
            seed=seed,
            device="cpu",
        )

    return load


def applied(model, method, task_kind="generation", adapter_dtype=torch.float32, trained_dtype=torch.float32, seed=0):
    return apply_method(
        model, method, task_kind=task_kind, trained_dtype=trained_dtype, adapter_dtype=adapter_dtype, seed=seed
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- what learns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task_kind"), [("qwen2", "generation"), ("qwen2", "classification"), ("distilbert", "classification")]
)
def test_full_trains_everything(load, name, task_kind):
    model = load(name, task_kind)
    full = applied(model, FullMethod(kind="full"), task_kind, adapter_dtype=None)
    assert full is model
    assert set(trainable(full)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_adapters_alone_learn_in_generation_and_are_as_many_as_the_closed_form(load, quantization, rank):
    shapes = linear_shapes(load())
    assert len(shapes) == 14
    method = QloraMethod(kind="qlora", rank=rank) if quantization else LoraMethod(kind="lora", rank=rank)
    model = applied(load(quantization=quantization), method)
    assert all("lora_" in name for name in trainable(model))
    assert not any("lm_head" in name or "embed" in name for name in trainable(model))
    counts = count_parameters(model)
    assert counts.trainable == counts.adapter == lora_closed_form(shapes, rank)
    assert sum(parameter.numel() for parameter in trainable(model).values()) == counts.trainable
    if quantization:
        assert assert_quantised(model) == 14


def test_named_target_modules(load):
    method = LoraMethod(kind="lora", rank=4, target_modules=("q_proj", "v_proj"))
    shapes = {name: shape for name, shape in linear_shapes(load()).items() if name.endswith(("q_proj", "v_proj"))}
    model = applied(load(), method)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable(model)} == {"q_proj", "v_proj"}
    assert count_parameters(model).trainable == lora_closed_form(shapes, 4)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_head_is_trained_whole_and_has_no_adapter(load, name, quantization):
    bare = load(name, "classification")
    heads, shapes = head_modules(bare), linear_shapes(bare)
    head_size = sum(parameter.numel() for head in heads for parameter in bare.get_submodule(head).parameters())
    assert set(heads) == ({"pre_classifier", "classifier"} if name == "distilbert" else {"score"})
    method = QloraMethod(kind="qlora", rank=4) if quantization else LoraMethod(kind="lora", rank=4)
    model = applied(load(name, "classification", quantization), method, "classification")
    for parameter in trainable(model):
        assert ("lora_" in parameter) != any(f"{head}.modules_to_save" in parameter for head in heads)
    counts = count_parameters(model)
    assert (counts.adapter, counts.head) == (lora_closed_form(shapes, 4), head_size)
    assert counts.trainable == counts.adapter + counts.head


def test_the_head_that_is_trained_begins_as_the_model_had_it(load):
    bare = load("distilbert", "classification", seed=5)
    model = applied(load("distilbert", "classification", seed=5), LoraMethod(kind="lora"), "classification")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, bare.classifier.weight)


@pytest.mark.parametrize("task_kind", ["generation", "classification"])
def test_a_fresh_adapter_changes_nothing(load, task_kind):
    ids = torch.arange(5, 13)[None]
    before = load("qwen2", task_kind).eval()(input_ids=ids).logits
    model = applied(load("qwen2", task_kind), LoraMethod(kind="lora", rank=4), task_kind).eval()
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)


def test_gradients_reach_what_learns_and_nothing_else(load):
    model = applied(load(), LoraMethod(kind="lora", rank=2))
    ids = torch.arange(5, 21)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
    assert all(p.grad.abs().max() > 0 for name, p in trainable(model).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.0), ({"alpha": 3.0}, 0.75), ({"alpha": 4.0, "rslora": True}, 2.0), ({"rslora": True}, 4.0)],
)
def test_the_scale_of_adapters(load, changes, scale):
    """alpha / r, and alpha / sqrt(r) with rslora; alpha is 2 r unless said (r = 4 here)."""
    model = applied(load(), LoraMethod(kind="lora", rank=4, **changes))
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(scale)


def test_dropout_is_in_front_of_the_adapters(load):
    model = applied(load(), LoraMethod(kind="lora", dropout=0.25))
    dropouts = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert len(dropouts) == 14
    assert {module.p for module in dropouts} == {0.25}


def test_the_base_method_does_not_train(load):
    with pytest.raises(UserError, match="method kind base does not train"):
        applied(load(), BaseMethod(kind="base"))


# --- dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_dtype_that_is_asked_for_whatever_the_base_has(load, adapter_dtype, base_dtype):
    model = applied(load(dtype=base_dtype), LoraMethod(kind="lora"), adapter_dtype=adapter_dtype)
    assert {parameter.dtype for parameter in trainable(model).values()} == {adapter_dtype}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {base_dtype}


def test_a_head_has_the_dtype_of_trained_weights_and_adapters_their_own(load):
    model = applied(
        load("distilbert", "classification", dtype=torch.bfloat16),
        LoraMethod(kind="lora"),
        "classification",
        adapter_dtype=torch.bfloat16,
        trained_dtype=torch.float32,
    )
    for name, parameter in trainable(model).items():
        assert parameter.dtype == (torch.bfloat16 if "lora_" in name else torch.float32)


# --- chance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_adapters_come_from_the_seed_alone(load, quantization):
    method = QloraMethod(kind="qlora") if quantization else LoraMethod(kind="lora")

    def adapters(seed: int, disturbance: int) -> dict[str, torch.Tensor]:
        model = load(quantization=quantization)
        torch.manual_seed(disturbance)
        torch.rand(disturbance)
        return {name: parameter.detach() for name, parameter in trainable(applied(model, method, seed=seed)).items()}

    first, again, other = adapters(0, 1), adapters(0, 99), adapters(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert all(not first[name].any() for name in first if "lora_B" in name)


def test_lora_and_qlora_start_from_the_same_adapters(load):
    lora = trainable(applied(load(), LoraMethod(kind="lora", rank=4), seed=3))
    qlora = trainable(applied(load(quantization=NF4), QloraMethod(kind="qlora", rank=4), seed=3))
    assert list(lora) == list(qlora)
    assert all(torch.equal(lora[name], qlora[name]) for name in lora)
