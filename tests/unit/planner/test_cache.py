"""Keys of accounts, predictions from them, and the record of predicted against measured."""

import csv
from pathlib import Path

import numpy as np
import pytest

from tunemap.config import DatasetConfig, Factors, TinyModel
from tunemap.files import read_json, write_json
from tunemap.frozen import freeze
from tunemap.hardware import load_hardware
from tunemap.planner import cache, calibration, device, plan
from tunemap.planner.cache import NoAccount, account_key, known_prediction, predict, write_account
from tunemap.planner.data import data_of
from tunemap.planner.device import Target
from tunemap.planner.plan import described_gpus, on_gpus
from tunemap.planner.prediction import ON_GPUS, Account, BatchShape, Work
from tunemap.run import Run
from tunemap.study_file import load_plan

GIB = 1 << 30
STUDY_ON_A_CPU = """\
study: small
hardware: {device: cpu}
models: {tiny: {source: tiny}}
datasets: {sums: {task: arithmetic, source: made}}
methods: {lora: {kind: lora}}
defaults: {model: tiny, dataset: sums, max_steps: 20}
experiments:
  - {name: e, question: Which, fixed: {method: lora}}
"""


def make_run(method=None, **factors) -> Run:
    return Run.model_validate(
        {
            "id": "run",
            "model_name": "tiny",
            "model": TinyModel(source="tiny"),
            "dataset_name": "sums",
            "dataset": DatasetConfig(task="arithmetic", source="made"),
            "method_name": "lora",
            "method": method or {"kind": "lora"},
            "prompt_template": None,
            "factors": Factors(**({"max_steps": 10} | factors)),
        }
    )


def account(peak_bytes=GIB, **changes) -> Account:
    work = Work({"bfloat16": 10**13}, {"bfloat16": 10**11}, 10**9, 10**8, 10**10, 500)
    values = {
        "batch": BatchShape(8, 512, True), "peak_bytes": peak_bytes, "peak_phase": "backward",
        "breakdown_bytes": {"parameters": peak_bytes}, "phase_peak_bytes": {"backward": peak_bytes},
        "estimation_peak_bytes": None, "weights_bytes": peak_bytes // 2, "dequantised_bytes": 0, "gathered_bytes": 0,
        "total_parameters": 100, "trainable_parameters": 10, "work": work, "optimizer": Work(other_bytes=10**8),
        "collectives": (), "notes": (), "seconds": 1.0,
    }  # fmt: skip
    return Account(**values | changes)


def key(run: Run, tmp_path, on_gpu=False) -> str:
    return account_key(run, data_of(run, tmp_path), on_gpu=on_gpu)


@pytest.mark.parametrize("factors", [{"seed": 3}, {"learning_rate": 0.5}, {"max_steps": 99}, {"max_new_tokens": 5}])
def test_runs_that_need_the_same_share_an_account(tmp_path, factors):
    assert key(make_run(**factors), tmp_path) == key(make_run(), tmp_path)


@pytest.mark.parametrize(
    "factors", [{"precision": "bf16"}, {"per_device_batch_size": 4}, {"max_length": 64}, {"optimizer": "adamw_8bit"}]
)
def test_what_memory_depends_on_makes_another_account(tmp_path, factors):
    assert key(make_run(**factors), tmp_path) != key(make_run(), tmp_path)
    assert key(make_run({"kind": "lora", "rank": 4}), tmp_path) != key(make_run(), tmp_path)


def test_a_prediction_is_known_once_its_account_is_kept(tmp_path):
    run = make_run()
    assert known_prediction(run, device="cpu", results=tmp_path) is None
    write_account(key(run, tmp_path), account(), tmp_path)
    known = known_prediction(run, device="cpu", results=tmp_path)
    assert known is not None
    assert known.peak_bytes == GIB
    assert known.host_peak_bytes > GIB
    assert 0 < known.seconds_low < known.seconds_high
    write_account(key(run, tmp_path), NoAccount("because"), tmp_path)
    assert known_prediction(run, device="cpu", results=tmp_path) is None


def test_an_unreadable_account_is_made_anew(tmp_path):
    path = tmp_path / cache.PLANS / "x.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"batch": 3}')
    assert cache.read_account("x", tmp_path) is None


def test_an_account_survives_its_file(tmp_path):
    write_account("x", account(), tmp_path)
    assert cache.read_account("x", tmp_path) == account()


@pytest.mark.parametrize(("gib", "verdict"), [(10, "fits"), (22.2, "tight"), (30, "cannot")])
def test_the_verdict_on_a_gpu(tmp_path, gib, verdict):
    target, run = Target.gpu(load_hardware("rtx4090")), make_run()
    found = predict(run, account(int(gib * GIB)), data_of(run, tmp_path), target, results=tmp_path)
    assert found.verdict == verdict
    assert found.fits is (verdict != "cannot")
    assert sum(found.device_breakdown_bytes.values()) == found.device_peak_bytes
    assert bool(found.reason) == (verdict != "fits")


def test_a_step_slower_in_every_way_takes_longer_and_costs_more(tmp_path):
    run, data = make_run(), data_of(make_run(), tmp_path)
    fast, slow = (
        predict(run, account(), data, Target.gpu(load_hardware(name)), results=tmp_path) for name in ("h100", "l4")
    )
    assert fast.step_seconds_low < slow.step_seconds_low
    assert fast.step_seconds_high < slow.step_seconds_high
    assert slow.cost_low < slow.cost_high
    assert slow.energy_joules_high > slow.energy_joules_low > 0


@pytest.mark.parametrize("with_tokens", [False, True])
def test_documents_that_come_in_one_row_are_as_wide_as_all_rows(tmp_path, with_tokens):
    """A step's time is scaled from the widest row to the mean one: neither may be that of one row among four."""
    run = make_run(batching="packed", attention="flash_attention_2", precision="bf16", per_device_batch_size=4)
    if with_tokens:
        folder = tmp_path / "shared" / "tokens" / run.tokens_key
        folder.mkdir(parents=True)
        np.savez(folder / "train.npz", offsets=np.arange(0, 101 * 300, 300), prompt_tokens=np.full(100, 200))
    data = data_of(run, tmp_path)
    assert (data.batch.rows, data.tokenised) == (1, with_tokens)
    assert data.mean_width == data.batch.width == 4 * (300 if with_tokens else 512)


def test_what_cannot_be_accounted_for_says_why(tmp_path):
    run = make_run()
    target = Target.gpu(load_hardware("l4"))
    found = predict(run, NoAccount("looks at contents"), data_of(run, tmp_path), target)
    assert (found.verdict, found.reason, found.fits) == ("unknown", "looks at contents", None)


def test_estimation_counts_where_it_needs_more_than_training():
    target = Target.gpu(load_hardware("l4"))
    parts = device.device_bytes(account(estimation_peak_bytes=2 * GIB), target, devices=1)
    assert parts["tensors"] == 2 * GIB
    assert "NCCL" not in parts
    assert "NCCL" in device.device_bytes(account(), target, devices=2)


def test_a_run_is_planned_on_every_described_gpu(tmp_path):
    run, data, gpus = make_run(), data_of(make_run(), tmp_path), described_gpus()
    there = on_gpus(run, account(4 * GIB), data, gpus, results=tmp_path)
    assert [one["memory_bytes"] for one in there] == sorted(gpu.memory_bytes for gpu in gpus)
    assert len(there) >= 13
    assert on_gpus(run, NoAccount("because"), data, gpus, results=tmp_path) == []


def test_what_a_run_needs_of_gpus_is_not_read_off_the_processors_step(tmp_path, monkeypatch):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY_ON_A_CPU)
    frozen = freeze(load_plan(study), tmp_path / "plans", {})
    made = []

    def make(run, data, target, **_):
        made.append(target.on_gpu)
        return account(3 * GIB if target.on_gpu else GIB)

    monkeypatch.setattr(plan, "make_account", make)
    output, results = tmp_path / "predictions.json", tmp_path / "results"
    plan.predict_to_file(Path(frozen.report_file), tmp_path, output, results=results, progress=lambda done, total: None)
    (prediction,) = (found for found in read_json(output).values() if found["peak_bytes"])
    assert made == [False, True]
    assert prediction["peak_bytes"] == GIB
    assert all(one["device_peak_bytes"] > 3 * GIB for one in prediction[ON_GPUS])


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["cpu"], {}),
        (["NVIDIA H100 80GB HBM3"], {"bfloat16": 5e14}),
        (["cpu", "NVIDIA H100 80GB HBM3", "NVIDIA L4"], {"bfloat16": 5e14}),
        (["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"], {}),  # with unlike clocks, say
    ],
)
def test_a_measured_ceiling_is_that_of_its_own_device(tmp_path, names, known):
    stored = {
        str(place): {"device": name, "ceilings": {"bfloat16": {"flops_per_s": 5e14}}}
        for place, name in enumerate(names)
    }
    write_json(tmp_path / cache.CEILINGS, stored)
    assert cache.measured_ceilings(tmp_path, Target.gpu(load_hardware("h100"))) == known
    on_cpu = cache.measured_ceilings(tmp_path, Target("cpu", on_gpu=False, memory_bytes=GIB, hardware=None))
    assert bool(on_cpu) is ("cpu" in names)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_start_from_data_takes_its_micro_batches(tmp_path, accumulation):
    target = Target.gpu(load_hardware("l4"))
    peft = {"kind": "peft", "estimation_batches": 32}
    plain, eva, gora = (
        predict(run, account(estimation_peak_bytes=estimated), data_of(run, tmp_path), target, results=tmp_path)
        for run, estimated in (
            (make_run(gradient_accumulation=accumulation), None),
            (make_run(peft | {"type": "EVA"}, gradient_accumulation=accumulation), None),
            (make_run({"kind": "gora", "estimation_batches": 32}, gradient_accumulation=accumulation), GIB),
        )
    )
    extra = 32 * plain.step_seconds_low / accumulation
    assert eva.seconds_low - plain.seconds_low == pytest.approx(extra)
    assert gora.seconds_low - plain.seconds_low == pytest.approx(extra)


def test_calibration_replaces_the_rows_of_its_study_alone(tmp_path):
    run, path = make_run(), tmp_path / "calibration.csv"
    prediction = predict(
        run, account(1000), data_of(run, tmp_path), Target("cpu", False, 10**12, None), results=tmp_path
    ).to_dict()

    def row(study: str, measured: int) -> dict:
        return calibration.calibration_row(study, "run", "d", prediction, {"peak_allocated_bytes": measured})

    calibration.update_calibration(path, "a", [row("a", 1000)])
    calibration.update_calibration(path, "b", [row("b", 800)])
    calibration.update_calibration(path, "a", [row("a", 2000)])
    with path.open() as file:
        rows = {one["study"]: one for one in csv.DictReader(file)}
    assert rows["b"]["memory_error"] == "0.25"
    assert rows["a"]["memory_error"] == "-0.5"
    assert rows["a"]["measured_step_s"] == ""
