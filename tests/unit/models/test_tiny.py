"""Tiny models: reproducible, refused below their gates, and a base on which fine-tuning methods can differ."""

import random
from dataclasses import replace
from itertools import chain

import pytest
import torch

from tunemap import corpora
from tunemap.config import TinyModel
from tunemap.cross_entropy import IGNORED
from tunemap.errors import UserError
from tunemap.files import read_json
from tunemap.models import prepare, tiny
from tunemap.models.loading import Quantization, load_model, load_tokenizer

ARCHITECTURES = ("qwen2", "distilbert")


def _brief(architecture: str, steps: int, gate: float) -> tiny.Recipe:
    return replace(tiny.RECIPES[architecture], steps=steps, gate=gate)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_seed_gives_the_same_bytes(architecture, tmp_path):
    model = TinyModel(source="tiny", architecture=architecture)
    for name, chosen in (("one", model), ("two", model), ("other", model.model_copy(update={"seed": 1}))):
        (tmp_path / name).mkdir()
        torch.randn(len(name))  # what was drawn before must not matter
        tiny.make(chosen, tmp_path / name, recipe=_brief(architecture, steps=3, gate=0))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pretraining_leaves_the_random_state_and_threads_alone(architecture):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    tiny.pretrain(architecture, 0, recipe=_brief(architecture, steps=1, gate=0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_both_halves_of_a_batch_give_the_gradients_of_its_mean_loss():
    halved, whole = (tiny._Qwen2Learner(0, tiny.RECIPES["qwen2"]) for _ in range(2))
    whole.model.load_state_dict(halved.model.state_dict())
    halved.backward()
    rows, labels = whole._rows()
    logits = whole.model(input_ids=rows).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
    for one, other in zip(halved.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_only_what_follows_the_given_part_of_a_document_is_learned():
    learner, rng = tiny._Qwen2Learner(0, tiny.RECIPES["qwen2"]), random.Random(0)
    documents = [corpora.pretraining_document(rng) for _ in range(learner.DOCUMENTS)]
    tokens, labels = zip(*learner._next.result(), strict=True)
    assert learner.tokenizer.decode(tokens) == "".join(chain.from_iterable(documents))
    learned = [label for label in labels if label != IGNORED]
    assert learner.tokenizer.decode(learned) == "".join(document.learned for document in documents)
    rows, follow = learner._rows()
    assert rows.flatten().tolist() == list(tokens[: rows.numel()])
    shifted = torch.tensor(labels[: rows.numel()]).view_as(rows)[:, 1:]
    assert torch.equal(follow[:, :-1], shifted)
    assert (follow[:, -1] == IGNORED).all()


def test_model_below_a_gate_is_refused_with_its_accuracies(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.RECIPES, "qwen2", _brief("qwen2", steps=2, gate=0.99))
    message = r"tiny qwen2, seed 0: after 2 steps of pretraining equation_accuracy 0.\d+, reading_accuracy 0.\d+"
    with pytest.raises(UserError, match=message):
        prepare(TinyModel(source="tiny"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_one_gate_is_not_enough():
    recipe = tiny.RECIPES["qwen2"]
    assert not tiny._passed({"equation_accuracy": 1.0, "reading_accuracy": 0.98}, recipe)
    assert tiny._passed({"equation_accuracy": 0.99, "reading_accuracy": 1.0}, recipe)


def test_progress_is_one_line_a_check_where_there_is_no_terminal(capsys):
    tiny.pretrain("qwen2", 0, recipe=_brief("qwen2", steps=1, gate=0), show=True)
    assert "pretraining tiny qwen2: step 1, equation accuracy 0." in capsys.readouterr().err


def test_accuracies_are_measured_by_generation():
    """A model that answers by a table scores what the table knows, so the gates cannot pass by accident."""
    learner = tiny._Qwen2Learner(0, tiny.RECIPES["qwen2"])
    asked: list[str] = []

    def answer(input_ids, **_settings):
        asked.extend(learner.tokenizer.batch_decode(input_ids, skip_special_tokens=False))
        answers = [_right(text) if len(asked) <= 155 else " 1 and 1." for text in asked[-len(input_ids) :]]
        encoded = learner.tokenizer(answers, padding=True, padding_side="right", return_tensors="pt").input_ids
        return torch.cat([input_ids, encoded], dim=1)

    def _right(text: str) -> str:
        first, operator, second = text.split("<|endoftext|>")[-1].split()[:3]
        return f" {int(first) + int(second) if operator == '+' else int(first) - int(second)}"

    learner.model.generate = answer
    accuracies = learner.accuracies()
    assert accuracies["equation_accuracy"] == 1.0
    assert accuracies["reading_accuracy"] < 0.05


# --- the real thing ---


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny Qwen2 of the default seed; about a minute."""
    folder = tmp_path_factory.mktemp("tiny") / "qwen2"
    prepare(TinyModel(source="tiny"), folder)
    return folder


@pytest.mark.slow
def test_tiny_qwen2_passes_both_gates(base):
    pretraining = read_json(base / "model.json")["pretraining"]
    assert pretraining["equation_accuracy"] >= 0.99
    assert pretraining["reading_accuracy"] >= 0.99


@pytest.mark.slow
def test_fine_tuning_separates_methods(base):
    """The base knows nothing of the task, 100 steps teach it; after half of them rank 1 is behind rank 8."""
    accuracy = {method: _fine_tuned(base, method) for method in ("base", "full", "lora 8", "qlora 8")}
    assert accuracy["base"] == 0
    assert accuracy["full"] >= 0.97
    assert accuracy["lora 8"] >= 0.8
    assert accuracy["qlora 8"] >= 0.8
    assert _fine_tuned(base, "lora 1", steps=50) <= _fine_tuned(base, "lora 8", steps=50) - 0.2


def _fine_tuned(folder, method: str, steps: int = 100) -> float:
    """Exact-match accuracy on 200 unseen problems after training on 2000 (batch 16, AdamW, linear decay)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    quantization = Quantization("nf4", True, torch.float32) if method.startswith("qlora") else None
    model = load_model(
        folder,
        task_kind="generation",
        num_labels=None,
        dtype=torch.float32,
        quantization=quantization,
        attention="sdpa",
        seed=0,
        device="cpu",
    )
    if "lora" in method:
        rank = int(method.split()[1])
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    tokenizer, rng = load_tokenizer(folder), random.Random(100)
    train = [corpora.word_problem(rng) for _ in range(2000)]
    if method != "base":
        rate = 2e-3 if method == "full" else 5e-3
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
        model.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
            model(**_batch(tokenizer, rng.sample(train, 16))).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    seen = {problem["question"] for problem in train}
    test = [p for p in (corpora.word_problem(rng) for _ in range(400)) if p["question"] not in seen][:200]
    prompts = tokenizer(
        [corpora.chat_prompt(p["question"]) for p in test], padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.no_grad():
        output = model.eval().generate(**prompts, max_new_tokens=48)[:, prompts.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    return sum(a.endswith(f"#### {p['final']}") for a, p in zip(answers, test, strict=True)) / len(test)


def _batch(tokenizer, problems) -> dict[str, torch.Tensor]:
    prompts = [corpora.chat_prompt(p["question"]) for p in problems]
    texts = [prompt + p["answer"] + corpora.MESSAGE_END for prompt, p in zip(prompts, problems, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    given = torch.tensor([len(ids) for ids in tokenizer(prompts).input_ids])[:, None]
    learned = batch.attention_mask.bool() & (torch.arange(batch.input_ids.shape[1]) >= given)
    return {**batch, "labels": batch.input_ids.masked_fill(~learned, -100)}


@pytest.mark.slow
def test_tiny_distilbert_passes_its_gates_and_learns_sentiment(tmp_path):
    prepare(TinyModel(source="tiny", architecture="distilbert"), tmp_path / "m")
    pretraining = read_json(tmp_path / "m" / "model.json")["pretraining"]
    assert pretraining["polarity_accuracy"] >= 0.99
    assert pretraining["subject_accuracy"] >= 0.99
    untrained, trained = _sentiment(tmp_path / "m", steps=0), _sentiment(tmp_path / "m", steps=200)
    assert untrained < 0.7
    assert trained >= 0.8


def _sentiment(folder, steps: int) -> float:
    """Accuracy of full fine-tuning on 400 reviews after `steps` batches of 16."""
    model, tokenizer = (
        load_model(
            folder,
            task_kind="classification",
            num_labels=2,
            dtype=torch.float32,
            quantization=None,
            attention="sdpa",
            seed=0,
            device="cpu",
        ),
        load_tokenizer(folder),
    )

    def inputs(rows):
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    torch.manual_seed(0)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 30) * (1 - step / steps)
        rows = [corpora.review(rng) for _ in range(16)]
        model.train()(**inputs(rows), labels=torch.tensor([row["label"] for row in rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rng = random.Random(1)
    rows = [corpora.review(rng) for _ in range(400)]
    with torch.no_grad():
        guesses = model.eval()(**inputs(rows)).logits.argmax(-1)
    return (guesses == torch.tensor([row["label"] for row in rows])).float().mean().item()
