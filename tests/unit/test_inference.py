"""Inference of finished runs: forms, latencies, and that merging changes the cost and not the answer."""

import json
import os
from contextlib import nullcontext

import pytest
import torch

from tests.unit.report import fake_results
from tunemap import inference
from tunemap.collect import collect
from tunemap.config import FullMethod, LoraMethod
from tunemap.report.extras import inference_row
from tunemap.report.formats import records
from tunemap.training.devices import Devices


def test_latencies_are_summarised():
    found = inference.summary([0.1] * 19 + [0.5], 16)
    assert found["latency_mean_s"] == pytest.approx(0.12)
    assert found["latency_median_s"] == pytest.approx(0.1)
    assert found["latency_p95_s"] == pytest.approx(0.12)
    assert found["units_per_second"] == pytest.approx(16 / 0.12)


def test_warm_up_calls_are_not_timed():
    seen = []
    assert len(inference.timed(seen.append, "cpu")) == inference.REPETITIONS
    assert seen == list(range(inference.WARM_UP + inference.REPETITIONS))


def test_a_form_that_fails_keeps_its_reason(monkeypatch):
    def broken():
        raise RuntimeError("cannot merge")

    run = type("R", (), {})()
    assert inference._measured(broken, run, None, "cpu") == {"reason": "RuntimeError: cannot merge"}


class Echo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, values):
        return self.layer(values)


def test_peak_memory_holds_the_weights():
    model = Echo()
    peak = inference._peak_bytes(model, lambda number: model(torch.ones(1, 64)), "cpu")
    assert peak >= 64 * 65 * 4


@pytest.mark.parametrize(
    ("method", "forms"),
    [
        (FullMethod(kind="full"), ["base", "full", "four_bit"]),
        (LoraMethod(kind="lora"), ["base", "unmerged", "merged", "four_bit"]),
    ],
    ids=["full", "lora"],
)
def test_each_method_has_its_forms(method, forms, tmp_path):
    from tests.unit.test_run import make

    run = make().model_copy(update={"method": method})
    tokens = type("T", (), {"label_names": ()})()
    assert [form for form, _ in inference._forms(run, tmp_path, tmp_path, tokens, "cpu")] == forms


def test_the_leased_device_is_the_one_that_is_measured(monkeypatch, tmp_path):
    from tests.unit.test_run import make

    run = make()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    leased = Devices("cuda", {"CUDA_VISIBLE_DEVICES": "1"})
    monkeypatch.setattr(inference, "lease_devices", lambda *_: nullcontext(leased))
    monkeypatch.setattr(inference, "load_tokens", lambda _: None)
    monkeypatch.setattr(inference, "_forms", lambda *_: [(os.environ["CUDA_VISIBLE_DEVICES"], None)])
    monkeypatch.setattr(inference, "_measured", lambda *_: {})
    (tmp_path / "outcome.json").write_text(json.dumps({"digest": run.training_digest, "outcome": "ok"}))
    folders = dict.fromkeys(("model", "tokens", "weights"), tmp_path)
    output = tmp_path / "inference.json"
    inference.measure_to_file(run, device="auto", outcome=tmp_path / "outcome.json", output=output, **folders)
    assert [form["form"] for form in json.loads(output.read_text())["forms"]] == ["1"]


def test_the_table_names_what_is_missing_and_what_was_skipped(tmp_path):
    fake = fake_results.write(tmp_path)
    plan = fake.plan
    runs = plan["experiments"][0]["runs"][:3]
    plan["experiments"][0]["inferences"] = runs
    fake.plan_path.write_text(json.dumps(plan))
    folder = fake.results_dir / "inference"
    folder.mkdir()
    digests = [plan["runs"][run]["digest"] for run in runs]
    form = {"form": "merged", "reason": None, "peak_allocated_bytes": 2**20, **inference.summary([0.01] * 20, 16)}
    measured = {"training_digest": digests[0], "outcome": "ok", "reason": None, "forms": [form]}
    skipped = {"training_digest": digests[1], "outcome": "skipped", "reason": "the training ended oom", "forms": []}
    (folder / f"{runs[0]}.json").write_text(json.dumps(measured))
    (folder / f"{runs[1]}.json").write_text(json.dumps(skipped))
    rows = records(collect(fake.plan_path, fake.results_dir).inference)
    assert [row["run"] for row in rows] == runs
    assert inference_row(rows[0]).cells == (runs[0], "merged", "10.0", "10.0", "10.0", "1600.0", "1.0")
    assert [inference_row(row).cells[2] for row in rows[1:]] == ["the training ended oom", "missing"]
