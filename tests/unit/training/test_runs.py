"""Real runs of a tiny model: every gate passes, and the columns are what they are defined to be."""

import csv
import io
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import BertConfig, DistilBertConfig, OPTConfig

from tunemap import corpora, models
from tunemap.config import DatasetConfig, RandomModel
from tunemap.data import sources
from tunemap.data.tokens import tokenize
from tunemap.gates.validity import gates
from tunemap.measure import environment
from tunemap.measure.ceiling import Ceiling, store
from tunemap.measure.ranks import PARTS as MEMORY_PARTS

from .conftest import Prepared, run_once

pytestmark = pytest.mark.usefixtures("forked_workers")
RUN_GATES = {  # those that every trained run must have
    *("labels", "truncation", "disjoint", "trainable_parameters", "quantised_layers", "recomputation", "fsdp_units"),
    *("optimizer_state", "attention", "autocast", "compile", "finite_loss", "gradient_norm", "frozen_weights"),
    *("trained_weights", "ranks_disjoint", "batches", "throughput", "training_time", "wall", "flops"),
}

TIMES = {"cpu_share", "wall", "training_time"}  # gates that a machine's other users may trip


def tripped(ended) -> list[str]:
    """Gates that tripped, but for the one that speaks of the machine's other users.

    Where it spoke, and where ranks share cores, seconds may pass between the parts of several processes, and the gates
    on times say so too.
    """
    names = {gate["gate"]: gate["message"] for gate in ended.outcome["gates"] if not gate["passed"]}
    shared = len(ended.outcome["memory_by_rank"]) > 1
    excused = TIMES if "cpu_share" in names or shared else set()
    return [message for name, message in names.items() if name not in excused]


def undisturbed(train, *arguments, **factors):
    """A run, made again once if gates on times alone tripped: a disk that stalls takes half of so short a training."""
    ended = train(*arguments, **factors)
    names = {gate["gate"] for gate in ended.outcome["gates"] if not gate["passed"]}
    if not names or names - TIMES:
        return ended
    shutil.rmtree(ended.paths.work)  # the results that are kept there would be handed over
    return train(*arguments, **factors)


@pytest.mark.parametrize(("first", "runs"), [([], 1), (["training_time"], 2), (["training_time", "flops"], 1)])
def test_a_run_is_made_again_where_its_times_alone_were_disturbed(tmp_path, first, runs):
    made = []

    def train(**factors):
        tripped_now = first if not made else ["training_time"]
        made.append(factors)
        (tmp_path / "work").mkdir()  # fails where the first run's is still there
        gates = [{"gate": name, "passed": False} for name in tripped_now]
        return SimpleNamespace(outcome={"gates": gates}, paths=SimpleNamespace(work=tmp_path / "work"))

    undisturbed(train, max_steps=4)
    assert made == [{"max_steps": 4}] * runs


def rows(ended) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ended.steps)))


@pytest.fixture(scope="module")
def lora(train_once):
    """A LoRA run with recomputation, gradient accumulation and autocast."""
    return undisturbed(
        train_once,
        {"kind": "lora", "rank": 4},
        gradient_checkpointing=True,
        gradient_accumulation=2,
        max_steps=5,
        precision="bf16",
    )


def test_every_gate_passes_in_a_sound_run(lora):
    assert lora.outcome["outcome"] == "ok", lora.outcome["reason"]
    assert {gate["gate"] for gate in lora.outcome["gates"]} >= RUN_GATES | {"adapters", "causality"}
    assert tripped(lora) == []
    assert "computed 8 times in 2 micro-batches" in lora.gate("recomputation")["message"]
    assert "bfloat16" in lora.gate("autocast")["message"]


def test_warm_up_watched_and_tracked_steps_are_not_measured(lora):
    measured = [int(row["measured"]) for row in rows(lora)]
    assert measured[:2] == [0, 0]  # warm-up; the first step is also the watched one
    assert measured[2:].count(0) <= 1  # the tracked step, unless it is one of the first two
    assert lora.measurements["measured_steps"] == sum(measured)


def test_flops_and_throughput_divide_by_the_same_period(lora):
    values = lora.measurements
    measured = [row for row in rows(lora) if row["measured"] == "1"]
    period = sum(float(row["step_time_s"]) + float(row["data_time_s"]) for row in measured) / len(measured)
    assert values["step_period_mean_s"] == pytest.approx(period)
    assert values["model_flops_per_second"] == pytest.approx(values["model_flops_per_step"] / period)
    tokens = sum(int(row["real_tokens"]) for row in measured) / len(measured)
    assert values["tokens_per_second"] == pytest.approx(tokens / period)
    assert values["hardware_flops_per_step"] > 1.2 * values["model_flops_per_step"]  # recomputation


def test_what_a_cpu_cannot_tell_is_empty_and_never_zero(lora):
    for name in ("energy_joules", "power_limit_joules", "peak_reserved_bytes", "driver_process_bytes", "mfu_measured"):
        assert lora.measurements[name] is None


def test_the_fingerprint_is_that_of_the_training_process(lora, prepared):
    found = lora.outcome["environment"]
    assert found["threads"]["torch"] == 1
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert set(found["inputs"]) == {"model", "dataset", "tokens"}


def test_full_fine_tuning_measures_utilisation_against_the_ceiling(train, tmp_path, monkeypatch):
    ceilings = tmp_path / "ceilings.json"
    with monkeypatch.context() as context:  # the ceiling of a CPU belongs to a number of threads, here the run's
        context.setattr(environment, "_compute_threads", lambda: 1)
        store(ceilings, "cpu", Ceiling("float32", 1e12, 512, 2))
    ended = undisturbed(train, {"kind": "full"}, ceilings=ceilings, attention="eager")
    assert ended.outcome["outcome"] == "ok", ended.outcome["reason"]
    assert tripped(ended) == []
    values = ended.measurements
    assert values["mfu_measured"] == pytest.approx(values["model_flops_per_second"] / 1e12)
    assert values["trainable_parameters"] == values["total_parameters"]
    assert ended.gate("attention")["message"] == "attention eager: plain matrix products ran"


def test_qlora_holds_its_base_in_4_bits_and_computes_in_16(train):
    ended = undisturbed(train, {"kind": "qlora", "rank": 2}, optimizer="adamw_8bit", precision="bf16", max_steps=4)
    assert ended.outcome["outcome"] == "ok", ended.outcome["reason"]
    assert tripped(ended) == []
    assert "14 of 14 linear layers" in ended.gate("quantised_layers")["message"]
    assert "100.0% bfloat16" in ended.gate("autocast")["message"]
    assert "Linear4bit" in ended.gate("adapters")["message"]


def test_a_warm_up_that_never_ends_is_refused_before_training(train):
    outcome = train({"kind": "full"}, max_steps=None, epochs=0.5, warmup_steps=5).outcome
    assert (outcome["outcome"], outcome["phase"]) == ("unsupported", "data")
    assert outcome["reason"] == "warmup_steps 5 leaves nothing of the 5 steps that 0.5 epochs come to"


def test_two_ranks_agree(train):
    """With DDP; tests/distributed/test_failures.py looks at FSDP so."""
    ended = train({"kind": "lora", "rank": 2}, strategy="ddp", gpus=2, per_device_batch_size=2, max_steps=4)
    assert ended.outcome["outcome"] == "ok", ended.outcome["reason"]
    assert tripped(ended) == []
    assert ended.gate("fsdp_units")["message"].startswith("0 FSDP")
    assert [record["rank"] for record in ended.outcome["memory_by_rank"]] == [0, 1]
    assert sum(ended.measurements[name] for name in MEMORY_PARTS) == ended.measurements["peak_allocated_bytes"]
    assert "replicas" in {gate["gate"] for gate in ended.outcome["gates"]}


def test_packed_rows_are_computed_without_padding_and_attention_across_documents(train):
    ended = undisturbed(train, {"kind": "lora", "rank": 2}, batching="packed", per_device_batch_size=3, max_steps=4)
    assert ended.outcome["outcome"] == "ok", ended.outcome["reason"]
    assert tripped(ended) == []
    assert {"documents_apart", "flops", "batches"} <= {gate["gate"] for gate in ended.outcome["gates"]}
    assert ended.measurements["padding_waste_share"] == 0
    eager = {"attention": "eager", "per_device_batch_size": 3, "max_steps": 4}
    padded = undisturbed(train, {"kind": "lora", "rank": 2}, batching="packed", **eager)
    assert padded.measurements["padding_waste_share"] > 0
    losses = [[float(row["loss"]) for row in rows(one)] for one in (ended, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tripped(padded) == []


def test_an_encoder_that_is_trained_to_generate_is_invalid(prepared, tmp_path):
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**shape, intermediate_size=32, architectures=["BertLMHeadModel"])
    ended = run_of_another_model(prepared, tmp_path, config)
    assert ended.outcome["outcome"] == "invalid"
    assert "gate causality: gradient of a position's logits with respect to later tokens" in ended.outcome["reason"]
    assert ended.steps


@pytest.mark.parametrize(("attention", "outcome"), [("eager", "invalid"), ("sdpa", "ok")])
def test_packed_rows_of_a_model_that_does_not_heed_positions_are_invalid(prepared, tmp_path, attention, outcome):
    """OPT's mask does not; by document, as sdpa attends on a CPU, it needs none."""
    shape = {"vocab_size": 512, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(**shape, num_attention_heads=2, architectures=["OPTForCausalLM"])
    ended = run_of_another_model(prepared, tmp_path, config, batching="packed", attention=attention)
    assert ended.outcome["outcome"] == outcome
    assert ended.gate("documents_apart")["passed"] is (outcome == "ok")
    assert ended.steps


def test_a_classification_of_texts_that_are_cut_is_invalid(tmp_path):
    shape = {"vocab_size": 512, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    DistilBertConfig(**shape, architectures=["DistilBertForMaskedLM"]).save_pretrained(tmp_path / "config")
    corpora.build_sentiment_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = RandomModel(source="random", config="config", tokenizer="tokenizer")
    dataset = DatasetConfig(task="sst2", source="made", train_rows=40, test_rows=8)
    texts = Prepared(*(tmp_path / name for name in ("model", "rows", "tokens")))
    models.prepare(model, texts.model, data_root=tmp_path)
    sources.prepare(dataset, texts.dataset, data_root=None)
    tokenize(texts.dataset, texts.model, texts.tokens, max_length=4, prompt_template=None, system_prompt=None)
    named = {"model_name": "distilbert", "model": model, "dataset_name": "sst2", "dataset": dataset}
    ended = run_once(texts, tmp_path / "run", {"kind": "full"}, max_length=4, named=named)
    assert ended.outcome["outcome"] == "invalid"
    assert "% of texts are cut at max_length 4" in ended.outcome["reason"]


def run_of_another_model(prepared, folder, config, **factors):
    config.save_pretrained(folder / "config")
    corpora.build_arithmetic_tokenizer().save_pretrained(folder / "tokenizer")
    model = RandomModel(source="random", config="config", tokenizer="tokenizer")
    models.prepare(model, folder / "model", data_root=folder)
    return run_once(replace(prepared, model=folder / "model"), folder / "run", {"kind": "full"}, **factors)


def test_every_gate_name_in_a_result_is_registered(lora):
    registered = {gate.name for gate in gates()}
    assert {gate["gate"] for gate in lora.outcome["gates"]} <= registered
