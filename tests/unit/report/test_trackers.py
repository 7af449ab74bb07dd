"""Runs handed to trackers: to the real libraries where they are installed, and to stand-ins that note what they get."""

import argparse
import csv
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tunemap.cli import main
from tunemap.errors import UserError
from tunemap.report import trackers
from tunemap.report.trackers import TRACKERS, export, results, run_export_tracker, steps

SPEC = importlib.util.spec_from_file_location("fake_results", Path(__file__).parent / "fake_results.py")
fake_results = importlib.util.module_from_spec(SPEC)
sys.modules["fake_results"] = fake_results  # dataclasses look their module up
SPEC.loader.exec_module(fake_results)

RUN = "tiny.arithmetic.lora.seed-0"
STAND_IN = """
import json, os, pathlib
SETTINGS = {}
class Config:
    def update(self, values, allow_val_change):
        note("config", values)
config = Config()
def note(kind, value):
    folder = pathlib.Path(SETTINGS.get("dir") or os.environ["TRACKIO_DIR"])
    with (folder / "notes.jsonl").open("a") as file:
        file.write(json.dumps([SETTINGS["name"], kind, value]) + "\\n")
class Run:
    def log(self, values, step):
        note("log", [step, values])
    def finish(self):
        note("finish", None)
def init(**settings):
    SETTINGS.update(settings)
    note("init", settings)
    return Run()
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    fake = fake_results.write(tmp_path_factory.mktemp("trackers"), seeds=1, examples=20)
    (fake.results_dir / "plan.json").write_text(fake.plan_path.read_text())
    return fake.results_dir


@pytest.fixture(autouse=True)
def restored(tmp_path, monkeypatch):
    """Undo what an export sets in the environment."""
    for tracker in TRACKERS.values():
        for name in tracker.environment(tmp_path):
            monkeypatch.setenv(name, "")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Make `import NAME` find a module that notes its calls in the folder it is to write to."""

    def make(name):
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / f"{name}.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    yield make
    for name in TRACKERS:
        if "modules" in str(getattr(sys.modules.get(name), "__file__", "")):
            del sys.modules[name]


def notes(folder):
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_then_each_step_then_the_results(study, tmp_path, stand_in, name):
    stand_in(name)
    assert export(name, study, tmp_path / "out", [RUN]) == 1
    (_, _, settings), (_, _, config), *logged, (_, last, _) = notes(tmp_path / "out")
    assert (settings["project"], settings["name"], last) == ("fake", RUN, "finish")
    assert name == "trackio" or settings["mode"] == "offline"
    assert (config["method"], config["outcome"], config["learning_rate"]) == ("lora", "ok", 0.005)
    with (study / "runs" / RUN / "steps.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["rank"] == "0"]
    *each, (step, final) = [value for _, kind, value in logged if kind == "log"]
    assert [(number, values["loss"]) for number, values in each] == [
        (int(row["step"]), float(row["loss"])) for row in rows
    ]
    assert step == int(rows[-1]["step"])
    outcome = json.loads((study / "runs" / RUN / "outcome.json").read_text())
    assert final["result/tokens_per_second"] == outcome["measurements"]["tokens_per_second"]
    assert 0 < final["result/accuracy"] <= 1


def test_every_run_with_a_result_is_written_also_one_that_failed(study, tmp_path, stand_in):
    stand_in("wandb")
    planned = json.loads((study / "plan.json").read_text())["runs"]
    arguments = argparse.Namespace(name="wandb", study=study, output=tmp_path / "out", run=None)
    assert run_export_tracker(arguments) == 0
    found = {run: value["outcome"] for run, kind, value in notes(tmp_path / "out") if kind == "config"}
    assert found.keys() == planned.keys()
    assert {"ok", "unsupported"} <= set(found.values())


def test_tensorboard_reads_back_what_was_written(study, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    export("tensorboard", study, tmp_path, [RUN])
    events = accumulators.EventAccumulator(str(tmp_path / RUN))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [
        (step, pytest.approx(values["loss"])) for step, values in steps(study / "runs" / RUN / "steps.csv")
    ]
    assert "result/tokens_per_second" in events.Tags()["scalars"]


def test_mlflow_reads_back_what_was_written(study, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    export("mlflow", study, tmp_path, [RUN])
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = mlflow.MlflowClient().search_runs(["1"])
    assert (run.info.run_name, run.data.params["method"]) == (RUN, "lora")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [
        (step, values["loss"]) for step, values in steps(study / "runs" / RUN / "steps.csv")
    ]


def test_what_was_not_measured_is_left_out(tmp_path):
    (tmp_path / "steps.csv").write_text(
        "rank,step,loss,gradient_norm,measured\n0,0,1.5,nan,0\n1,0,9.0,1.0,0\n0,1,1.25,,1\n"
    )
    assert list(steps(tmp_path / "steps.csv")) == [(0, {"loss": 1.5}), (1, {"loss": 1.25})]
    measured = {"steps": 2, "energy_joules": None, "loss": float("inf"), "cost_currency": "EUR"}
    assert results({"measurements": measured}, tmp_path / "evaluation.json") == {"result/steps": 2}


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    code = main(["export-tracker", "wandb", "--study", str(study), "--output", str(tmp_path / "new")])
    assert code == 1
    assert capsys.readouterr().err == "error: wandb is not installed; install it with: pip install wandb\n"
    assert not (tmp_path / "new").exists()


def test_a_folder_or_run_that_cannot_be_is_refused(study, tmp_path, stand_in):
    stand_in("wandb")
    with pytest.raises(UserError, match=r"--run tiny: not in .*plan.json; `tunemap plan` lists the runs"):
        export("wandb", study, tmp_path / "out", ["tiny"])
    with pytest.raises(UserError, match=r"no plan.json; give the folder of a study's results"):
        export("wandb", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds something already; give a new folder"):
        export("wandb", study, tmp_path)
