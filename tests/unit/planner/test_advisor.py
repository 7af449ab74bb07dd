"""What `tunemap advise` recommends, why, what it refuses, and what it writes; accounts are closed forms here."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tunemap import cli
from tunemap.planner import advisor
from tunemap.planner.advise_command import options_table
from tunemap.planner.advisor import advise, collected_accuracy
from tunemap.planner.cache import NoAccount
from tunemap.planner.prediction import Account, BatchShape, Work
from tunemap.study_file import load_plan

GIB = 1 << 30
FIXED_GIB = {"full": 18.0, "lora": 4.0, "gora": 4.5, "qlora": 2.0}
ROW_GIB = {"full": 1.0, "lora": 1.2, "gora": 1.2, "qlora": 1.4}
POSITIONS = 32_768
LENGTH = 512  # whose rows ROW_GIB is for
SLOWER = {"full": 1.0, "lora": 0.8, "gora": 0.8, "qlora": 1.0}


def closed_form(run, rows: float) -> Account:
    """A model of 1.5 billion parameters or so: checkpointing saves memory and costs time, sharding divides."""
    kind, factors = run.method.kind, run.factors
    fixed = FIXED_GIB[kind] / (2 if factors.precision == "pure_bf16" else 1)
    if factors.strategy == "fsdp":
        fixed /= factors.gpus
    per_row = ROW_GIB[kind] / (4 if factors.gradient_checkpointing else 1)
    peak = int((fixed + per_row * rows) * GIB)
    flops = int(1e13 * rows * SLOWER[kind] * (1.4 if factors.gradient_checkpointing else 1))
    collectives = ()
    if factors.gpus > 1:
        sent = {"ddp": GIB, "fsdp": 3 * GIB}[factors.strategy]
        collectives = ({"kind": "all_reduce", "calls": 30, "payload_bytes": sent, "sent_bytes": sent},)
    return Account(
        batch=BatchShape(1, factors.max_length, True), peak_bytes=peak, peak_phase="backward", breakdown_bytes={},
        phase_peak_bytes={}, estimation_peak_bytes=None, weights_bytes=3 * GIB, dequantised_bytes=0, gathered_bytes=0,
        total_parameters=1, trainable_parameters=1, work=Work({"bfloat16": flops, "float16": 0}, kernels=4000),
        optimizer=Work(), collectives=collectives, notes=(), seconds=0.0,
    )  # fmt: skip


@pytest.fixture
def accounts(monkeypatch):
    """Rows of every account that was made."""
    made = []

    def make(run, data, target, *, data_root, results):
        made.append((run.method.kind, run.factors.per_device_batch_size))
        return closed_form(run, run.factors.per_device_batch_size * run.factors.max_length / LENGTH)

    monkeypatch.setattr(advisor, "make_account", make)
    return made


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "max_position_embeddings": POSITIONS})
    )
    return str(tmp_path / "model")


def ask(model, tmp_path, gpu="rtx4090", **options):
    return advise(model, gpu, max_length=LENGTH, results=tmp_path / "results", **options)


def advise_command(model, tmp_path, *options) -> int:
    common = ["advise", "--model", model, "--max-length", str(LENGTH), "--results", str(tmp_path / "results")]
    return cli.main([*common, *options])


def test_the_batch_is_the_largest_power_of_two_that_fits(accounts, model, tmp_path):
    advice = ask(model, tmp_path)
    assert {one.method for one in advice.options} == {"full", "lora", "gora", "qlora"}
    for one in advice.options:
        limit = 24 * GIB * 0.92
        if one.rows:
            assert one.peak_bytes <= limit
            twice = closed_form_peak(one, 2 * one.rows)
            assert one.rows == advisor.MOST_ROWS or twice > limit - 1.5 * GIB  # context and allocator take the rest
        else:
            assert closed_form_peak(one, 1) > limit - 1.5 * GIB


def closed_form_peak(option, rows: int) -> float:
    fixed = FIXED_GIB[option.method] / (2 if option.precision == "pure_bf16" else 1)
    return (fixed + ROW_GIB[option.method] / (4 if option.checkpointing else 1) * rows) * GIB


def test_the_longest_sequence_takes_the_room_of_the_rows(accounts, model, tmp_path):
    for one in ask(model, tmp_path).options:
        assert not one.rows or min(POSITIONS, one.rows * LENGTH) <= one.longest <= POSITIONS
        assert one.rows in (0, advisor.MOST_ROWS) or one.longest < 2 * one.rows * LENGTH


@pytest.mark.parametrize(("budget_gb", "expected"), [(8, range(1025, 24_000)), (60, [POSITIONS])])
def test_the_longest_sequence_beyond_the_most_rows_is_accounted_for(model, tmp_path, monkeypatch, budget_gb, expected):
    """64 rows take no more than the optimizer does, and say nothing of how many more would fit."""

    def make(run, data, target, **paths):
        tokens = run.factors.per_device_batch_size * run.factors.max_length
        return replace(closed_form(run, 0), peak_bytes=max(5 * GIB, tokens * GIB // 4_000))

    monkeypatch.setattr(advisor, "make_account", make)
    options = advise(model, "h100", max_length=16, budget_bytes=budget_gb * 10**9, results=tmp_path / "r").options
    assert all(one.rows == 64 and one.longest in expected for one in options)


def test_half_precision_weights_are_looked_at_only_where_full_ones_do_not_fit(accounts, model, tmp_path):
    plain = {one.name for one in ask(model, tmp_path).options}
    lean = {one.name: one for one in ask(model, tmp_path, budget_bytes=16 * 10**9).options}
    assert not any("bf16" in name for name in plain)
    assert lean["full"].rows == 0
    assert lean["full-bf16-checkpointed"].rows > lean["full-bf16"].rows > 0


def test_a_gpu_without_bfloat16_is_given_half_precision_and_a_scaler(accounts, model, tmp_path):
    assert {one.precision for one in ask(model, tmp_path, gpu="t4").options} == {"fp16"}


@pytest.mark.parametrize(
    ("objective", "key"),
    [("throughput", lambda one: -((one.tokens_per_second_low * one.tokens_per_second_high) ** 0.5)),
     ("memory", lambda one: one.peak_bytes / one.rows), ("cost", lambda one: one.cost_per_million_tokens)],
)  # fmt: skip
def test_the_first_is_the_best_of_all_that_fit(accounts, model, tmp_path, objective, key):
    advice = ask(model, tmp_path, objective=objective)
    assert key(advice.best[0]) == min(key(one) for one in advice.options if one.rows)
    assert len({one.method for one in advice.best}) == len(advice.best) == 3
    assert f"{advice.best[0].name} is first by {objective}" in advice.why


def test_accuracy_comes_from_collected_runs(accounts, model, tmp_path):
    collect_accuracies(tmp_path / "results")
    known = collected_accuracy(tmp_path / "results")
    assert known["lora"] == (0.0, 2)
    assert known["full"] == (pytest.approx(-10.0), 2)
    advice = ask(model, tmp_path, objective="accuracy")
    assert advice.best[0].method == "lora"
    assert "accuracy is from 6 collected runs" in advice.why


def test_a_study_of_one_method_says_nothing_of_accuracy(accounts, model, tmp_path):
    tables = tmp_path / "results" / "study" / "tables"
    tables.mkdir(parents=True)
    (tables / "runs.csv").write_text("run,outcome,model,dataset,method_kind,accuracy\na,ok,m,d,lora,0.5\n")
    assert collected_accuracy(tmp_path / "results") == {}
    assert "accuracy is not known" in ask(model, tmp_path).why


def test_it_says_how_well_memory_was_predicted_before(accounts, model, tmp_path):
    assert "no GPU run is collected here" in ask(model, tmp_path).why
    rows = ["device,memory_error", "l4,-0.02", "l4,0.04", "l4,0.03", "cpu,0.5", "l4,"]
    (tmp_path / "results" / "calibration.csv").write_text("\n".join(rows))
    assert "off by 3.0% in the middle of 3 collected GPU runs" in ask(model, tmp_path).why


@pytest.mark.parametrize("gpu", ["rtx4090", "h100"])
def test_a_batch_that_the_optimizer_hides_is_accounted_for_itself(model, tmp_path, monkeypatch, gpu):
    """Up to 4 rows the optimizer needs the most, the same for all: a line through those fits any batch."""

    def peak(run) -> int:
        rows = run.factors.per_device_batch_size * run.factors.max_length / LENGTH
        return max(int(1.5 * GIB * rows), 7 * GIB)

    monkeypatch.setattr(
        advisor, "make_account", lambda run, *rest, **paths: replace(closed_form(run, 1), peak_bytes=peak(run))
    )
    for one in ask(model, tmp_path, gpu=gpu).options:
        assert one.rows == {"rtx4090": 8, "h100": 32}[gpu]
        assert one.peak_bytes > 1.5 * GIB * one.rows
        assert one.longest < 2 * one.rows * LENGTH


def test_several_gpus_are_replicas_or_shards(accounts, model, tmp_path):
    options = {one.name: one for one in ask(model, tmp_path, gpus=4).options}
    assert {one.strategy for one in options.values()} == {"ddp", "fsdp"}
    assert options["full-fsdp"].rows > options["full-ddp"].rows
    assert options["lora-ddp"].tokens_per_second_high > options["lora-fsdp"].tokens_per_second_high / 2


def test_a_second_question_makes_no_account(accounts, model, tmp_path):
    ask(model, tmp_path)
    before = len(accounts)
    ask(model, tmp_path, objective="memory")
    assert len(accounts) == before


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_study_file_is_a_study(accounts, model, tmp_path, gpus):
    path = tmp_path / "best.yaml"
    assert advise_command(model, tmp_path, "--gpu", "rtx4090", "--gpus", str(gpus), "--study", str(path)) == 0
    planned = {run.method_name: run.factors for run in load_plan(path).runs.values() if not run.is_base}
    for one in ask(model, tmp_path, gpus=gpus).best:
        factors = planned.pop(one.name)
        assert (factors.per_device_batch_size, factors.strategy, factors.gpus) == (one.rows, one.strategy, gpus)
    assert not planned


def collect_accuracies(results) -> None:
    (results / "study" / "tables").mkdir(parents=True)
    lines = ["run,outcome,model,dataset,method_kind,accuracy"]
    lines += [f"{kind}{seed},ok,m,d,{kind},{accuracy}" for kind, accuracy in
              (("full", 0.40), ("lora", 0.50), ("qlora", 0.45)) for seed in (0, 1)]  # fmt: skip
    (results / "study" / "tables" / "runs.csv").write_text("\n".join(lines))


@pytest.mark.parametrize(("gpu", "gpus"), [("rtx4060", 1), ("h100", 1), ("h100", 8)])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_is_whole_at_any_width(accounts, model, tmp_path, gpu, gpus, width):
    collect_accuracies(tmp_path / "results")
    advice = ask(model, tmp_path, gpu=gpu, gpus=gpus)
    console = Console(width=width, file=io.StringIO())
    console.print(options_table(advice, console.width))
    printed = console.file.getvalue()
    assert "…" not in printed
    for one in advice.options:
        line = next(line for line in printed.splitlines() if f" {one.name} " in line)
        assert f" {one.rows or 'none'} " in line
        assert f" {one.peak_bytes / GIB:.1f} " in line
    if width == 200:
        assert {"longest", "accuracy"} <= set(printed.split())
        assert "wider" not in printed


def test_a_pipe_gets_every_column(accounts, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    collect_accuracies(tmp_path / "results")
    assert advise_command(model, tmp_path, "--gpu", "h100", "--gpus", "8") == 0
    printed = capsys.readouterr().out
    for one in ask(model, tmp_path, gpu="h100", gpus=8).options:
        assert f" {one.name} " in printed
        assert not one.rows or f" {one.longest:,} " in printed
    assert "…" not in printed
    assert "is first by throughput" in printed


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_advice_is_printed_even_where_its_study_file_cannot_be_written(accounts, model, tmp_path, capsys, form):
    (tmp_path / "file").write_text("")
    study = tmp_path / "file" / "best.yaml"
    assert advise_command(model, tmp_path, "--gpu", "rtx4090", "--study", str(study), *form) == 1
    said = capsys.readouterr()
    assert "is first by throughput" in said.out
    assert str(tmp_path / "file") in said.err
    assert said.err.splitlines()[-1].startswith("error: ")


def test_json_holds_what_the_function_gives(accounts, model, tmp_path, capsys):
    assert advise_command(model, tmp_path, "--gpu", "h100", "--json", "--objective", "cost") == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(json.dumps(ask(model, tmp_path, gpu="h100", objective="cost").to_dict()))
    assert {"name", "method", "strategy", "rows", "longest", "peak_bytes", "accuracy"} <= values["options"][0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "rtx4091"], "did you mean 'rtx4090'"),
        (["--gpu", "cpu"], "--gpu cpu: no GPU with known memory"),
        (["--gpu", "rtx4060", "--objective", "cost"], "--objective cost: rtx4060 has no price"),
        (["--gpu", "rtx4090", "--budget-gb", "80"], "--budget-gb 80: rtx4090 has 25.8 GB"),
        (["--gpu", "rtx4090", "--budget-gb", "-1"], "--budget-gb -1: allowed are numbers above 0"),
        (["--gpu", "rtx4090", "--budget-gb", "nan"], "--budget-gb nan: allowed are numbers above 0, up to 1,000,000"),
        (["--gpu", "rtx4090", "--budget-gb", "inf"], "--budget-gb inf: allowed are numbers above 0, up to 1,000,000"),
        (["--gpu", "rtx4090", "--gpus", "0"], "--gpus 0: allowed are numbers above 0"),
        (["--gpu", "rtx4090", "--budget-gb", "2"], "nothing fits: qlora-checkpointed with one row of 512 tokens"),
        (["--gpu", "rtx4090", "--model", "nowhere"], "--model nowhere: neither a folder here nor a name"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(accounts, model, tmp_path, capsys, options, message):
    assert advise_command(model, tmp_path, *options) != 0
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not said.out


def test_a_model_that_cannot_be_accounted_for_says_why(model, tmp_path, monkeypatch):
    monkeypatch.setattr(advisor, "make_account", lambda *a, **k: NoAccount("model: no architecture"))
    with pytest.raises(advisor.UserError, match="model: no architecture"):
        ask(model, tmp_path)
