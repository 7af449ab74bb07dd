"""Whole runs on a CUDA device, whose losses must be those of the same run on the CPU; skipped where there is none."""

import csv
import io
from collections import defaultdict

import pytest
import torch

from tests.unit.training.conftest import run_once
from tunemap.measure import ceiling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

METHODS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "gora": {"kind": "gora", "reference_rank": 4, "estimation_batches": 2, "estimation_batch_size": 8},
}
ROUNDING = {"fp32": 1e-3, "bf16": 3e-2, "pure_bf16": 1e-1}  # relative difference of a loss after 8 steps


@pytest.fixture
def train(prepared, tmp_path_factory):
    """Launch a run on the device that is named, in a folder of its own; returns what it left."""

    def launched(method, *, device, **options):
        ended = run_once(prepared, tmp_path_factory.mktemp(device), method, device=device, **options)
        assert ended.outcome["outcome"] == "ok", ended.outcome["traceback"] or ended.outcome["reason"]
        assert ended.outcome["environment"]["device"].startswith(device)
        return ended

    return launched


def losses(ended):
    """Mean loss of a label token at each step, over all processes."""
    sums = defaultdict(lambda: [0.0, 0])
    for row in csv.DictReader(io.StringIO(ended.steps)):
        tokens = int(row["label_tokens"])
        sums[row["step"]][0] += float(row["loss"]) * tokens
        sums[row["step"]][1] += tokens
    return [total / tokens for total, tokens in sums.values()]


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_the_cpu(train, name, precision):
    # In a model so small float32 adapters are more than gate `autocast` lets pass.
    of_adapters = {"adapter_dtype": "bfloat16"} if precision == "pure_bf16" and name != "full" else {}
    method, factors = METHODS[name] | of_adapters, {"precision": precision, "learning_rate": 1e-3}
    on_gpu, on_cpu = (losses(train(method, device=device, **factors)) for device in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=ROUNDING[precision])


@pytest.mark.parametrize("factors", [{"compile": True}, {"logits": "label_tokens"}, {"batching": "packed"}], ids=str)
def test_settings_for_speed_keep_the_loss(train, factors):
    plain = {"batching": factors.get("batching", "longest"), "learning_rate": 1e-3}
    on_cpu = losses(train(METHODS["full"], device="cpu", **plain))
    on_gpu = losses(train(METHODS["full"], device="cuda", **plain | factors))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_a_device_has_peaks_and_a_share_of_its_ceiling(train, tmp_path):
    ceilings = tmp_path / "ceilings.json"
    ceiling.store(ceilings, "cuda:0", ceiling.measure_ceiling("cuda:0", "bfloat16"))
    ended = train(METHODS["full"], device="cuda", precision="bf16", ceilings=ceilings)
    measured = ended.measurements
    assert 0 < measured["peak_allocated_bytes"] <= measured["peak_reserved_bytes"]
    assert 0 < measured["mfu_measured"] < 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_train_what_one_trains(train, strategy):
    one = losses(train(METHODS["full"], device="cuda", learning_rate=1e-3))
    two = losses(
        train(METHODS["full"], device="cuda", learning_rate=1e-3, strategy=strategy, gpus=2, per_device_batch_size=2)
    )
    assert two == pytest.approx(one, rel=1e-3)
