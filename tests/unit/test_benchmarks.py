"""The benchmarks' own arithmetic and promises, without what they measure."""

import importlib
import json
import os

import pytest

from tunemap.config import Factors
from tunemap.training.packed_attention import by_document

MACHINE = {"cpu": {"model": "Xeon", "usable_cores": 2}, "gpus": [{"name": "H200"}], "packages": {"torch": "2"}}
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
    before, now = ({"size": "small", "method": method} for method in ("full", "lora"))
    (tmp_path / "earlier.json").write_text(json.dumps({"rows": [before], "environment": MACHINE | change}))
    rows = module("peers").with_kept_rows(tmp_path / "earlier.json", [now], MACHINE)
    assert rows == ([before, now] if kept else [now])


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
    page = page_of(f"peers-{device}", [PEER, {"size": "small", "method": "full", "contestant": "trl", "error": "oom"}])
    assert "1.500 [1.500, 1.500]" in page
    assert "did not run: oom" in page
    assert ("1.125" in page) == ("in processor time" in page.split("## Beside", 1)[1]) == (device == "cpu")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1  # every row has as many cells


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_page_says_of_packed_rows_holds_on_the_device(module, page_of, device):
    page = page_of(f"waterfall-{device}", [])
    assert ("packed rows attend by document" in page) == by_document(Factors(batching="packed"), device)
    assert ("under a mask" in page) == (device == "cuda")


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
