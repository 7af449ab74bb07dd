"""Published tables, figures and numbers: like with like only, refusals with their reason, names that are kept."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from tests.unit.report import fake_results
from tunemap.collect import collect
from tunemap.report import figures, published_figures
from tunemap.report.formats import records
from tunemap.report.published_figures import FIGURES
from tunemap.report.published_numbers import FILE, MEASURES, _compared, _run_means, compare_published, read_numbers
from tunemap.report.published_tables import Source, page_tables

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["nyu", "columbia", "rtx"])
def study(request, tmp_path):
    """A made-up study that asks for the tables of a published one."""
    fake = fake_results.write(tmp_path)
    plan = fake.plan
    plan["report"]["published"] = request.param
    fake.plan_path.write_text(json.dumps(plan))
    return request.param, fake


def test_every_published_number_has_a_trust_and_known_flaws():
    numbers = [row for study in ("nyu", "columbia", "rtx") for row in read_numbers(study)]
    assert len(numbers) == 202
    assert {row["trust"] for row in numbers} == set("ABCDX")
    assert all(re.fullmatch(r"(F\d\d(;F\d\d)*)?", row["flaw"]) for row in numbers)
    assert FILE.is_relative_to(REPOSITORY / "resources")


def test_each_number_is_compared_or_refused_with_a_reason(study):
    name, fake = study
    found = collect(fake.plan_path, fake.results_dir)
    rows = records(found.published)
    assert len(rows) == len(read_numbers(name))
    assert all((row["ratio"] is None) == (row["not_compared"] is not None) for row in rows)
    assert all(row["not_compared"] for row in rows)  # a tiny model on a CPU is like no publication


def test_tables_and_figures_of_the_publication_are_in_the_page(study, monkeypatch):
    monkeypatch.setattr(figures, "KINDS", {})  # what every study has is drawn in other tests
    name, fake = study
    fake.build(fake.results_dir / "report.html")
    tables = page_tables(records(collect(fake.plan_path, fake.results_dir).published_tables))
    page = (fake.results_dir / "report.html").read_text()
    assert tables
    assert all(table.title in page for table in tables)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    drawn = {one["name"] for one in json.loads((fake.results_dir / "figures" / "figures.json").read_text())}
    assert drawn & set(FIGURES[name])


def with_ends(tmp_path, method, ended, seconds):
    """A study of which the seeds of a method ended so, each with its time per 10k tokens; and its cells by column."""
    fake = fake_results.write(tmp_path, seeds=len(ended), examples=20, failures=False)
    fake.plan_path.write_text(json.dumps(fake.plan | {"report": fake.plan["report"] | {"published": "rtx"}}))
    for seed, (outcome, value) in enumerate(zip(ended, seconds, strict=True)):
        path = fake.outcome(f"tiny.arithmetic.{method}.seed-{seed}")
        measurements = json.loads(path.read_text())["measurements"] | {"seconds_per_10k_tokens": value}
        fake.edit(path, outcome=outcome, reason=f"it ended {outcome}", measurements=measurements)
    cells = records(collect(fake.plan_path, fake.results_dir).published_tables)
    return {one["column"]: one for one in cells if one["row"] == f"methods: {method}"}


def test_a_cell_is_the_mean_of_the_runs_that_ended_ok(tmp_path):
    cells = with_ends(tmp_path, "lora", ("ok", "invalid", "ok"), (1.0, 100.0, 2.0))
    assert cells["Time per 10k tokens, s"]["value"] == 1.5
    assert cells["Time per 10k tokens, s"]["runs"] == "2 of 3"


def test_a_point_without_a_run_that_ended_ok_has_its_reason_for_a_number(tmp_path):
    cells = with_ends(tmp_path, "lora", ("invalid", "oom"), (100.0, 200.0))
    assert {one["value"] for one in cells.values()} == {None}
    assert {one["text"] for one in cells.values()} == {"it ended invalid"}


def test_a_gate_of_a_comparison_stands_beside_its_own_experiment_alone(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=20, failures=False)
    plan = fake.plan
    plan["experiments"][1] = plan["experiments"][0] | {"name": "again"}
    fake.plan_path.write_text(json.dumps(plan))
    tables = collect(fake.plan_path, fake.results_dir)
    tripped = {"scope": "comparison", "experiment": "methods", "subject": "lora", "gate": "interval", "passed": False}
    source = Source(plan, records(tables.points), records(tables.runs), records(tables.comparisons), [tripped])
    fails = {point["experiment"]: source.fails(point) for point in source.points if point["point"] == "lora"}
    assert fails == {"methods": "interval", "again": ""}


@pytest.mark.parametrize(("ends", "drawn"), [(("ok", "ok"), 0), (("invalid", "ok"), 1), (("oom", "oom"), None)])
def test_a_loss_curve_is_of_a_run_that_ended_ok(monkeypatch, ends, drawn):
    class Runs:
        def ok_runs_of(self, method):
            runs = [{"run": f"{method}-{seed}", "outcome": end} for seed, end in enumerate(ends)]
            return [run for run in runs if run["outcome"] == "ok"]

    monkeypatch.setattr(published_figures, "single_device_methods", lambda source: {"LoRA": "lora", "GoRA": "gora"})
    names = [f"{method}-{seed}" for method in ("lora", "gora") for seed in (0, 1) for _ in range(3)]
    losses = pd.DataFrame({"run": names, "step": [1, 2, 3] * 4, "loss": 1.0})
    curves = published_figures._curves(Runs(), losses)
    found = {name: set(curve["run"]) for name, curve in curves.items()}
    assert found == ({} if drawn is None else {"LoRA": {f"lora-{drawn}"}, "GoRA": {f"gora-{drawn}"}})


def test_a_study_of_its_own_has_no_published_tables(tmp_path):
    fake = fake_results.write(tmp_path)
    found = collect(fake.plan_path, fake.results_dir)
    assert found.published.empty
    assert found.published_tables.empty


# --- like with like ---------------------------------------------------------------------------------------

PLAN = {
    "runs": {
        "r": {"model_name": "qwen", "model": {"source": "hub", "id": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "main"}}
    }
}
POINT = {
    "experiment": "e", "point": "lora", "model": "qwen", "method_kind": "lora", "strategy": "single", "gpus": 1,
    "rank": 16, "gradient_checkpointing": False, "per_device_batch_size": 8, "max_length": 512, "precision": "bf16",
    "method.target_modules": "all-linear", "device": "NVIDIA A100-SXM4-40GB", "optimizer": "adamw",
    "peak_allocated_bytes": 25_000 * 2**20, "trainable_parameters": 18_464_768, "tokens_per_second": 9000.0,
    "metric": "exact_match_strict", "examples": 1319, "accuracy": 0.6,
}  # fmt: skip


def compared(number: str, **changes):
    published = next(row for row in read_numbers("nyu") if row["id"] == number)
    return _compared(published, PLAN, [POINT | changes], {("e", "lora"): {}})


def test_like_is_compared_with_ratio_and_residual():
    row = compared("N013")  # peak memory of LoRA at batch 8, 512 tokens, on an A100 of 40 GB: 24,988.9 MiB
    assert row["ratio"] == pytest.approx(25_000 / 24_988.9)
    assert row["residual"] == pytest.approx(11.1)
    assert (row["trust"], row["flaw"], row["not_compared"]) == ("A", "F02", None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"per_device_batch_size": 2}, "per_device_batch_size: 2, published: 8"),
        ({"max_length": 640}, "max_length: 640, published: 512"),
        ({"precision": "fp32"}, "precision: fp32, published: bf16"),
        ({"device": "NVIDIA H200"}, "GPU: NVIDIA H200, published: A100-40GB"),
        ({"gpus": 2}, "gpus: 2, published: 1"),
        ({"method_kind": "full"}, "no point of this method in the study"),
    ],
)
def test_unlike_is_refused_with_the_reason(changes, reason):
    assert compared("N013", **changes)["not_compared"] == reason


def test_parameters_depend_on_the_method_alone():
    row = compared("N007", per_device_batch_size=2, device="a CPU", precision="fp32", max_length=64)
    assert row["ratio"] == 1.0
    assert compared("N007", rank=8)["not_compared"] == "rank: 8, published: 16"


def test_other_definitions_and_contradicted_numbers_are_refused():
    assert compared("N012")["not_compared"].startswith("definition: mean over an epoch on one rank")
    assert compared("N025")["not_compared"].startswith("definition: one sampled kernel")
    assert "exact_match_strict, published: exact_match_hpml" in compared("N011")["not_compared"]
    assert "answers of 1319 rows, published: 374" in compared("N011")["not_compared"]


def test_ours_is_the_mean_of_all_runs_that_ended_ok(tmp_path):
    fake = fake_results.write(tmp_path, seeds=3, examples=20, failures=False)
    for seed, outcome in enumerate(("ok", "invalid", "ok")):
        path = fake.outcome(f"tiny.arithmetic.lora.seed-{seed}")
        measurements = json.loads(path.read_text())["measurements"] | {"step_time_mean_s": 1.0 + seed}
        fake.edit(path, outcome=outcome, measurements=measurements)
    means = _run_means(fake.plan, records(collect(fake.plan_path, fake.results_dir).runs))
    assert means["methods", "lora"]["step_time_mean_s"] == 2.0
    assert "end_allocated_bytes" not in means["methods", "lora"]  # no run has it


def test_every_measure_is_of_a_published_metric():
    known = {(row["seed"], row["metric"]) for study in ("nyu", "columbia", "rtx") for row in read_numbers(study)}
    assert set(MEASURES) <= known


def test_without_a_publication_nothing_is_compared():
    assert compare_published({"report": {}}, [], []) == []
