"""The benchmarks' own arithmetic and promises, without what they measure."""

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tunemap.config import Factors
from tunemap.training.packed_attention import by_document

MACHINE = {"cpu": {"model": "Xeon", "usable_cores": 2}, "gpus": [{"name": "H200"}], "packages": {"torch": "2"}}
RACED_WITH = {"steps": 40, "turns": 15, "threads": 1, "our_allocator_for_all": False, "ceiling_flops_per_s": 1.0}
STAND_IN = """
import json, os, sys
from pathlib import Path
turns = [[2.0, 1.0], [2.0, 1.0]]
seen = os.environ.get("CUDA_VISIBLE_DEVICES")
known = {"losses": [1.0], "own_tokens_per_second": 8.0, "peak_allocated_bytes": None, "seen": seen}
Path(sys.argv[2]).write_text(json.dumps({"turns_wall_and_cpu_s": turns} | known))
"""


@pytest.fixture
def module(repository, monkeypatch):
    """Imports a file of the folder benchmarks."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module


@pytest.fixture
def workload(module, tmp_path):
    """The smallest workload on a device, in a folder."""

    def make(device="cpu", method="full"):
        work = module("contestants.workload").Workload("small", method, 4, 2, 8, 1e-4, 16, 32, 1, device, "float32")
        work.save(tmp_path)
        return work

    return make


@pytest.fixture
def stand_ins(module, tmp_path, monkeypatch):
    """Contestants that leave a made-up result at once, one of which is not installed."""
    race = module("race")
    (tmp_path / "contestants").mkdir()
    (tmp_path / "contestants" / "stand_in.py").write_text(STAND_IN)
    contestants = {
        race.OWN: race.Contestant("stand_in.py"),
        "absent": race.Contestant("stand_in.py", requirements=("of-no-use",)),
    }
    monkeypatch.setattr(race, "CONTESTANTS", contestants)
    monkeypatch.setattr(race, "HERE", tmp_path)
    return list(contestants)


def test_a_peer_that_is_not_installed_is_a_result_and_the_others_race(module, workload, stand_ins, tmp_path):
    race, _ = module("race"), workload()
    found = race.race(stand_ins, tmp_path, tmp_path / "environments", everywhere=False)
    assert list(found) == stand_ins
    assert found["absent"] == {"error": "not installed; make peers-install"}
    assert found[race.OWN]["tokens_per_second"] == 24.0  # three steps of 16 tokens in a turn of 2 s


def test_a_result_has_the_versions_of_what_is_installed_where_it_ran(module, workload, tmp_path):
    watch = module("contestants.workload").Stopwatch(tmp_path / "result.json", workload())
    watch.save(losses=[], own_tokens_per_second=None, repository="5d602fd")
    versions = json.loads((tmp_path / "result.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["repository"] == "5d602fd"
    assert "optimum-benchmark" not in versions  # it is never in our environment


def test_every_package_of_a_peer_has_its_version(module):
    wanted = [one for contestant in module("race").CONTESTANTS.values() for one in contestant.requirements or ()]
    assert len(wanted) > 10
    assert all(re.fullmatch(r"[a-z-]+==[0-9.]+", one) for one in wanted)


def test_peft_needs_its_repository_besides_our_environment(module, tmp_path):
    race = module("race")
    assert not race.is_installed("peft", tmp_path)
    (tmp_path / race.PEFT_REPOSITORY).mkdir()
    assert race.is_installed("peft", tmp_path)
    assert race.is_installed("trainer", tmp_path)


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cuda", "2,3", "2"), ("cuda", "GPU-7f, GPU-8a", "GPU-7f"), ("cuda", None, "0"), ("cpu", "2,3", "")],
)
def test_every_contestant_sees_one_gpu_at_most(
    module, workload, stand_ins, tmp_path, monkeypatch, device, visible, seen
):
    race, work = module("race"), workload(device)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in stand_ins:
        assert race.environment_of(name, work, tmp_path)["CUDA_VISIBLE_DEVICES"] == seen
    assert race.race(stand_ins, tmp_path, tmp_path, everywhere=False)[race.OWN]["seen"] == seen


@pytest.mark.parametrize(
    ("change", "kept"),
    [({}, True), ({"gpus": []}, False), ({"gpus": [{"name": "H100"}]}, False), ({"packages": {"torch": "3"}}, False)],
)
def test_rows_of_an_earlier_output_are_kept_if_the_same_machine_made_them(module, tmp_path, change, kept):
    before, now = ({"size": "small", "method": method} | RACED_WITH for method in ("full", "lora"))
    (tmp_path / "earlier.json").write_text(json.dumps({"rows": [before], "environment": MACHINE | change}))
    rows = module("peers").with_kept_rows(tmp_path / "earlier.json", [now], MACHINE)
    assert rows == ([before, now] if kept else [now])


@pytest.mark.parametrize("change", [{"steps": 16}, {"turns": 1}, {"threads": 2}, {"our_allocator_for_all": True}, None])
def test_rows_of_an_earlier_output_are_kept_if_they_raced_with_the_same_settings(module, tmp_path, capsys, change):
    raced = {"size": "small", "method": "lora"} | RACED_WITH
    other = {"size": "large", "method": "full"} | ({} if change is None else RACED_WITH | change)  # None: not recorded
    same = {"size": "medium", "method": "full"} | RACED_WITH | {"ceiling_flops_per_s": 2.0}  # each command measures it
    (tmp_path / "earlier.json").write_text(json.dumps({"rows": [other, same], "environment": MACHINE}))
    assert module("peers").with_kept_rows(tmp_path / "earlier.json", [raced], MACHINE) == [raced, same]
    assert capsys.readouterr().err.endswith("not kept: large, full\n")


def test_what_a_device_keeps_of_a_call_ends_with_a_process_of_its_own(module):
    in_own_process = module("paired").in_own_process
    assert in_own_process(os.getpid) not in (os.getpid(), in_own_process(os.getpid))
    with pytest.raises(ZeroDivisionError):
        in_own_process(divmod, 1, 0)


@pytest.fixture
def page_of(module, tmp_path):
    """The page on performance of rows that one benchmark left."""

    def write(name, rows):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "environment": MACHINE, "note": None}))
        return module("performance").page(tmp_path)

    return write


def interval(value):
    return {"ratio": value, "estimate": value, "low": value, "high": value}


LEAN = {
    "method": "full",
    "way": "as usual",
    "peak_allocated_bytes": 2e6,
    "speed_up": {"wall": interval(1.5), "cpu": interval(1.125)},
    "speed_up_of_the_step": {"wall": interval(1.25), "cpu": interval(1.0625)},
}
PEER = {
    "size": "small",
    "method": "full",
    "contestant": "trainer",
    "rounds": 3,
    "tokens_per_second": 10.0,
    "own_tokens_per_second_to_measured": 1.0,
    "mfu": 0.5,
    "mean_loss_relative_difference": 2e-8,
    "peak_allocated_bytes": None,
    "ratio": interval(1.5),
    "cpu_time_ratio": interval(1.125),
}


@pytest.mark.parametrize(("device", "ratios"), [("cpu", ["1.500", "1.125", "1.062"]), ("cuda", ["1.500", "1.250"])])
def test_a_gpu_is_compared_by_the_clock_alone(page_of, device, ratios):
    cells = [f"{ratio} [{ratio}, {ratio}]" for ratio in ratios]
    row = " | ".join(["full: as usual", *cells, "2"])
    page = page_of(f"lean-step-{device}", [LEAN])
    assert f"| {row} |" in page
    assert ("| in processor time |" in page) == (device == "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_peers_on_a_gpu_are_compared_by_the_clock_alone(page_of, device):
    failed = {"size": "small", "method": "full", "contestant": "trl", "error": "oom"}
    page = page_of(f"peers-{device}", [PEER, PEER | {"mean_loss_relative_difference": None}, failed])
    assert "| 2e-08 | 1.500 [1.500, 1.500] |" in page
    assert "| not compared | 1.500 [1.500, 1.500] |" in page  # other rows or labels than ours
    assert "did not run: oom" in page
    assert ("1.125" in page) == ("in processor time" in page.split("## Beside", 1)[1]) == (device == "cpu")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1  # every row has as many cells


def test_the_page_says_what_was_raced_with_where_that_is_known(page_of):
    assert "turns: " not in page_of("peers-cpu", [PEER])
    other = PEER | RACED_WITH | {"ceiling_flops_per_s": 91.84e9}
    page = page_of("peers-cpu", [PEER | RACED_WITH | {"ceiling_flops_per_s": 100e9}, other])
    assert "Steps: 40, a quarter of them warm-up; turns: 15; threads: 1; our allocator's settings: for us alone" in page
    assert "in GFLOP/s: 91.8, 100.0." in page


def test_the_page_names_the_versions_of_each_contestant_once(page_of):
    trl = PEER | {"contestant": "trl", "versions": {"torch": "2", "trl": "1"}}
    assert "Versions of" not in page_of("peers-cpu", [PEER])
    page = page_of("peers-cpu", [PEER | {"versions": {"torch": "2"}}, trl, trl | {"method": "lora"}])
    assert "\nVersions of trainer: torch 2; of trl: torch 2, trl 1.\n" in page


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_page_says_of_packed_rows_holds_on_the_device(module, page_of, device):
    page = page_of(f"waterfall-{device}", [])
    assert ("packed rows attend by document" in page) == by_document(Factors(batching="packed"), device)
    assert ("under a mask" in page) == (device == "cuda")


def test_our_worker_understands_what_the_race_starts_it_with(module, repository, monkeypatch, workload, tmp_path):
    monkeypatch.syspath_prepend(repository / "benchmarks" / "contestants")
    loop, peers, work = module("tunemap_loop"), module("peers"), workload()
    (tmp_path / "run.json").write_text(json.dumps(peers.run_of(work).training_spec()))
    arguments = loop.arguments_of(tmp_path, "run.json", work.device, tmp_path / "scratch")
    assert loop.worker._parse(arguments).run.factors.max_steps == work.steps


def test_nobody_saves_a_checkpoint_in_a_turn(module, workload):
    work = workload()
    factors = module("peers").run_of(work).factors
    assert factors.checkpoint_steps == work.steps  # the last step's, after which the worker keeps the model instead


def test_the_trainer_starts_without_our_dependencies_where_trl_is_installed(module, tmp_path):
    startup = module("startup")

    def python(name):
        return startup.their_command(name, tmp_path, tmp_path / "result.json", tmp_path)[0]

    assert (python("trainer"), startup.environment_name("trainer", tmp_path)) == (Path(sys.executable), "tunemap")
    (tmp_path / "trl" / "bin").mkdir(parents=True)
    (tmp_path / "trl" / "bin" / "python").touch()
    assert (python("trainer"), startup.environment_name("trainer", tmp_path)) == (python("trl"), "trl")
    assert python("peft") == Path(sys.executable)


def test_the_page_says_when_the_trainer_started_among_our_dependencies(module, tmp_path):
    def page(**known):
        row = {"method": "full", "name": "trainer", "rounds": 1, "wall_s": 1, "cpu_s": 1} | known
        found = {"runs": [row | {"cpu_time_ratio": interval(1.5)}], "imports": [], "environment": MACHINE}
        (tmp_path / "startup-cpu.json").write_text(json.dumps(found))
        return module("performance").page(tmp_path)

    assert "The Trainer started in our environment" in page()
    assert "The Trainer started in our environment" not in page(environment="trl")


def test_methods_share_a_model_that_is_drawn_once(module, workload, monkeypatch):
    peers, drawn = module("peers"), []
    draw = peers.models.prepare
    monkeypatch.setattr(peers.models, "prepare", lambda *args, **rest: drawn.append(draw(*args, **rest)))
    works = [workload(method=method) for method in ("full", "lora")]
    with peers.prepared(works) as folders:
        known = [json.loads((folder / "run.json").read_text())["method"]["kind"] for folder in folders]
        assert known == ["full", "lora"]
        assert [type(works[0]).load(folder).method for folder in folders] == known
        assert len({(folder / "model" / "model.safetensors").resolve() for folder in folders}) == 1
        assert peers.flops_per_token(folders[0], works[0]) > peers.flops_per_token(folders[1], works[1])
    assert len(drawn) == 1


def test_a_part_begins_only_if_one_as_long_as_the_longest_fits(module):
    times = iter([0.0, 10.0, 30.0, 35.0, 41.0])
    limit = module("paired").TimeLimit(1.0, clock=lambda: next(times))
    assert [limit.another() for _ in range(4)] == [True, True, True, False]  # 41 s, and one took 20 s
    times = iter([0.0, 1e9])
    assert module("paired").TimeLimit(None, clock=lambda: next(times)).another()


def test_one_round_has_a_ratio_and_no_interval(module):
    paired = module("paired")
    assert paired.shown(paired.mean_of_rounds([1.5])) == "1.500"
    assert json.loads(json.dumps(paired.mean_of_rounds([1.5]), allow_nan=False))["low"] is None
    assert paired.shown(paired.mean_of_rounds([2.0, 2.0]), 1) == "2.0 [2.0, 2.0]"


@pytest.fixture
def raced(module, workload, monkeypatch):
    """Rows of both methods after each round of a race of which only its turns are real, and who ran in it."""
    peers, ran = module("peers"), []

    def race(names, folder, environments, *, everywhere):
        ran.append(names)
        known = {"tokens_per_second": 1.0, "own_tokens_per_second": 1.0, "peak_allocated_bytes": None, "losses": [1.0]}
        known["versions"] = {"torch": "2"}
        return {
            name: {"error": "oom"} if name == "trl" else known | {"wall_s": np.ones(1), "cpu_s": np.ones(1)}
            for name in names
        }

    def measure(names, minutes=None):
        works = [workload(method=method) for method in ("lora", "full")]
        arguments = argparse.Namespace(environments=Path(), rounds=2, our_allocator=False)
        return list(peers.measure(works, names, arguments, 1.0, module("paired").TimeLimit(minutes))), ran

    monkeypatch.setattr(peers, "race", race)
    return measure


def test_each_method_has_a_round_before_one_has_its_second(raced):
    tables, ran = raced(["tunemap", "trl", "trainer"])
    rounds = [(work.method, rows[0]["rounds"]) for work, rows in tables]
    assert rounds == [("lora", 1), ("full", 1), ("lora", 2), ("full", 2)]
    assert [[row.get("error") for row in rows] for _, rows in tables] == [[None, "oom", None]] * 4
    settings = RACED_WITH | {"steps": 4, "turns": 1}
    assert all(row.items() >= settings.items() for _, rows in tables for row in rows)
    assert tables[0][1][0]["versions"] == {"torch": "2"}
    assert ["trl" in names for names in ran] == [True, True, False, False]  # who fails does not race on


def test_a_race_without_time_has_no_rows(raced):
    assert raced(["tunemap"], minutes=0.0) == ([], [])


@pytest.fixture
def settings(module, monkeypatch, tmp_path):
    """Tables of the waterfall after each run, of two rounds in which only the order of the runs is real."""
    waterfall = module("waterfall")

    def measure(run, prepared, device):
        known = {"tokens_per_second": 100.0, "peak_bytes": 1e6, "label_tokens": 5, "loss": 2.0}
        if run.factors.compile:
            return {"error": "error: no compiler"}
        return known | ({"loss": 2.1} if run.factors.logits == "label_tokens" else {})

    monkeypatch.setattr(waterfall, "measure", measure)
    limit = module("paired").TimeLimit(None)
    return list(waterfall.waterfall(["lora", "full"], tmp_path, "cpu", 2, 1, limit))


def test_the_waterfall_says_after_each_run_what_is_known(settings, page_of):
    first, last = settings[0], settings[-1]
    assert [(row["method"], row["setting"], row["rounds"]) for row in first] == [("lora", "padded to max_length", 1)]
    assert len(settings) == 24 - 2  # a setting that failed once is not tried again
    assert [row["method"] for row in settings[6]] == ["lora"] * 6 + ["full"]
    assert {row["rounds"] for row in last if "error" not in row} == {2}
    errors = [row["error"] for row in last if "error" in row]
    apart = "the loss differs by 5.0e-02 from that of 'padded to max_length': not the same work"
    assert errors == [apart, "error: no compiler"] * 2
    page = page_of("waterfall-cpu", last)
    assert f"| lora: packed, logits of labels | no numbers: {apart} |" in page
    assert "| full: packed | 100 | 1.00 [1.00, 1.00] |" in page


def test_steps_on_a_gpu_go_on_after_one_that_fails_and_end_with_the_minutes(module, capfd, monkeypatch):
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "KEPT_S", 0.0)

    def step(name, code, share=None):
        script = f"import sys, time; print('{name}', *sys.argv[1:], flush=True); {code}"
        return gpu.Step(name, (sys.executable, "-c", script), share)

    assert gpu.take([step("bad", "time.sleep(1); sys.exit(1)"), step("good", "pass", share=0.5)], 10.0) == ["bad"]
    assert re.search(r"^good --minutes 4\.\d\d$", capfd.readouterr().out, flags=re.MULTILINE)
    assert gpu.take([step("long", "time.sleep(60)"), step("late", "time.sleep(60)")], 0.01) == ["long", "late"]
    assert capfd.readouterr().out.count("stopped: the minutes are over") == 2


def test_what_a_gpu_is_measured_by_installs_nothing(module, tmp_path):
    steps = module("gpu").steps_of(tmp_path)
    words = [str(word) for step in steps for word in step.command]
    assert "--install" not in words
    assert "qwen2.5-7b" not in words
    assert [step.name for step in steps] == ["ceiling", "lean-step", "waterfall", "peers"]
    assert str(tmp_path / "lean-step-cuda.json") in words  # where performance.py looks
