"""Evaluation: padding and batches change nothing, every row gets its prediction, and weights come back as they were."""

import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GenerationConfig

from tunemap import corpora, evaluate, evaluation
from tunemap.config import (
    AdapterMethod,
    DatasetConfig,
    Factors,
    FullMethod,
    LoraMethod,
    PeftMethod,
    QloraMethod,
    RandomModel,
)
from tunemap.data.sources import prepare as prepare_dataset
from tunemap.data.tokens import Tokens, load_tokens, tokenize
from tunemap.distributed.world import World
from tunemap.evaluate import ends_of, evaluate_share, load_trained
from tunemap.evaluation import evaluate_to_files
from tunemap.files import read_json, write_json
from tunemap.methods.apply import Start, adapt, apply_method
from tunemap.methods.undisturbed import model_loss
from tunemap.models import prepare as prepare_model
from tunemap.models.loading import load_model, load_tokenizer
from tunemap.predictions import Share, batches_of, combine, share_from_json
from tunemap.run import Run, RunMethod
from tunemap.statistics import wilson
from tunemap.training.assemble import quantization_of
from tunemap.training.hostmemory import HostMemoryError
from tunemap.training.precision import DTYPES, PRECISIONS
from tunemap.training.weights import save_weights

# Large random weights: the best next token is far ahead of the second, so that rounding decides nothing.
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.4,
}  # fmt: skip
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 256, "dim": 32,
    "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip
MODELS = {"generation": "qwen2", "classification": "distilbert"}
DATASETS = {
    "generation": DatasetConfig(task="arithmetic", source="made", train_rows=8, test_rows=13),
    "classification": DatasetConfig(task="sst2", source="made", train_rows=8, test_rows=13),
}
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Prepared models, datasets and tokens of both task kinds."""
    root = tmp_path_factory.mktemp("evaluate")
    corpora.build_arithmetic_tokenizer().save_pretrained(root / "arithmetic")
    corpora.build_sentiment_tokenizer().save_pretrained(root / "sentiment")
    for kind, name, config, tokenizer in (
        ("generation", "qwen2", QWEN2, "arithmetic"),
        ("classification", "distilbert", DISTILBERT, "sentiment"),
    ):
        (root / f"{name}.json").write_text(json.dumps(config))
        model = RandomModel(source="random", config=f"{name}.json", tokenizer=tokenizer)
        prepare_model(model, root / name, data_root=root)
        prepare_dataset(DATASETS[kind], root / f"{kind}-rows", data_root=None)
        tokenize(
            root / f"{kind}-rows", root / name, root / kind, max_length=64, prompt_template=None, system_prompt=None
        )
    return root


def run_of(kind: str = "generation", method: RunMethod | None = None, **factors: Any) -> Run:
    from tunemap.config import BaseMethod

    return Run(
        id="r",
        model_name="m",
        model=RandomModel(source="random", config="c", tokenizer="t"),
        dataset_name="d",
        dataset=DATASETS[kind],
        method_name="x",
        method=method or BaseMethod(kind="base"),
        prompt_template=None,
        factors=Factors(**({"max_new_tokens": 12} | factors)),
    )


def shares_of(root: Path, run: Run, weights: Path = Path("none"), *, processes: int = 1) -> list[Share]:
    """What each process would make, one after the other."""
    model, tokens = root / MODELS[run.task_kind], root / run.task_kind
    return [
        evaluate_share(run, model, weights, tokens, device="cpu", rank=rank, world_size=processes)
        for rank in range(processes)
    ]


def evaluated(root: Path, run: Run, weights: Path = Path("none")):
    return combine(shares_of(root, run, weights), load_tokens(root / run.task_kind))


# --- generation -------------------------------------------------------------------------------------------


def test_padding_and_batches_change_no_output(root):
    _, alone = evaluated(root, run_of(evaluation_batch_size=1))
    lengths = load_tokens(root / "generation").test.lengths
    assert len(set(lengths.tolist())) > 1  # or nothing would be padded
    assert len({prediction.output for prediction in alone}) > 1  # or nothing would be shown
    for batch_size in (4, 64):
        _, together = evaluated(root, run_of(evaluation_batch_size=batch_size))
        assert together == alone


def test_outputs_are_those_of_plain_greedy_decoding(root):
    """Against a loop that appends the best token to the whole sequence, without cache, padding or generate()."""
    _, predictions = evaluated(root, run_of())
    tokens, folder = load_tokens(root / "generation"), root / "qwen2"
    model, tokenizer = load(root, run_of()), load_tokenizer(folder)
    for index, prediction in enumerate(predictions):
        ids = tokens.test.sequence(index).tolist()
        made: list[int] = []
        with torch.inference_mode():
            while len(made) < 12 and tokens.eos_token_id not in made:
                made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
        truncated = tokens.eos_token_id not in made
        assert prediction.truncated == truncated
        assert prediction.output == tokenizer.decode(made if truncated else made[:-1], skip_special_tokens=True)


def test_predictions_are_in_the_order_of_the_rows(root):
    rows = load_tokens(root / "generation").test_rows
    _, predictions = evaluated(root, run_of(evaluation_batch_size=4))
    assert [(p.id, p.prompt, p.reference) for p in predictions] == [
        (row["id"], row["prompt"], row["reference"]) for row in rows
    ]


def test_the_limit_is_the_longest_reference_unless_said(root):
    tokens = load_tokens(root / "generation")
    summary, _ = evaluated(root, run_of(max_new_tokens=None))
    assert summary["max_new_tokens"] == tokens.test.answer_tokens.max()
    assert summary["gates"][0]["passed"]
    summary, predictions = evaluated(root, run_of(max_new_tokens=1))
    assert summary["max_new_tokens"] == 1
    assert not summary["gates"][0]["passed"]
    assert summary["truncated_share"] == sum(p.truncated for p in predictions) / len(predictions)


class Scripted(nn.Module):
    """A model whose generate() gives these ids, row by row of the prompts' own order."""

    def __init__(self, tokens: Tokens, answers: dict[int, list[int]]) -> None:
        super().__init__()
        self.answers = {tuple(tokens.test.sequence(index).tolist()): ids for index, ids in answers.items()}
        self.seen: list[dict[str, Any]] = []
        self.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id)

    def generate(self, *, input_ids, attention_mask, **options):
        self.seen.append(options | {"shape": tuple(input_ids.shape)})
        rows = [
            self.answers[tuple(ids[mask.bool()].tolist())] for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        width = max(map(len, rows))
        padded = [row + [options["pad_token_id"]] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


@pytest.fixture
def scripted(root, monkeypatch):
    """Evaluates a model that says what the test tells it to say."""
    tokens = load_tokens(root / "generation")
    tokenizer = load_tokenizer(root / "qwen2")

    def run(texts: list[str], *, end: bool = True):
        ids = {
            index: tokenizer(text, add_special_tokens=False)["input_ids"] + [tokens.eos_token_id] * end
            for index, text in enumerate(texts)
        }
        model = Scripted(tokens, ids)
        monkeypatch.setattr(evaluate, "load_trained", lambda *arguments, **options: model)
        return (*evaluated(root, run_of(evaluation_batch_size=4)), model)

    return run


def test_right_answers_count(root, scripted):
    references = [row["reference"] for row in load_tokens(root / "generation").test_rows]
    texts = [reference if index % 3 else "I do not know" for index, reference in enumerate(references)]
    summary, predictions, _ = scripted(texts)
    expected = [bool(index % 3) for index in range(13)]
    assert [prediction.correct for prediction in predictions] == expected
    assert [prediction.malformed for prediction in predictions] == [not right for right in expected]
    assert [prediction.output for prediction in predictions] == texts
    interval = wilson(8, 13)
    assert summary["n"] == 13
    assert summary["correct"] == 8
    assert summary["accuracy"] == 8 / 13
    assert (summary["accuracy_low"], summary["accuracy_high"]) == (interval.low, interval.high)
    assert summary["malformed_share"] == 5 / 13
    assert summary["truncated_share"] == 0
    assert summary["metric"] == "exact_match_strict"


def test_an_answer_without_an_end_is_truncated(root, scripted):
    summary, predictions, _ = scripted(["one"] * 13, end=False)
    assert all(prediction.truncated for prediction in predictions)
    assert summary["truncated_share"] == 1


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_at_each_token_that_the_model_names_as_an_end(root, monkeypatch, several):
    tokens, tokenizer = load_tokens(root / "generation"), load_tokenizer(root / "qwen2")
    one, end, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", "<|im_start|>", "two"))
    model = Scripted(tokens, dict.fromkeys(range(13), one + end + two))
    model.generation_config.eos_token_id = [*end, tokens.eos_token_id] if several else end[0]
    monkeypatch.setattr(evaluate, "load_trained", lambda *arguments, **options: model)
    _, predictions = evaluated(root, run_of(evaluation_batch_size=4))
    assert {(prediction.output, prediction.truncated) for prediction in predictions} == {("one", False)}
    assert all(set(call["eos_token_id"]) == {*end, tokens.eos_token_id} for call in model.seen)


@pytest.mark.parametrize("named", [None, [2, 7]])
def test_a_trained_model_ends_answers_where_its_base_does(root, tmp_path, named):
    run, tokens = run_of(method=FullMethod(kind="full")), load_tokens(root / "generation")
    model: Any = trained(root, run)
    model.generation_config.eos_token_id = named
    save_weights(model, run, root / "qwen2", tmp_path / "weights", WORLD)
    again = load_trained(run, root / "qwen2", tmp_path / "weights", num_labels=None, device="cpu")
    assert ends_of(again, tokens) == ends_of(model, tokens) == sorted({tokens.eos_token_id, *(named or [])})


def test_prompts_of_like_length_go_together_and_decoding_is_greedy(root, scripted):
    _, _, model = scripted(["one"] * 13)
    lengths = sorted(load_tokens(root / "generation").test.lengths.tolist())
    assert [call["shape"] for call in model.seen] == [
        (len(lengths[start : start + 4]), max(lengths[start : start + 4])) for start in range(0, 13, 4)
    ]
    for call in model.seen:
        assert (call["do_sample"], call["num_beams"]) == (False, 1)


# --- classification ---------------------------------------------------------------------------------------


def test_classification_is_the_same_in_any_batch(root):
    summary, alone = evaluated(root, run_of("classification", evaluation_batch_size=1))
    _, together = evaluated(root, run_of("classification", evaluation_batch_size=13))
    assert together == alone
    rows = load_tokens(root / "classification").test_rows
    assert [prediction.id for prediction in alone] == [row["id"] for row in rows]
    assert all(prediction.correct == (prediction.output == prediction.reference) for prediction in alone)
    assert summary["accuracy"] == sum(prediction.correct for prediction in alone) / 13
    assert summary["metric"] == "accuracy"
    assert (summary["accuracy_flexible"], summary["malformed_share"], summary["max_new_tokens"]) == (None, None, None)


# --- several processes ------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 9), max_size=40),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 9),
    unpadded=st.booleans(),
)
def test_processes_share_the_batches_of_one_process(lengths, batch_size, world_size, unpadded):
    def dealt(rank: int, world_size: int) -> list[list[int]]:
        batches = batches_of(lengths, batch_size, rank=rank, world_size=world_size, unpadded=unpadded)
        return [batch.tolist() for batch in batches]

    whole, shared = dealt(0, 1), [dealt(rank, world_size) for rank in range(world_size)]
    assert sorted(place for batch in whole for place in batch) == list(range(len(lengths)))
    assert sorted(batch for batches in shared for batch in batches) == sorted(whole)
    assert max(map(len, shared)) - min(map(len, shared)) <= 1
    assert all(0 < len(batch) <= batch_size for batch in whole)
    assert not unpadded or all(len({lengths[place] for place in batch}) == 1 for batch in whole)


@pytest.mark.parametrize("processes", [2, 4, 5])
@pytest.mark.parametrize("kind", ["generation", "classification"])
def test_answers_do_not_depend_on_the_number_of_processes(root, kind, processes):
    run, tokens = run_of(kind, evaluation_batch_size=4), load_tokens(root / kind)  # four batches, the last of one
    alone = combine(shares_of(root, run), tokens)
    shares = shares_of(root, run, processes=processes)
    summary, predictions = combine([share_from_json(json.loads(json.dumps(s.to_json()))) for s in shares], tokens)
    assert predictions == alone[1]
    differing = {key for key in summary if summary[key] != alone[0][key]}
    assert differing <= {"processes", "evaluation_time_s"}
    assert summary["processes"] == processes


def test_an_example_that_is_missing_or_answered_twice_is_an_error(root):
    tokens = load_tokens(root / "classification")
    first, second = shares_of(root, run_of("classification", evaluation_batch_size=4), processes=2)
    with pytest.raises(RuntimeError, match="8 predictions of 8 examples for 13 test examples"):
        combine([first], tokens)
    with pytest.raises(RuntimeError, match="21 predictions of 13 examples for 13 test examples"):
        combine([first, second, first], tokens)


# --- weights come back as they were -----------------------------------------------------------------------


def load(root: Path, run: Run) -> nn.Module:
    """The model as training loads it, in evaluation mode."""
    precision = PRECISIONS[run.factors.precision]
    frozen = run.is_base or isinstance(run.method, AdapterMethod)
    return load_model(
        root / MODELS[run.task_kind],
        task_kind=run.task_kind,
        num_labels=2 if run.task_kind == "classification" else None,
        dtype=precision.frozen if frozen else precision.trained,
        quantization=quantization_of(run, precision),
        attention="sdpa",
        seed=run.factors.seed,
        device="cpu",
    ).eval()


def trained(root: Path, run: Run) -> nn.Module:
    """A model whose every trainable weight has moved, as after some training."""
    precision, loaded = PRECISIONS[run.factors.precision], load(root, run)
    options: dict[str, Any] = {
        "task_kind": run.task_kind,
        "trained_dtype": precision.trained,
        "adapter_dtype": DTYPES[run.method.adapter_dtype] if isinstance(run.method, AdapterMethod) else None,
        "seed": run.factors.seed,
    }
    if isinstance(run.method, PeftMethod):
        start = Start(batches=lambda shared: [], loss_function=model_loss, load_original=lambda: loaded, total_steps=9)
        model = adapt(loaded, run.method, start=start, **options).model
    else:
        model = apply_method(loaded, run.method, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def logits(model: nn.Module, run: Run) -> torch.Tensor:
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.inference_mode(), PRECISIONS[run.factors.precision].autocast_context("cpu"):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["generation", "classification"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_the_base_model_is_the_prepared_one(root, kind, precision):
    run = run_of(kind, precision=precision)
    again = load_trained(run, root / MODELS[kind], Path("none"), num_labels=2, device="cpu").eval()
    assert torch.equal(logits(again, run), logits(load(root, run), run))


@pytest.mark.parametrize("kind", ["generation", "classification"])
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        (FullMethod(kind="full"), "fp32"),
        (FullMethod(kind="full"), "bf16"),
        (FullMethod(kind="full"), "pure_bf16"),
        (LoraMethod(kind="lora", rank=4), "fp32"),
        (LoraMethod(kind="lora", rank=4, rslora=True, alpha=3.0, dropout=0.5), "fp32"),
        (LoraMethod(kind="lora", rank=4), "bf16"),
        (LoraMethod(kind="lora", rank=4), "pure_bf16"),
        (LoraMethod(kind="lora", rank=4, adapter_dtype="bfloat16"), "pure_bf16"),
        (LoraMethod(kind="lora", rank=4, adapter_dtype="bfloat16"), "bf16"),
        (LoraMethod(kind="lora", rank=4, adapter_dtype="bfloat16"), "fp16"),
        (QloraMethod(kind="qlora", rank=4), "fp32"),
        (QloraMethod(kind="qlora", rank=4, quantization_type="fp4", double_quantization=False), "fp32"),
        (QloraMethod(kind="qlora", rank=4), "bf16"),
        (PeftMethod(kind="peft", type="LN_TUNING"), "bf16"),
        (PeftMethod(kind="peft", type="LN_TUNING"), "fp16"),
        (PeftMethod(kind="peft", type="VERA", adapter_dtype="bfloat16"), "bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{getattr(value, 'adapter_dtype', '')}",
)
def test_a_saved_run_gives_the_logits_of_the_model_in_memory(root, tmp_path, kind, method, precision):
    run = run_of(kind, method, precision=precision, seed=3)
    model = trained(root, run)
    before = logits(model, run)
    assert not torch.equal(before, logits(load(root, run), run))
    save_weights(model, run, root / MODELS[kind], tmp_path / "weights", WORLD)
    again = load_trained(run, root / MODELS[kind], tmp_path / "weights", num_labels=2, device="cpu").eval()
    assert torch.equal(logits(again, run), before)
    assert not again.training
    stored = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert stored[name].dtype == parameter.dtype
            assert torch.equal(stored[name], parameter)


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
def test_answers_behind_virtual_tokens_do_not_depend_on_batches_or_processes(root, tmp_path, peft_type):
    method = PeftMethod(kind="peft", type=peft_type, parameters={"num_virtual_tokens": 5})
    run = run_of(method=method, evaluation_batch_size=1)
    save_weights(trained(root, run), run, root / "qwen2", tmp_path / "weights", WORLD)
    _, alone = evaluated(root, run, tmp_path / "weights")
    assert len({prediction.output for prediction in alone}) > 1
    shares = shares_of(root, run_of(method=method, evaluation_batch_size=13), tmp_path / "weights", processes=2)
    assert combine(shares, load_tokens(root / "generation"))[1] == alone


def test_a_saved_run_is_evaluated_without_the_model_in_memory(root, tmp_path):
    run = run_of("classification", LoraMethod(kind="lora", rank=4))
    save_weights(trained(root, run), run, root / "distilbert", tmp_path / "weights", WORLD)
    summary, predictions = evaluated(root, run, tmp_path / "weights")
    assert summary["n"] == len(predictions) == 13


# --- files ------------------------------------------------------------------------------------------------


def to_files(
    root: Path, folder: Path, run: Run, *, attempts_left: int = 0, **outcome: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    write_json(folder / "outcome.json", {"digest": run.training_digest, "outcome": "ok"} | outcome)
    evaluate_to_files(
        run,
        device="cpu",
        model=root / MODELS[run.task_kind],
        tokens=root / run.task_kind,
        outcome=folder / "outcome.json",
        weights=folder / "weights",
        evaluation=folder / "evaluation.json",
        predictions=folder / "predictions.jsonl",
        attempts_left=attempts_left,
    )
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return read_json(folder / "evaluation.json"), rows


def test_evaluation_files_of_two_processes_replace_those_of_a_failure(root, tmp_path):
    run = run_of(evaluation_batch_size=4, gpus=2)
    first, _ = to_files(root, tmp_path, run, outcome="oom")
    assert first["outcome"] == "skipped"
    result, rows = to_files(root, tmp_path, run)
    assert result["processes"] == 2
    assert rows == [asdict(prediction) for prediction in evaluated(root, run)[1]]
    assert {path.name for path in tmp_path.iterdir()} == {"outcome.json", "evaluation.json", "predictions.jsonl"}
    assert (result["run"], result["outcome"], result["reason"]) == ("r", "ok", None)
    assert (result["digest"], result["training_digest"]) == (run.evaluation_digest, run.training_digest)
    assert result["n"] == len(rows) == 13
    assert set(rows[0]) == {
        "id", "prompt", "reference", "output", "extracted_strict", "extracted_flexible", "correct", "correct_flexible",
        "malformed", "truncated",
    }  # fmt: skip


@pytest.mark.parametrize("outcome", ["oom", "timeout", "error", "invalid", "unsupported"])
def test_a_failed_training_is_not_evaluated_and_says_so(root, tmp_path, outcome):
    result, rows = to_files(root, tmp_path, run_of(), outcome=outcome)
    assert (result["outcome"], result["reason"]) == ("skipped", f"the training ended with outcome {outcome}")
    assert rows == []
    assert "accuracy" not in result


def test_weights_of_another_configuration_are_not_evaluated(root, tmp_path):
    result, rows = to_files(root, tmp_path, run_of(), digest="0" * 16)
    assert result["outcome"] == "error"
    assert result["reason"] == f"{tmp_path / 'outcome.json'} is of another configuration: train the run again"
    assert rows == []


def test_a_failure_is_a_result_with_its_reason(root, tmp_path, capsys):
    result, rows = to_files(root, tmp_path, run_of(method=FullMethod(kind="full")))  # there are no weights
    assert result["outcome"] == "error"
    assert str(tmp_path / "weights") in result["reason"]
    assert "Traceback" in result["traceback"]
    assert "Traceback" in capsys.readouterr().out
    assert rows == []


FAILING = """
import os, signal, sys, time
from pathlib import Path
work, rank, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(work.parent / f"pid{rank}").write_text(str(os.getpid()))
(work / f"heartbeat.rank{rank}").write_text(f"{7 + rank} forward")
while not (work.parent / "pid0").exists():
    time.sleep(0.01)
if rank == 1 and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3600)
"""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("killed", "process 1: the evaluating process was ended by SIGKILL (the system may have run out of memory)"),
        ("hang", "process 0: no answer for 0.5 s, in batch 7 of this process"),
    ],
)
def test_a_process_that_dies_or_hangs_ends_the_evaluation_with_its_reason(root, tmp_path, monkeypatch, how, reason):
    def command(work, device, rank, count, folders):
        return [sys.executable, "-c", FAILING, str(work), str(rank), how]

    monkeypatch.setattr(evaluation, "_command", command)
    monkeypatch.setattr(evaluation, "STALL_LIMIT_S", 0.5)
    started = time.monotonic()
    result, rows = to_files(root, tmp_path, run_of(gpus=2))
    assert time.monotonic() - started < 10
    assert (result["outcome"], result["reason"], rows) == ("error", reason, [])
    for rank in (0, 1):
        assert not psutil.pid_exists(int((tmp_path / f"pid{rank}").read_text()))


def test_a_process_killed_for_want_of_memory_is_tried_again_while_there_is_another_attempt(root, tmp_path, monkeypatch):
    die = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(evaluation, "_command", lambda *_: [sys.executable, "-c", die])
    kills = itertools.count()
    monkeypatch.setattr(evaluation, "oom_kills", lambda: next(kills))
    with pytest.raises(HostMemoryError, match=r"host memory.*; 1 more attempts"):
        to_files(root, tmp_path, run_of(), attempts_left=1)
    assert not (tmp_path / "evaluation.json").exists()
    result, rows = to_files(root, tmp_path, run_of())
    reason = "host memory: the system ended a process for want of it"
    assert (result["outcome"], result["reason"], rows) == ("error", reason, [])
    monkeypatch.setattr(evaluation, "oom_kills", lambda: 0)  # somebody else's SIGKILL
    assert "SIGKILL" in to_files(root, tmp_path, run_of(), attempts_left=1)[0]["reason"]


def test_a_process_that_hears_of_a_stop_before_its_launcher_leaves_no_result(root, tmp_path, monkeypatch):
    """As when a scheduler ends all processes of a job: the evaluation is made at the next start."""
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(evaluation, "_command", lambda *_: [sys.executable, "-c", stop])
    with pytest.raises(SystemExit, match="143"):
        to_files(root, tmp_path, run_of())
    assert not (tmp_path / "evaluation.json").exists()
