"""Each outcome, forced in a real run: what is written, with phase, step and reason, and what is kept.

A `sitecustomize` on the path of the worker breaks it from outside; nothing in the package knows of it.
"""

import csv
import io
import json
import sys
import time

import pytest

from tunemap.training import launch
from tunemap.training.devices import Devices
from tunemap.training.failure import describe

pytestmark = pytest.mark.usefixtures("forked_workers")
LORA = {"kind": "lora", "rank": 2}

SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, sys

class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "tunemap.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            breakage(module)
        spec.loader.exec_module = exec_module
        return spec

def breakage(module):
    original, calls = module.loss_sum, []
    def loss_sum(*arguments):
        calls.append(None)
        if len(calls) == 3:
            import os, signal, time, torch
            {statement}
        return original(*arguments)
    module.loss_sum = loss_sum

if "tunemap.training.loop" in sys.modules:  # of a worker that was forked
    breakage(sys.modules["tunemap.training.loop"])
else:
    sys.meta_path.insert(0, Breaker())
"""


@pytest.fixture
def break_third_step(tmp_path, monkeypatch):
    """Make the workers of this test execute a statement in their third step."""

    def break_third_step(statement: str) -> None:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.replace("{statement}", statement))
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return break_third_step


def losses(steps: str) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader(io.StringIO(steps))]


def test_cuda_out_of_memory_is_oom_with_what_was_asked_and_free(train, break_third_step):
    message = (
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
        "512.00 MiB is free."
    )
    break_third_step(f"raise torch.OutOfMemoryError({message!r})")
    ended = train(LORA, logging_steps=1)
    outcome = ended.outcome
    assert (ended.code, outcome["outcome"], outcome["phase"], outcome["step"]) == (0, "oom", "train", 2)
    assert (outcome["bytes_asked"], outcome["bytes_free"]) == (3 * 2**29, 2**29)
    assert "Tried to allocate 1.50 GiB" in outcome["reason"]
    assert len(losses(ended.steps)) == 2  # what was measured until then
    assert outcome["environment"]["packages"]["torch"]
    assert [path.name for path in ended.paths.work.iterdir()] == ["finished"]


def test_a_memory_limit_on_a_cpu_is_oom(train, break_third_step):
    break_third_step(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); torch.empty(2**36, dtype=torch.uint8)"
    )
    outcome = train(LORA).outcome
    assert (outcome["outcome"], outcome["phase"]) == ("oom", "train")
    assert outcome["bytes_asked"] == 2**36
    assert outcome["bytes_free"] > 0


def test_a_run_beyond_its_time_limit_is_timeout(train, break_third_step):
    break_third_step("time.sleep(600)")
    outcome = train(LORA, time_limit_minutes=0.2).outcome
    assert outcome["outcome"] == "timeout"
    assert outcome["reason"] == "not finished after time_limit_minutes 0.2"
    assert outcome["phase"] in ("load", "data", "train")  # on a loaded machine it may not get to its steps


def test_an_exception_is_error_with_its_traceback(train, break_third_step):
    break_third_step("raise RuntimeError('made to fail')")
    outcome = train(LORA, logging_steps=1).outcome
    assert (outcome["outcome"], outcome["phase"], outcome["step"]) == ("error", "train", 2)
    assert outcome["reason"] == "RuntimeError: made to fail"
    assert "loss_sum" in outcome["traceback"]


def test_a_killed_process_is_error_with_the_signal(train, break_third_step):
    break_third_step("os.kill(os.getpid(), signal.SIGKILL)")
    ended = train(LORA, logging_steps=1)
    assert (ended.outcome["outcome"], ended.outcome["phase"], ended.outcome["step"]) == ("error", "train", 2)
    assert "SIGKILL (the system may have run out of memory)" in ended.outcome["reason"]
    assert len(losses(ended.steps)) == 2


def test_a_loss_that_is_no_number_is_invalid_and_keeps_its_data(train):
    ended = train({"kind": "full"}, learning_rate=1e30, max_grad_norm=None, logging_steps=2)
    outcome = ended.outcome
    assert (outcome["outcome"], outcome["phase"]) == ("invalid", "train")
    assert outcome["reason"].startswith("gate finite_loss: loss nan at step")
    assert not ended.gate("finite_loss")["passed"]
    kept = losses(ended.steps)
    assert kept[0] > 0
    assert kept[-1] != kept[-1]
    assert ended.measurements["host_rss_peak_bytes"] > 0
    assert ended.measurements["trainable_parameters"] > 0
    assert ended.measurements["train_loss"] is None  # no number, and no JSON; steps.csv keeps it
    assert list(ended.paths.weights.iterdir()) == []  # nobody may evaluate it


def test_a_device_that_is_not_there_is_unsupported(train):
    outcome = train(LORA, device="cuda", strategy="ddp", gpus=99).outcome
    assert (outcome["outcome"], outcome["phase"]) == ("unsupported", "start")
    assert "GPU" in outcome["reason"]


def test_an_outcome_exists_before_anything_can_fail(train, monkeypatch, tmp_path):
    class KilledError(BaseException):
        """Stands for a kill of the launcher itself: nothing of it runs any more."""

    def killed(*arguments):
        raise KilledError

    monkeypatch.setattr("tunemap.training.launch._train", killed)
    with pytest.raises(KilledError):
        train(LORA)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["run"]) == ("error", "tiny")
    assert outcome["reason"] == "the launcher was killed before it could say how the run ended"


@pytest.mark.parametrize(
    ("error", "outcome", "asked"),
    [
        (MemoryError(), "oom", None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 4096 bytes. Error code 12 (Cannot allocate memory)"), "oom", 4096),
        (RuntimeError("CUDA error: out of memory"), "oom", None),
        (RuntimeError("shapes do not match"), "error", None),
    ],
)  # fmt: skip
def test_messages_of_memory_are_told_from_others(error, outcome, asked):
    failure = describe(error, rank=0, phase="train", step=3)
    assert (failure.outcome, failure.bytes_asked) == (outcome, asked)


def test_a_process_that_does_not_end_after_its_result_costs_no_result(tmp_path, monkeypatch, make_run):
    paths = launch.Paths(
        **dict.fromkeys(("model", "dataset", "tokens", "weights", "steps", "outcome"), tmp_path), work=tmp_path
    )
    linger = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, 'result.json').write_text('{{}}'); time.sleep(600)"
    monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", linger])
    monkeypatch.setattr(launch, "END_LIMIT_S", 0.3)
    started = time.monotonic()
    assert launch._train(make_run({"kind": "full"}), paths, Devices("cpu")).failure is None
    assert time.monotonic() - started < 30
