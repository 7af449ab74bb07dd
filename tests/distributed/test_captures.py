"""Captures of whole runs: gloo collectives under torch.profiler, and a window under a stand-in for nsys."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from tests.distributed import ranks
from tunemap.capture import launch
from tunemap.capture.extract import extract

HERE = Path(__file__).parent
STEP_S = 0.02


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    __import__("sys").modules.setdefault(path.stem, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def capture(material, tmp_path):
    """Capture a run that has trained before, and read the facts: capture.json, summary.json, table by name."""

    def capture(run, backend):
        outcome, folder, facts = tmp_path / "outcome.json", tmp_path / "capture", tmp_path / "facts"
        outcome.write_text(json.dumps({"outcome": "ok", "measurements": {"step_time_mean_s": STEP_S}}))
        launch.capture(
            run, model=material.model, tokens=material.tokens, outcome=outcome, folder=folder, device="cpu",
            backend=backend,
        )  # fmt: skip
        extract(folder, facts)
        return facts

    return capture


def table(facts: Path, name: str) -> list[dict[str, str]]:
    with (facts / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_collectives_of_gloo_are_in_the_facts(capture):
    facts = capture(ranks.make_run("full", "fsdp", 2), "auto")
    described, summary = (json.loads((facts / name).read_text()) for name in ("capture.json", "summary.json"))
    assert (described["backend"], described["outcome"]) == ("torch", "ok")
    assert described["profiled_to_unprofiled_ratio"] == described["profiled_step_time_s"] / STEP_S
    assert len(summary["devices"]) == 2
    assert all(device["communication_ns"] > 0 for device in summary["devices"])
    found = table(facts, "collectives")
    kinds = {"allgather", "allreduce"}  # gloo has no reduce-scatter of its own
    assert {row["collective"] for row in found} == kinds
    assert all(int(float(row["count"])) >= 3 for row in found)  # once a step at least
    assert {"forward", "backward", "optimizer"} <= {row["phase"] for row in table(facts, "phases")}


def test_window_under_nsys_becomes_facts_whatever_its_exit_code(capture, tmp_path, monkeypatch):
    standin = module(HERE.parent / "unit" / "capture" / "standin.py")
    generator = module(HERE.parent / "unit" / "trace" / "trace_generator.py")
    generator.write_nsys(tmp_path / "made.sqlite", generator.generate(2000, processes=1, steps=3))
    tools = standin.install(tmp_path / "bin", tmp_path / "made.sqlite", export="--type= --output=")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(launch, "chosen_backend", lambda asked, device: "nsys")  # which has no CPU to record
    facts = capture(ranks.make_run("lora"), "nsys")
    described = json.loads((facts / "capture.json").read_text())
    assert (described["backend"], described["outcome"], described["steps"]) == ("nsys", "ok", 3)
    assert described["nsys_options_dropped"] == ["--force-overwrite", "--include-blobs", "--lazy"]
    assert described["profiled_to_unprofiled_ratio"] > 0
    around = next(words for words in standin.calls(tools) if words[0] == "profile" and "--help" not in words)
    assert around[1].startswith(f"--output={tmp_path}/capture/nsys.")
    assert "tunemap.capture.worker" in around
    assert json.loads((facts / "summary.json").read_text())["devices"][0]["kernel_count"] > 0
    assert generator.SECRET.encode() not in b"".join(p.read_bytes() for p in (tmp_path / "capture").iterdir())


def test_nsys_without_a_gpu_is_a_capture_that_says_why(capture):
    facts = capture(ranks.make_run("lora"), "nsys")
    described = json.loads((facts / "capture.json").read_text())
    assert described["outcome"] == "error"
    assert "profile is nsys, which records GPUs, and this run is on a CPU; use torch or auto" in described["reason"]
    assert not (facts / "summary.json").exists()
