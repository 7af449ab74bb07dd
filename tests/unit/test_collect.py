"""Collecting a made-up results tree: one row per planned run, however it ended, and comparisons to be believed."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from tunemap import collect
from tunemap.errors import UserError

SPEC = importlib.util.spec_from_file_location("fake_results", Path(__file__).parent / "report" / "fake_results.py")
fake_results = importlib.util.module_from_spec(SPEC)
sys.modules["fake_results"] = fake_results  # dataclasses look their module up
SPEC.loader.exec_module(fake_results)

LORA = "tiny.arithmetic.lora.seed-0"
REQUIRED = (
    *("run", "experiment", "model", "dataset", "method", "rank", "strategy", "gpus", "seed", "outcome", "reason"),
    *("tokens_per_second", "samples_per_second", "step_time_median_s", "step_time_p95_s", "peak_allocated_bytes"),
    *("train_loss", "accuracy", "accuracy_low", "accuracy_high", "trainable_parameters"),
)


@pytest.fixture
def fake(tmp_path):
    return fake_results.write(tmp_path, seeds=2, examples=40)


def collected(fake):
    return collect.collect(fake.plan_path, fake.results_dir)


def row(tables, run):
    return tables.runs.set_index("run").loc[run]


def tripped_gates(tables, gate):
    return tables.gates[(tables.gates["gate"] == gate) & (tables.gates["passed"] == False)]  # noqa: E712


def compared(tables, point, experiment="methods"):
    rows = tables.comparisons[(tables.comparisons["point"] == point) & (tables.comparisons["experiment"] == experiment)]
    assert len(rows) == 1
    return rows.iloc[0]


# --- runs.csv ---------------------------------------------------------------------------------------------


def test_every_planned_run_is_a_row_in_the_plans_order(fake):
    runs = collected(fake).runs
    assert runs["run"].tolist() == list(fake.plan["runs"])
    assert set(REQUIRED) | set(collect.MEASUREMENTS) | set(fake_results.FACTORS) <= set(runs)
    assert runs["outcome"].value_counts().to_dict() == {"ok": 13, "unsupported": 2, "oom": 1, "invalid": 1}


def test_a_run_of_two_experiments_is_one_row(fake):
    tables = collected(fake)
    assert row(tables, LORA)["experiment"] == "methods;ranks"
    assert tables.experiments[tables.experiments["run"] == LORA]["experiment"].tolist() == ["methods", "ranks"]


def test_parameters_of_a_peft_type_are_one_column(fake):
    plan = fake.plan
    plan["runs"][LORA]["method"] = {"kind": "peft", "type": "LORA", "parameters": {"r": 3}}
    fake.plan_path.write_text(json.dumps(plan))
    fake.build(fake.results_dir / "report.html")
    assert row(collect.read_tables(fake.results_dir / "tables"), LORA)["method.parameters"] == '{"r": 3}'


def test_a_missing_result_is_a_row(fake):
    fake.outcome(LORA).unlink()
    missing = row(collected(fake), LORA)
    assert missing["outcome"] == "missing"
    assert str(fake.outcome(LORA)) in missing["reason"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"run": ', "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"outcome": "great"}', "allowed: ok, oom"),
        ("\xff", "JSON"),
    ],
)
def test_a_broken_result_is_a_row_with_the_reason(fake, content, expected):
    fake.outcome(LORA).write_text(content, encoding="latin-1")
    broken = row(collected(fake), LORA)
    assert broken["outcome"] == "error"
    assert expected in broken["reason"]


def test_a_result_without_a_digest_is_not_trusted(fake):
    document = json.loads(fake.outcome(LORA).read_text())
    del document["digest"]
    fake.outcome(LORA).write_text(json.dumps(document))
    assert "has no digest" in row(collected(fake), LORA)["reason"]


@pytest.mark.parametrize("key", ["digest", "training_digest"])
def test_a_foreign_evaluation_is_refused(fake, key):
    fake.edit(fake.evaluation(LORA), **{key: "0123456789abcdef"})
    with pytest.raises(UserError, match=f"run {LORA}: .*evaluation.json: {key} is 0123456789abcdef, the plan's is"):
        collected(fake)


def test_a_foreign_result_is_refused_with_both_digests_and_advice(fake):
    fake.edit(fake.outcome(LORA), digest="0123456789abcdef")
    with pytest.raises(UserError) as error:
        collected(fake)
    for part in (LORA, "0123456789abcdef", fake.plan["runs"][LORA]["digest"], "Run the workflow again"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no "),
        (lambda path: path.write_text('{"id": "a"}\n'), "line 1"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()), "not UTF-8"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
        (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), "evaluation.json says"),
        (lambda path: path.write_text(path.read_text() * 2), "a second time"),
    ],
)
def test_predictions_that_do_not_fit_the_evaluation_give_no_accuracy(fake, damage, reason):
    damage(fake.evaluation(LORA).parent / "predictions.jsonl")
    found = row(collected(fake), LORA)
    assert (found["outcome"], found["evaluation_outcome"]) == ("ok", "error")
    assert reason in found["evaluation_reason"]
    assert found["accuracy"] is None


def test_numbers_survive_the_csv(fake):
    collect.write_tables(fake.plan_path, fake.results_dir)
    runs = collect.read_tables(fake.results_dir / "tables").runs.set_index("run")
    measured = json.loads(fake.outcome(LORA).read_text())["measurements"]
    for name in ("tokens_per_second", "peak_allocated_bytes", "train_loss", "steps"):
        assert runs.loc[LORA, name] == measured[name]
    text = (fake.results_dir / "tables" / "runs.csv").read_text()
    assert f",{measured['peak_allocated_bytes']}," in text  # a whole number stays one
    assert (fake.results_dir / "tables" / "points.tex").read_text().count(r"\\") > 10


def test_tables_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"runs\.csv.*make the tables first"):
        collect.read_tables(tmp_path)


def test_a_missing_curve_trips_a_gate_not_the_collecting(fake):
    (fake.outcome(LORA).parent / "steps.csv").unlink()
    gates = collected(fake).gates
    assert gates[(gates["gate"] == "steps_file") & (gates["subject"] == LORA)]["passed"].tolist() == [False]


# --- gates ------------------------------------------------------------------------------------------------


def measure(fake, run, **measurements):
    document = json.loads(fake.outcome(run).read_text())
    fake.edit(fake.outcome(run), measurements=document["measurements"] | measurements)


@pytest.mark.parametrize(("value", "outcome"), [(0.42, "ok"), (1.0, "ok"), (1.3, "invalid"), (0.0, "invalid")])
def test_no_device_does_more_than_its_peak(fake, value, outcome):
    measure(fake, LORA, mfu_datasheet=value)
    assert row(collected(fake), LORA)["outcome"] == outcome


@pytest.mark.parametrize(("error", "passed"), [(1.05, True), (1.2, False), (0.8, False)])
def test_predicted_memory_must_be_close(fake, error, passed):
    peak = json.loads(fake.outcome(LORA).read_text())["measurements"]["peak_allocated_bytes"]
    measure(fake, LORA, predicted_peak_bytes=peak * error)
    gates = collected(fake).gates
    assert gates[gates["gate"] == "memory_prediction"]["passed"].tolist() == [passed]
    assert row(collected(fake), LORA)["outcome"] == "ok"


def test_an_adapter_that_is_too_fast_trips_the_bound(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=40, failures=False)
    assert tripped_gates(collected(fake), "speed_up_bound").empty
    for seed in (0, 1):
        measure(fake, f"tiny.arithmetic.lora.seed-{seed}", tokens_per_second=187_000.0 + seed)
    tripped = tripped_gates(collected(fake), "speed_up_bound")
    assert tripped["subject"].tolist() == ["lora"]
    assert "3.6" in tripped["message"].iloc[0]


def test_a_fatal_gate_makes_a_run_invalid_and_keeps_its_numbers(fake):
    fake.edit(fake.outcome(LORA), gates=[{"gate": "order", "passed": False, "fatal": True, "message": "another order"}])
    tables = collected(fake)
    assert row(tables, LORA)["outcome"] == "invalid"
    assert row(tables, LORA)["tokens_per_second"] > 0
    lora = tables.points[(tables.points["point"] == "lora") & (tables.points["experiment"] == "methods")].iloc[0]
    assert (lora["seeds"], lora["runs"]) == (1, 2)


def test_a_ratio_without_interval_trips_the_interval_gate(tmp_path):
    tables = collected(fake_results.write(tmp_path, seeds=1, examples=40, failures=False))
    assert len(tripped_gates(tables, "interval")) == len(tables.gates.query("gate == 'interval'")) == 7
    assert set(tables.comparisons["throughput_verdict"].dropna()) == {"no interval"}
    assert tables.points["front"].isna().all()


# --- points and comparisons -------------------------------------------------------------------------------


def test_points_join_seeds_and_nothing_else(fake):
    points = collected(fake).points
    assert points[points["experiment"] == "methods"]["point"].tolist() == [
        *("base", "full", "full · gradient checkpointing", "lora", "lora · gradient checkpointing"),
        *("qlora", "qlora · gradient checkpointing"),
    ]
    assert points[points["experiment"] == "ranks"]["point"].tolist() == [
        "base",
        *(f"lora · rank {r}" for r in (2, 8, 32)),
    ]


def test_point_means_are_those_of_its_runs(tmp_path):
    tables = collected(fake_results.write(tmp_path, seeds=3, examples=40, failures=False))
    point = tables.points[(tables.points["point"] == "qlora")].iloc[0]
    runs = tables.runs[tables.runs["run"].str.startswith("tiny.arithmetic.qlora.seed")]
    assert point["tokens_per_second"] == pytest.approx(runs["tokens_per_second"].astype(float).mean())
    assert point["accuracy"] == pytest.approx(runs["accuracy"].astype(float).mean())
    assert point["accuracy_low"] < runs["accuracy"].min() + 0.1


def test_each_point_is_compared_with_the_baseline_method(fake):
    comparisons = collected(fake).comparisons
    assert set(comparisons[comparisons["experiment"] == "methods"]["baseline"]) == {"full"}
    assert set(comparisons[comparisons["experiment"] == "ranks"]["baseline"]) == {"lora · rank 2"}


def test_a_methods_own_learning_rate_is_allowed_and_named(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=40, failures=False)
    lora = compared(collected(fake), "lora")
    assert lora["refused"] is None
    assert "learning_rate (0.005 against 0.001)" in lora["caveat"]


def edit_plan(fake, change):
    plan = fake.plan
    change(plan)
    fake.plan_path.write_text(json.dumps(plan))


def test_a_comparison_refuses_other_batches(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=40, failures=False)

    def change(plan):
        for seed in (0, 1):
            plan["runs"][f"tiny.arithmetic.lora.seed-{seed}"]["factors"]["per_device_batch_size"] = 32

    edit_plan(fake, change)
    tables = collected(fake)
    lora = compared(tables, "lora")
    assert "per_device_batch_size (32 against 8)" in lora["refused"]
    assert lora["throughput_ratio"] is None
    assert lora["verdict"].startswith("not compared")
    assert "lora" in tripped_gates(tables, "equal_factors")["subject"].tolist()


def test_a_comparison_refuses_other_versions(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=40, failures=False)
    environment = json.loads(fake.outcome(LORA).read_text())["environment"]
    fake.edit(fake.outcome(LORA), environment=environment | {"packages": {"torch": "9.9", "peft": "0.0"}})
    assert "packages.torch (9.9 against 0.0)" in compared(collected(fake), "lora")["refused"]


def test_a_comparison_refuses_another_order_of_examples(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=40, failures=False)
    measure(fake, LORA, data_order_hash="shuffled")
    assert "order of the training examples of seed 0" in compared(collected(fake), "lora")["refused"]


def test_equal_points_are_not_distinguishable(tmp_path):
    fake = fake_results.write(tmp_path, seeds=3, examples=200, failures=False)
    row = compared(collected(fake), "lora · rank 8", "ranks")
    assert row["throughput_verdict"] == "not distinguishable"
    assert "not distinguishable" in row["verdict"]
    assert compared(collected(fake), "base")["accuracy_verdict"] == "lower"


def test_a_thousand_runs_take_seconds(tmp_path):
    ranks = tuple(range(1, 332))
    fake = fake_results.write(tmp_path, seeds=3, ranks=ranks, examples=20)
    assert len(fake.plan["runs"]) > 1000
    start = time.process_time()
    collect.write_tables(fake.plan_path, fake.results_dir)
    assert time.process_time() - start < 30
